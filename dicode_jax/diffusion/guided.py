"""Guided sampling: settings, branches of guidance and the one loop that all families paint with.

    latents = sample_guided(predict, [condition, null_condition], schedule, cfg, shape, keys=keys)

A condition is a pytree of arrays ``[b, ...]``. The settings are a pytree too: passed to a jitted
function as they are, what steers the sampling (scales, rescale, eta, fs) is traced, so that another
value compiles nothing, and everything else is static.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.guidance import guide, rescale_guidance
from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.diffusion.samplers.base import Denoise, Project, Sampler, per_sample_normal, sample
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.samplers.dpm import DPMSolver
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.time_grid import SPACINGS, ddim_time_grid
from dicode_jax.nn.rngs import fold
from dicode_jax.typing import Array

Predict = Callable[[Array, Array, Any, Array], Array]
"""``(x [b, ...], times, condition, fs [b]) -> prediction [b, ...]``, one branch of guidance."""

Guide = Callable[[Sequence[Array], Array], Array]
"""``(predictions of the branches, step) -> guided prediction``; ``step`` is traced."""

# What is traced, and the values that switch a part of the program off and so stay static.
_TRACED = ("guidance_scale", "guidance_rescale", "eta", "fs")
_OFF = {"guidance_scale": 1.0, "guidance_rescale": 0.0}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How latents are sampled; the defaults are those of DiCoDe's demos.

    Attributes:
        num_frames: frames of a clip.
        num_inference_steps: sampling steps.
        guidance_scale: strength of classifier-free guidance; with 1 only the conditional branch
            runs.
        guidance_rescale: see `dicode_jax.diffusion.guidance.rescale_guidance`; 0 for off.
        sampler: one of `dicode_jax.diffusion.samplers.SAMPLERS`.
        eta: 0 deterministic, 1 ancestral ("ddim") or the reverse SDE ("dpm++"); what lies between
            is told by `DDIM` and `DPMSolver`.
        spacing: one of `dicode_jax.diffusion.time_grid.SPACINGS`.
        fs: frame stride, or frames per second, that the UNet is told.
        drop_tokens: zero the deep tokens 0..drop_tokens of every keyframe; None keeps all.
        batch_guidance: evaluate the branches of guidance in one batched call instead of one after
            the other, which takes less memory.
        table_dtype: rounding of the tables of `DDIM`; "dpm++" has float64 ones.
    """

    num_frames: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.7
    sampler: str = "ddim"
    eta: float = 1.0
    spacing: str = "uniform"
    fs: int = 6
    drop_tokens: int | None = None
    batch_guidance: bool = False
    table_dtype: str = "float32"

    RETIRED: ClassVar = {"image_guidance_scale": (None, "guidance_scale")}

    def __post_init__(self):
        for name in ("num_frames", "num_inference_steps", "fs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}")

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional branch runs at all."""
        return not self._is_off("guidance_scale")

    @property
    def is_rescaled(self) -> bool:
        """Whether a guided prediction is rescaled."""
        return not self._is_off("guidance_rescale")

    def _is_off(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int | float) and value == _OFF.get(name)

    def tree_flatten(self):
        traced = tuple(name for name in _TRACED if not self._is_off(name))
        static = tuple(item for item in vars(self).items() if item[0] not in traced)
        return tuple(getattr(self, name) for name in traced), (traced, static)

    @classmethod
    def tree_unflatten(cls, names_and_static, values):
        names, static = names_and_static
        config = object.__new__(cls)  # the values may be tracers, which cannot be checked
        vars(config).update(static, **dict(zip(names, values, strict=True)))
        return config


def make_sampler(schedule: NoiseSchedule, cfg: SamplingConfig) -> Sampler:
    """The sampler that the settings name."""
    if cfg.sampler == "ddim":
        return DDIM(schedule=schedule, eta=cfg.eta, table_dtype=cfg.table_dtype)
    return DPMSolver(schedule=schedule, eta=cfg.eta)


def make_grid(schedule: NoiseSchedule, cfg: SamplingConfig) -> np.ndarray:
    """The time grid of the settings, int32 ``[steps + 1]``.

    Raises:
        ValueError: the spacing leaves the schedule with this number of steps.
    """
    return ddim_time_grid(cfg.spacing, cfg.num_inference_steps, schedule.num_timesteps)


def make_guide(cfg: SamplingConfig) -> Guide:
    """Joins the predictions of the branches of condition and null condition."""

    def join(outputs, step):
        del step  # the same at all of them
        cond, uncond = outputs
        guided = guide(cond, uncond, cfg.guidance_scale)
        if cfg.is_rescaled:
            guided = rescale_guidance(guided, outputs[0], cfg.guidance_rescale)
        return guided

    return join


def guided_denoise(
    predict: Callable[[Array, Array, Any], Array],
    branches: Sequence[Any],
    guide: Guide,
    *,
    batched: bool,
) -> Denoise:
    """The guided model of a sampling loop.

    Args:
        predict: ``(x [b, ...], times, condition) -> prediction [b, ...]``.
        branches: conditions of the same structure, ``[b, ...]``; of one alone nothing is guided.
        guide: joins the predictions of the branches, float32 and in their order.
        batched: evaluate the branches in one call on ``[branches * b, ...]``, or one after the
            other, which takes less memory.
    """
    if len(branches) == 1:
        return lambda x, times, step: predict(x, times, branches[0]).astype(jnp.float32)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *branches)

    def together(x, times):
        repeat = lambda a: jnp.concatenate([a] * len(branches))  # noqa: E731
        joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
        return jnp.split(predict(repeat(x), repeat(times), joined), len(branches))

    def apart(x, times):  # a loop, so that the network is compiled once
        return list(jax.lax.map(lambda condition: predict(x, times, condition), stacked))

    evaluate = together if batched else apart

    def denoise(x, times, step):
        return guide([output.astype(jnp.float32) for output in evaluate(x, times)], step)

    return denoise


def sample_guided(
    predict: Predict,
    branches: Sequence[Any],
    schedule: NoiseSchedule,
    cfg: SamplingConfig,
    shape: tuple[int, ...],
    *,
    keys: Array | None,
    x_init: Array | None = None,
    noise: Array | None = None,
    guide: Guide | None = None,
    project: Project | None = None,
    return_trajectory: bool = False,
    use_scan: bool = True,
) -> tuple[Array, Any]:
    """Samples latents ``[b, *shape]``, float32. Pure: jit it with ``cfg`` as an argument.

    Args:
        predict: the network.
        branches: conditions, ``[b, ...]``: the full one, then what `make_guide` joins it with.
        schedule: training noise schedule and parameterization.
        cfg: settings.
        shape: of one sample, frames first.
        keys: one per sample, ``[b]``; a sample depends on its key alone, not on the batch. None
            when ``x_init`` (and, with eta > 0, ``noise``) are given.
        x_init: starting noise instead of the keys'.
        noise: noise of every step instead of the keys'.
        guide: joins the branches instead of `make_guide`, for a scale that depends on the step.
        project, return_trajectory, use_scan: see `dicode_jax.diffusion.samplers.base.sample`.

    Returns:
        The latents, and the states of all steps or None.

    Raises:
        ValueError: neither keys nor noise, or a number of steps that the schedule cannot hold.
    """
    if x_init is None:
        if keys is None:
            raise ValueError("sampling needs keys (one per sample) or x_init")
        x_init = per_sample_normal(keys, 0, shape)
    fs = jnp.full((x_init.shape[0],), cfg.fs, jnp.int32)
    denoise = guided_denoise(
        lambda x, times, branch: predict(x, times, *branch),
        [(condition, fs) for condition in branches],
        make_guide(cfg) if guide is None else guide,
        batched=cfg.batch_guidance,
    )
    return sample(
        denoise,
        make_sampler(schedule, cfg),
        x_init.astype(jnp.float32),
        make_grid(schedule, cfg),
        keys=None if keys is None else fold(keys, 1),
        noise=noise,
        project=project,
        return_trajectory=return_trajectory,
        use_scan=use_scan,
    )

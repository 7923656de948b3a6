"""Guided sampling: settings, branches of guidance and the one loop that all families paint with.

    latents = sample_guided(predict, [condition, null_condition], schedule, cfg, shape, keys=keys)

A condition is a pytree of arrays ``[b, ...]``. The settings are a pytree too: passed to a jitted
function as they are, what steers the sampling (scales, rescale, eta, fs) is traced, so that another
value compiles nothing, and everything else is static.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.guidance import guide, rescale_guidance
from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.diffusion.samplers.base import (
    Carry,
    Denoise,
    Project,
    Sampler,
    Steps,
    make_steps,
    per_sample_normal,
    run_steps,
)
from dicode_jax.diffusion.samplers.ddim import DDIM
from dicode_jax.diffusion.samplers.dpm import DPMSolver
from dicode_jax.diffusion.samplers.unipc import UniPC
from dicode_jax.diffusion.schedules import NoiseSchedule, expand
from dicode_jax.diffusion.time_grid import SPACINGS, ddim_time_grid
from dicode_jax.nn.rngs import fold
from dicode_jax.typing import Array

Predict = Callable[[Array, Array, Any, Array], Array]
"""``(x [b, ...], times, condition, fs [b]) -> prediction [b, ...]``, one branch of guidance."""

PredictDeep = Callable[[Array, Array, Any, Array, Any], tuple[Array, Any]]
"""``(x, times, condition, fs, deep) -> (prediction, deep)``: `Predict` with deep features, a pytree
of arrays ``[b, ...]``: those of an earlier step, or None, in place of which it makes them."""

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
            is told by `DDIM` and `DPMSolver`. "unipc" is deterministic whatever it is.
        spacing: one of `dicode_jax.diffusion.time_grid.SPACINGS`.
        fs: frame stride, or frames per second, that the UNet is told.
        drop_tokens: zero the deep tokens 0..drop_tokens of every keyframe; None keeps all.
        batch_guidance: evaluate the branches of guidance in one batched call instead of one after
            the other, which takes less memory.
        table_dtype: rounding of the tables of `DDIM`; the others have float64 ones.
        guidance_interval: where guidance begins and ends, as shares of the steps from the noisiest,
            rounded to whole steps (Kynkäänniemi et al., arXiv 2404.07724, give noise levels). The
            other steps evaluate the conditional branch alone, as with a scale of 1.
        deep_cache_interval: every so many steps the whole network runs, and in between only its
            shallow part, with the deep features of the last whole run (DeepCache, Ma et al., arXiv
            2312.00858); 1 for off.
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
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    deep_cache_interval: int = 1

    RETIRED: ClassVar = {"image_guidance_scale": (None, "guidance_scale")}

    def __post_init__(self):
        for name in ("num_frames", "num_inference_steps", "fs", "deep_cache_interval"):
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
        start, end = self.guidance_interval
        if not 0 <= start <= end <= 1:
            raise ValueError(
                f"guidance_interval must ascend within 0..1, got {self.guidance_interval}"
            )

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
    if cfg.sampler == "unipc":
        return UniPC(schedule=schedule)
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


class Turn(NamedTuple):
    """What one step evaluates.

    Attributes:
        num_branches: of guidance: all of them, or the first alone.
        is_whole: the whole network runs, not only its shallow part.
    """

    num_branches: int
    is_whole: bool


def plan_turns(cfg: SamplingConfig, num_steps: int, num_branches: int) -> list[Turn]:
    """What each step evaluates, ``num_steps`` of them.

    Where guidance begins, the whole network runs out of turn if it last did for one branch.
    """
    start, end = (round(share * num_steps) for share in cfg.guidance_interval)
    turns, age, held = [], 0, 0
    for step in range(num_steps):
        count, age = num_branches if start <= step < end else 1, age + 1
        is_whole = age >= cfg.deep_cache_interval or count > held
        if is_whole:
            age, held = 0, count
        turns.append(Turn(count, is_whole))
    return turns


def guided_denoise(
    predict: Callable[[Array, Array, Any], Array],
    branches: Sequence[Any],
    guide: Guide,
    *,
    batched: bool,
    spreads: bool = False,
) -> Denoise:
    """The guided model of a sampling loop whose steps are all alike.

    Args:
        predict: ``(x [b, ...], times, condition) -> prediction [b, ...]``.
        branches: conditions of the same structure, ``[b, ...]``; of one alone nothing is guided.
        guide: joins the predictions of the branches, float32 and in their order.
        batched: evaluate the branches in one call on ``[branches * b, ...]``, or one after the
            other, which takes less memory.
        spreads: see `guided_steps`.
    """
    turns, network = [Turn(len(branches), True)], _without_deep(predict)
    return _planned(network, branches, guide, turns, batched, spreads=spreads)


def guided_frames(
    predict: Callable[[Array, Array, Any], Array],
    branches: Sequence[Any],
    scale: Array | float,
    within: Array | tuple[int, int],
) -> Denoise:
    """The guided model of a loop in which every frame stands at its own timestep.

    Args:
        predict: ``(x [b, f, ...], times [b, f], condition) -> prediction``.
        branches: the condition, and unless nothing is guided that of the other branch.
        scale: of guidance.
        within: the least and the greatest timestep of a frame that is guided; others follow the
            condition alone.
    """

    def denoise(x: Array, times: Array, step: Array) -> Array:
        is_guided = (within[0] <= times) & (times <= within[1])
        scales = expand(jnp.where(is_guided, scale, 1.0), x.ndim)
        join = lambda outputs, _: guide(outputs[0], outputs[1], scales)  # noqa: E731
        return guided_denoise(predict, branches, join, batched=True)(x, times, step)

    return denoise


def _without_deep(predict: Callable[[Array, Array, Any], Array]) -> Callable:
    return lambda x, times, condition, _: (predict(x, times, condition), None)


def _planned(
    network: Callable,
    branches: Sequence[Any],
    guide: Guide,
    turns: Sequence[Turn],
    batched: bool,
    *,
    remembers: bool = False,
    spreads: bool = False,
) -> Denoise:
    """The guided model of a loop whose step i evaluates ``turns[i]``; of one turn, all steps do.

    Args:
        network: ``(x, times, condition, deep) -> (prediction, deep)``.
        branches, guide, batched: see `guided_denoise`.
        turns: what is evaluated; each kind is compiled once.
        remembers: it takes and gives deep features of all branches, ``[branches, b, ...]``.
        spreads: see `guided_steps`.
    """
    kinds = sorted(set(turns))
    turn = functools.partial(_turn, network, guide=guide, batched=batched, spreads=spreads)
    runs = [turn(branches[: kind.num_branches], is_whole=kind.is_whole) for kind in kinds]
    which = np.array([kinds.index(turn) for turn in turns])

    def run(x, times, step, memory):
        if len(runs) == 1:
            return runs[0](x, times, step, memory)
        return jax.lax.switch(jnp.asarray(which)[step], runs, x, times, step, memory)

    return run if remembers else lambda x, times, step: run(x, times, step, None)[0]


def _turn(network, branches: Sequence[Any], *, guide: Guide, is_whole: bool, batched, spreads):
    """``(x, times, step, memory) -> (prediction, memory)`` of the steps of one kind."""
    count = len(branches)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *branches)

    def alone(x, times, deep):
        output, deep = network(x, times, branches[0], jax.tree.map(lambda a: a[0], deep))
        return [output], jax.tree.map(lambda a: a[None], deep)

    def together(x, times, deep):
        joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (stacked, deep))
        if not spreads:
            x, times = (jnp.concatenate([a] * count) for a in (x, times))
        output, deep = network(x, times, *joined)
        apart = lambda a: a.reshape(count, -1, *a.shape[1:])  # noqa: E731
        return jnp.split(output, count), jax.tree.map(apart, deep)

    def apart(x, times, deep):  # a loop, so that the network is compiled once
        outputs, deep = jax.lax.map(lambda each: network(x, times, *each), (stacked, deep))
        return list(outputs), deep

    evaluate = alone if count == 1 else together if batched else apart

    def denoise(x, times, step, memory):
        deep = None if is_whole else jax.tree.map(lambda a: a[:count], memory)
        outputs, deep = evaluate(x, times, deep)
        outputs = [output.astype(jnp.float32) for output in outputs]
        if is_whole:
            memory = jax.tree.map(lambda old, new: old.at[:count].set(new), memory, deep)
        return (outputs[0] if count == 1 else guide(outputs, step)), memory

    return denoise


def guided_steps(
    predict: Predict,
    branches: Sequence[Any],
    schedule: NoiseSchedule,
    cfg: SamplingConfig,
    shape: tuple[int, ...],
    *,
    keys: Array | None,
    noise: Array | None = None,
    guide: Guide | None = None,
    predict_deep: PredictDeep | None = None,
    project: Project | None = None,
    spreads: bool = False,
) -> Steps:
    """The steps of `sample_guided`, to be taken some at a time.

    Args:
        shape: of all samples, ``[b, f, ...]``.
        spreads: of branches in one call the networks take states and times ``[b, ...]`` beside
            conditions ``[branches * b, ...]``, all branches being of the same states.
        predict, branches, schedule, cfg, keys, noise, guide, predict_deep, project: see
            `sample_guided`.

    Raises:
        ValueError: see there.
    """
    fs = jnp.full(shape[:1], cfg.fs, jnp.int32)
    conditions = [(condition, fs) for condition in branches]
    grid = make_grid(schedule, cfg)
    turns = plan_turns(cfg, len(grid) - 1, len(branches))
    is_deep = cfg.deep_cache_interval > 1
    if not is_deep:
        network = _without_deep(lambda x, times, branch: predict(x, times, *branch))
    elif predict_deep is None:
        raise ValueError("this network keeps no deep features; deep_cache_interval must be 1")
    else:

        def network(x, times, branch, deep):
            condition, fs = branch
            return predict_deep(x, times, condition, fs, deep)

    guide = make_guide(cfg) if guide is None else guide
    return make_steps(
        _planned(
            network,
            conditions,
            guide,
            turns,
            cfg.batch_guidance,
            remembers=is_deep,
            spreads=spreads,
        ),
        make_sampler(schedule, cfg),
        shape,
        grid,
        keys=None if keys is None else fold(keys, 1),
        noise=noise,
        project=project,
        remember=(lambda x: _no_features(network, x, conditions)) if is_deep else None,
    )


def starting_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """What `sample_guided` starts from, float32 ``[b, *shape]``."""
    return per_sample_normal(keys, 0, shape)


def first_state(x_init: Array | None, keys: Array | None, shape: tuple[int, ...]) -> Array:
    """What sampling begins with, float32 ``[b, *shape]``: given, or noise of a key per sample.

    Raises:
        ValueError: neither is given.
    """
    if x_init is None:
        if keys is None:
            raise ValueError("sampling needs keys (one per sample) or x_init")
        x_init = starting_noise(keys, shape)
    return x_init.astype(jnp.float32)


def by_sample(carry: Carry) -> Carry:
    """Memory ``[branches, b, ...]`` as ``[b, branches, ...]``, or back; the state as it is."""
    return carry._replace(memory=jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), carry.memory))


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
    predict_deep: PredictDeep | None = None,
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
        predict_deep: the network where ``cfg`` has it keep deep features.
        project, return_trajectory, use_scan: see `dicode_jax.diffusion.samplers.base.sample`.

    Returns:
        The latents, and the states of all steps or None.

    Raises:
        ValueError: neither keys nor noise, a number of steps that the schedule cannot hold, or deep
            features of a network that keeps none.
    """
    x_init = first_state(x_init, keys, shape)
    steps = guided_steps(
        predict,
        branches,
        schedule,
        cfg,
        x_init.shape,
        keys=keys,
        noise=noise,
        guide=guide,
        predict_deep=predict_deep,
        project=project,
    )
    return run_steps(steps, steps.begin(x_init), return_trajectory, use_scan)


def _no_features(network: Callable, x: Array, branches: Sequence[Any]) -> Any:
    """Zeros in place of the deep features of all branches, ``[branches, b, ...]``."""
    times = jnp.zeros(x.shape[:1], jnp.int32)
    _, deep = jax.eval_shape(lambda x: network(x, times, branches[0], None), x)
    return jax.tree.map(lambda leaf: jnp.zeros((len(branches), *leaf.shape), leaf.dtype), deep)

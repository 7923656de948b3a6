"""Stage 2 of AR-Diffusion: the denoiser on latents of clips, each frame with its own noise.

Sun et al., arXiv 2503.07418, section 3.3. Latents are scaled to unit vectors, as the original does
(`norm_preprocess`). It never steps its contexts, leaves their gradients to pile up in the clip
norm, and drops classes by a normal draw (0.58 of them) onto the context of class 0; here contexts
learn, or are fixed and outside of the norm, and what is dropped gets the null context.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp

from dicode_jax import config as config_lib
from dicode_jax.data.sources.open import kind_of
from dicode_jax.diffusion.asynchronous import sample_frames
from dicode_jax.diffusion.frame_schedule import frame_schedule
from dicode_jax.diffusion.guided import guided_frames
from dicode_jax.diffusion.losses import diffusion_loss
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import per_sample_normal
from dicode_jax.diffusion.time_grid import ddim_timesteps
from dicode_jax.diffusion.timesteps import draw_timesteps
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import Faults, UserError
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.nn.rngs import draw, row_keys, split, stream
from dicode_jax.pipelines.ar_diffusion import ARDiffusionConfig, FrameSamplingConfig
from dicode_jax.stages import parts
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.stages.ar_diffusion.frame_vae import from_unit, to_unit
from dicode_jax.storage import weights
from dicode_jax.storage.files import read_small
from dicode_jax.training.stage import Path, Stage
from dicode_jax.typing import Array, Bool, Float, Int, UInt8

CONTEXTS = ("context", "null")


def settle(
    config: DiTTrainConfig, workdir: pathlib.Path | None = None, faults: Faults | None = None
) -> DiTTrainConfig:
    """The config with all that it leaves to its data and its VAE.

    `data.kind` says whether `data.path` is a cache; `frame_size` is the VAE's, `class_names` are
    those of `class_list`, and frames are cropped to squares where nothing else is said.

    Raises:
      UserError: Data, VAE or list are not there, or do not fit the model; all that is wrong is
        told.
    """
    del workdir
    steps = (_with_window, _with_kind, _with_vae, _with_names)
    return (faults or Faults()).through(config, *steps)


def settle_videos(config: DiTTrainConfig) -> DiTTrainConfig:
    """The config as videos are encoded by it, into a cache that `settle` will take.

    Raises:
      UserError: As `settle`, or it names no VAE.
    """
    faults = Faults()
    with faults.gather():
        kind_of(config.data)
    with faults.gather():
        if config.vae is None:
            raise UserError("latents are made by a VAE: name its folder (--vae MODEL)")
        config = _with_vae(config)
    faults.tell()
    data = dataclasses.replace(config.data, resize=config.data.resize or "crop")
    return dataclasses.replace(config, data=data)


def _with_window(config: DiTTrainConfig) -> DiTTrainConfig:
    of_clips, window = config.data.num_frames, config.model.dit.num_frames
    if of_clips != window:
        raise UserError(
            f"the model learns clips of {window} frames, data.num_frames is {of_clips}: longer "
            "videos are for train.encode, whose cache is cut into clips"
        )
    return config


def _with_names(config: DiTTrainConfig) -> DiTTrainConfig:
    if config.class_list is None:
        return config
    try:
        lines = read_small(config.class_list).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{config.class_list} is not UTF-8: {error}") from error
    names = tuple(re.sub(r"^\d+\s+", "", line.strip()) for line in lines if line.strip())
    return dataclasses.replace(config, class_names=names)


def _with_kind(config: DiTTrainConfig) -> DiTTrainConfig:
    kind = kind_of(config.data)
    data = dataclasses.replace(config.data, resize=config.data.resize or "crop")
    if kind != "cache":
        if config.late_share:
            raise UserError(
                "late_share takes clips of longer videos: encode those by train.encode "
                "(--data.num-frames of a drawn one) and name the cache as data.path"
            )
        if not config.cached_clips or config.vae is None:
            raise UserError(
                "the model learns latents: name a VAE (--vae MODEL), and encode the videos by "
                "train.encode or say how many clips the run encodes for itself (--cached-clips N)"
            )
        return dataclasses.replace(config, data=data)
    if config.cached_clips:
        raise UserError(f"{data.path} is encoded already: leave cached_clips out")
    return dataclasses.replace(config, data=dataclasses.replace(data, kind="cache"))


def _with_vae(config: DiTTrainConfig) -> DiTTrainConfig:
    if config.vae is None:
        return config
    vae = parts.stored_config(config.vae, FrameVAEConfig)
    dit = config.model.dit
    if (vae.num_tokens, vae.token_dim) != (dit.num_tokens, dit.channels):
        raise UserError(
            f"the VAE in {config.vae} makes {vae.num_tokens} tokens of {vae.token_dim} numbers for "
            f"a frame, the model {dit.num_tokens} of {dit.channels} (model.dit.num_tokens, "
            "model.dit.channels)"
        )
    return dataclasses.replace(config, frame_size=vae.image_size)


def make_stage(config: DiTTrainConfig) -> Stage:
    """Batches are `latents` float32 [b, f, l, c], `classes` int32 [b] and with `late_share` `known`
    int32 [b], the number of first frames that have no noise.
    """
    dit = config.model.dit
    shapes = {
        "latents": ((config.data.num_frames, dit.num_tokens, dit.channels), jnp.float32),
        "classes": ((), jnp.int32),
    }
    if config.late_share:
        shapes["known"] = ((), jnp.int32)
    return Stage(
        name="ar_diffusion_dit",
        config=config,
        create=lambda rngs: Denoiser(config.model, dtype=parts.compute_dtype(config), rngs=rngs),
        load=functools.partial(load, config),
        is_trained=lambda path, _: config.train_context or path[0] not in CONTEXTS,
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=lambda b: {
            name: jax.ShapeDtypeStruct((b, *shape), of) for name, (shape, of) in shapes.items()
        },
        export=functools.partial(export, config),
    )


def load(config: DiTTrainConfig) -> dict[Path, Array]:
    """The denoiser of `init`.

    Raises:
      UserError: There is none, or it is of other sizes than the config's.
    """
    if config.init is None:
        return {}
    folder = pathlib.Path(config.init) / "denoiser"
    make = lambda _, **types: Denoiser(config.model, **types)  # noqa: E731
    return parts.leaves(weights.load_module(folder, make, DenoiserConfig, on_host=True)[0])


def loss_fn(
    config: DiTTrainConfig, model: Denoiser, batch, keys: Array, *, deterministic: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Error of denoised clips; `first` and `last` are that of these frames, unweighted.

    Args:
      deterministic: Drop no context.
    """
    latents, classes = batch["latents"], batch["classes"]
    b, f = latents.shape[:2]
    time_keys, noise_keys, drop_keys = split(row_keys(keys, b), 3)
    steps = model.cfg.schedule.num_timesteps
    timesteps, clean = draw_timesteps(time_keys, config.timesteps, steps, f, b), None
    if config.late_share:
        clean = jnp.arange(f) < batch["known"][:, None]
        timesteps = jnp.where(clean, _told_when_done(config), timesteps)
        classes = jnp.where(batch["known"] > 0, -1, classes)
    noise = draw(jax.random.normal, noise_keys, latents.shape)
    if config.context_dropout and not deterministic:
        is_dropped = draw(jax.random.uniform, drop_keys, (b,)) < config.context_dropout
        classes = jnp.where(is_dropped, -1, classes)
    rise = config.frame_weight_rise
    return denoising_loss(
        model, latents, classes, timesteps, noise, frame_weight_rise=rise, clean=clean
    )


def _told_when_done(config: DiTTrainConfig) -> int:
    """The timestep that the sampler tells of frames that are done."""
    steps = config.model.schedule.num_timesteps
    return int(ddim_timesteps("uniform", config.sample_steps, steps)[0])


def denoising_loss(
    model: Denoiser,
    latents: Float[Array, "b f l c"],
    classes: Int[Array, " b"],
    timesteps: Int[Array, "b f"],
    noise: Float[Array, "b f l c"],
    *,
    frame_weight_rise: float = 0.0,
    clean: Bool[Array, "b f"] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss for given draws.

    Args:
      latents: Of any length.
      classes: -1 for the null context.
      clean: Frames that are seen without noise and do not count.
    """
    call = functools.partial(model, context=model.contexts(classes))
    f = latents.shape[1]
    rise = 1 + frame_weight_rise * jnp.arange(f) / f if frame_weight_rise else None
    loss, metrics = diffusion_loss(
        call, model.cfg.schedule, unit(latents), timesteps, noise, frame_weights=rise, clean=clean
    )
    counted = jnp.ones(latents.shape[:2]) if clean is None else ~clean
    errors = jnp.sum(counted * metrics["loss_per_frame"], axis=0)
    of_frames = errors / jnp.maximum(counted.sum(axis=0), 1)
    return loss, {"first": of_frames[0], "last": of_frames[-1]}


def load_vae(config: DiTTrainConfig) -> FrameVAE:
    """The frozen VAE, in the type of the run.

    Raises:
      UserError: There is none, or the config names none.
    """
    if config.vae is None:
        raise UserError("no VAE: name the `model` folder of a run of train.ar_diffusion_vae")
    return weights.load_module(
        config.vae, FrameVAE, FrameVAEConfig, dtype=parts.compute_dtype(config), on_host=True
    )[0]


def encode(vae: FrameVAE, video: UInt8[Array, "b f h w 3"]) -> Float[Array, "b f l c"]:
    """What is kept of clips: means of their latents, float32, of any length."""
    return vae.encode(to_unit(video)).astype(jnp.float32)


def show(vae: FrameVAE, latents: Float[Array, "b f l c"]) -> UInt8[Array, "b f h w 3"]:
    """Clips of latents."""
    return from_unit(vae.decode(latents).astype(jnp.float32))


def generate(
    config: DiTTrainConfig, model: Denoiser, classes: Int[Array, " b"]
) -> Float[Array, "b f l c"]:
    """Latents of one window for each class, from fixed noise."""
    cfg, (b,), scale = model.cfg, classes.shape, config.sample_guidance
    steps = ddim_timesteps("uniform", config.sample_steps, cfg.schedule.num_timesteps)
    sampler = AsynchronousDDIM(schedule=cfg.schedule, timesteps=tuple(map(int, steps)))
    f = cfg.dit.num_frames
    frames = frame_schedule(f, len(steps), config.sample_lag, window=f)
    branches, within = [model.contexts(classes)], sampler.told(config.sample_guidance_interval)
    if scale != 1:
        branches.append(model.contexts(jnp.full_like(classes, -1)))
    denoise = guided_frames(model, branches, scale, within)
    keys = row_keys(stream(0, "sheet"), b)
    x = per_sample_normal(keys, 0, (f, cfg.dit.num_tokens, cfg.dit.channels))
    return sample_frames(denoise, sampler, x, frames)[0]


def export(config: DiTTrainConfig, model: Denoiser, folder: pathlib.Path) -> None:
    """Writes `denoiser`, and where the VAE is known all that a pipeline loads."""
    weights.save_module(folder / "denoiser", model, config.model)
    if config.vae is None:
        return
    vae = load_vae(config)
    origin = weights.read_metadata(config.vae)
    weights.save_module(folder / "vae", vae, vae.cfg, metadata=origin)
    pipeline = ARDiffusionConfig(
        fps=config.data.fps or ARDiffusionConfig.fps,
        class_names=config.class_names,
        prompt_windows="first" if config.late_share else "all",
        sampling=FrameSamplingConfig(
            num_frames=config.data.num_frames,
            num_inference_steps=config.sample_steps,
            guidance_scale=config.sample_guidance,
            guidance_interval=config.sample_guidance_interval,
            lag=config.sample_lag,
        ),
    )
    config_lib.to_json(pipeline, folder / weights.CONFIG_FILE)

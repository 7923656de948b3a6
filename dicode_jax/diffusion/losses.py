"""The denoising objective of DDPM-style training, with the terms of its latent-video descendants.

Ho et al., arXiv 2006.11239 (simple loss); variational weights as in latent diffusion; dynamic
rescale as in DynamiCrafter (arXiv 2310.12190); offset noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dicode_jax.diffusion.parameterization import add_noise, training_target
from dicode_jax.diffusion.schedules import NoiseSchedule, expand
from dicode_jax.nn.rngs import draw, split
from dicode_jax.typing import Array, Bool, Float, Int, typechecked

LOSS_TYPES = ("l2", "l1")


@typechecked
def per_sample_error(
    prediction: Float[Array, " b *rest"], target: Float[Array, " b *rest"], loss_type: str = "l2"
) -> Float[Array, " b"]:
    """Mean squared ("l2") or absolute ("l1") error over all axes but the first, in float32.

    Args:
        prediction, target: ``[b, ...]``.

    Returns:
        float32 ``[b]``.

    Raises:
        ValueError: unknown ``loss_type``.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss type {loss_type!r}; use one of {LOSS_TYPES}")
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    error = jnp.square(difference) if loss_type == "l2" else jnp.abs(difference)
    return error.reshape(error.shape[0], -1).mean(axis=-1)


@typechecked
def apply_dynamic_rescale(
    schedule: NoiseSchedule,
    latents: Float[Array, " b *rest"],
    timesteps: Int[Array, " b"] | Int[Array, "b f"],
) -> Float[Array, " b *rest"]:
    """Multiply clean latents by the schedule's factor at ``timesteps``; identity when it is off."""
    if schedule.base_scale is None:
        return latents
    return latents * schedule.gather("scale_array", timesteps, latents.ndim)


@typechecked
def add_offset_noise(
    noise: Float[Array, "b f h w c"], offset: Float[Array, "b f 1 1 c"], strength: float | int
) -> Float[Array, "b f h w c"]:
    """``noise + strength offset``: noise that is constant over space moves the mean brightness.

    Args:
        noise: ``[b, f, h, w, c]``.
        offset: standard normal ``[b, f, 1, 1, c]``.
        strength: 0 leaves the noise unchanged.
    """
    return noise + strength * offset


def sample_noise(key: Array, shape: tuple[int, ...], *, offset_strength: float = 0.0) -> Array:
    """Training noise of ``shape`` = ``[b, f, h, w, c]``, with offset noise when asked for.

    Args:
        key: one for the batch, or ``[b]``, one for each sample.
        shape: of the latents.
        offset_strength: see `add_offset_noise`.
    """
    noise_key, offset_key = split(key, 2)
    noise = draw(jax.random.normal, noise_key, shape)
    if offset_strength > 0:
        b, f, _, _, c = shape
        offset = draw(jax.random.normal, offset_key, (b, f, 1, 1, c))
        noise = add_offset_noise(noise, offset, offset_strength)
    return noise


@typechecked
def diffusion_loss(
    denoise: Callable[[Array, Array], Array],
    schedule: NoiseSchedule,
    latents: Float[Array, "b f *rest"],
    timesteps: Int[Array, " b"] | Int[Array, "b f"],
    noise: Float[Array, "b f *rest"],
    *,
    loss_type: str = "l2",
    simple_weight: float = 1.0,
    elbo_weight: float = 0.0,
    frame_weights: Float[Array, " f"] | None = None,
    sample_weights: Float[Array, " b"] | None = None,
    clean: Bool[Array, "b f"] | None = None,
    element_weights: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Noise the latents, run the network, and compare with its target.

    Args:
        denoise: ``(x_t, timesteps) -> prediction``, the shape of ``x_t``.
        schedule: settings of the process; decides the target and the dynamic rescale.
        latents: clean latents ``[b, f, ...]``, before the dynamic rescale.
        timesteps: int ``[b]`` or ``[b, f]`` in 0..num_timesteps-1.
        noise: the shape of ``latents``.
        loss_type: see `per_sample_error`.
        simple_weight, elbo_weight: weights of the plain and the variational term.
        frame_weights: what the error of each frame counts, in both terms; 1 when None.
        sample_weights: what the error of each sample counts, in both terms; 1 when None.
        clean: frames that the network gets without noise, and that do not count; not all of a
            sample. For the plain term alone.
        element_weights: what the error of each number counts, in both terms, of a shape that
            broadcasts to that of the latents; 1 when None.

    Returns:
        The scalar loss, and arrays: ``loss``, ``loss_simple``, ``loss_vlb`` (scalars),
        ``loss_per_sample`` ``[b]``, ``loss_per_frame`` ``[b, f]`` before its weights, ``x0``,
        ``x_t``, ``target``, ``prediction``.
    """
    x0 = apply_dynamic_rescale(schedule, latents, timesteps)
    x_t = add_noise(schedule, x0, noise, timesteps)
    target = training_target(schedule, x0, noise, timesteps)
    if clean is not None:
        x_t = jnp.where(expand(clean, x0.ndim), x0, x_t)
    prediction = denoise(x_t, timesteps)
    per_frame = _per_frame_error(prediction, target, loss_type, element_weights)
    if sample_weights is not None:
        per_frame = sample_weights[:, None] * per_frame
    weighted = per_frame if frame_weights is None else frame_weights * per_frame
    per_sample = jnp.mean(weighted, axis=1, where=None if clean is None else ~clean)
    simple = per_sample.mean()
    bound_weights = schedule.gather("lvlb_weights", timesteps, timesteps.ndim)
    vlb = (bound_weights * (per_sample if timesteps.ndim == 1 else weighted)).mean()
    loss = simple_weight * simple
    if elbo_weight:
        loss = loss + elbo_weight * vlb
    return loss, {
        "loss": loss,
        "loss_simple": simple,
        "loss_vlb": vlb,
        "loss_per_sample": per_sample,
        "loss_per_frame": per_frame,
        "x0": x0,
        "x_t": x_t,
        "target": target,
        "prediction": prediction,
    }


def _per_frame_error(
    prediction: Array, target: Array, loss_type: str, weights: Array | None = None
) -> Array:
    """`per_sample_error` of each frame, ``[b, f]``."""
    if weights is not None:  # of the errors, squared or not
        scale = jnp.sqrt(weights) if loss_type == "l2" else weights
        prediction, target = scale * prediction, scale * target
    b, f = prediction.shape[:2]
    flat = (b * f, *prediction.shape[2:])
    error = per_sample_error(prediction.reshape(flat), target.reshape(flat), loss_type)
    return error.reshape(b, f)

"""Videos whose frames are denoised one after the other, in a window that moves with them."""

from typing import Any

import jax
import jax.numpy as jnp

from dicode_jax.diffusion.frame_schedule import FrameSchedule
from dicode_jax.diffusion.parameterization import add_noise
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import Denoise, sample
from dicode_jax.typing import Array


def sample_frames(
    denoise: Denoise,
    sampler: AsynchronousDDIM,
    x: Array,
    frames: FrameSchedule,
    *,
    given: Array | None = None,
    history_noise: int = 0,
    history: Array | None = None,
    return_trajectory: bool = False,
) -> tuple[Array, Any]:
    """Runs all rows of a schedule in one scan. Pure; jit it with the schedule closed over.

    Args:
        denoise: the guided model, on a window of frames.
        sampler: the update rule.
        x: noise ``[b, f, ...]``.
        frames: which frame moves when; it is checked.
        given: clean frames in front, ``[b, g, ...]``; they come back as they are.
        history_noise: timestep of the noise under which the network sees the given frames; 0 shows
            them as they are.
        history: that noise, ``[b, g, ...]``.
        return_trajectory: also return the state after every row.

    Returns:
        The frames, of the shape and dtype of ``x``, and None or the states, ``[rows, b, f, ...]``.

    Raises:
        UserError: a frame would have to move outside of the window.
    """
    frames.check()
    denoise = windowed(denoise, frames)
    if given is not None:
        x = x.at[:, : given.shape[1]].set(given.astype(x.dtype))
        if history_noise:
            times = jnp.full(given.shape[:2], history_noise, jnp.int32)
            shown = add_noise(sampler.schedule, given.astype(jnp.float32), history, times)
            denoise = _shown(denoise, shown, times)
    return sample(denoise, sampler, x, frames.steps, return_trajectory=return_trajectory)


def windowed(denoise: Denoise, frames: FrameSchedule) -> Denoise:
    """A model of windows as one of whole videos, which says nothing of frames outside."""
    starts, size = jnp.asarray(frames.starts), frames.window

    def call(x, times, step):
        if size == x.shape[1]:
            return denoise(x, times, step)
        at = starts[step]
        part, told = (jax.lax.dynamic_slice_in_dim(a, at, size, axis=1) for a in (x, times))
        seen = denoise(part, told, step)
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros(x.shape, seen.dtype), seen, at, 1)

    return call


def _shown(denoise: Denoise, frames: Array, times: Array) -> Denoise:
    """The model with other frames and timesteps in front."""

    def call(x, told, step):
        g = frames.shape[1]
        x = x.at[:, :g].set(frames.astype(x.dtype))
        return denoise(x, told.at[:, :g].set(times.astype(told.dtype)), step)

    return call

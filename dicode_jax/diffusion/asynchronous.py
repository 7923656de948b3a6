"""Videos whose frames are denoised one after the other, in a window that moves with them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.frame_schedule import FrameSchedule
from dicode_jax.diffusion.parameterization import add_noise
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import Denoise, State
from dicode_jax.typing import Array, PyTree


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
        ValueError: there is a timestep of history, and no noise.
    """
    if given is not None:
        x = x.at[:, : given.shape[1]].set(given.astype(x.dtype))
    shown = None
    if given is not None and history_noise:
        if history is None:
            raise ValueError("history_noise needs history, the noise of the given frames")
        times = jnp.full(given.shape[:2], history_noise, jnp.int32)
        shown = add_noise(sampler.schedule, given.astype(jnp.float32), history, times), times
    rows = row_tables(sampler, frames)
    return run_rows(denoise, sampler, x, rows, frames.window, shown=shown, keep=return_trajectory)


def row_tables(sampler: AsynchronousDDIM, frames: FrameSchedule) -> PyTree:
    """All that changes from row to row, arrays of numpy ``[rows, ...]``; cut them as you like.

    Raises:
        UserError: a frame would have to move outside of the window.
    """
    frames.check()
    times, coefficients = sampler.coefficients(frames.steps[:, None])
    return np.arange(len(times), dtype=np.int32), frames.starts, times, coefficients


def run_rows(
    denoise: Denoise,
    sampler: AsynchronousDDIM,
    x: Array,
    rows: PyTree,
    window: int,
    *,
    shown: tuple[Array, Array] | None = None,
    keep: bool = False,
) -> tuple[Array, Any]:
    """One ``lax.scan`` over rows of `row_tables`, which may be traced.

    Args:
        denoise: the guided model; it is given ``window`` frames.
        sampler: the update rule.
        x: ``[b, f, ...]``, the frames as they are before the first of the rows.
        rows: a run of rows.
        window: frames that the network sees.
        shown: frames ``[b, g, ...]`` and timesteps ``[b, g]`` that the network gets to see in
            place of the first ones.
        keep: also return the state after every row.
    """
    b, f = x.shape[:2]

    def predict(x, times, step, at):
        if shown is not None:
            g = shown[0].shape[1]
            x = x.at[:, :g].set(shown[0].astype(x.dtype))
            times = times.at[:, :g].set(shown[1].astype(times.dtype))
        if window == f:
            return denoise(x, times, step)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, window, axis=1)  # noqa: E731
        seen = denoise(cut(x), cut(times), step)
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros(x.shape, seen.dtype), seen, at, 1)

    def body(state: State, row):
        step, at, times, coefficients = row
        prediction = predict(state.x, jnp.broadcast_to(times, (b, f)), step, at)
        state = sampler.step(state, prediction, coefficients, None)
        state = state._replace(x=state.x.astype(x.dtype))
        return state, (state if keep else None)

    state, states = jax.lax.scan(body, sampler.init(x), jax.tree.map(jnp.asarray, rows))
    return state.x, states

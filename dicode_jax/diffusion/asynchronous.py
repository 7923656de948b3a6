"""Videos whose frames are denoised one after the other, in a window that moves with them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.frame_schedule import FrameSchedule
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousCoefficients, AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import Denoise, State, between
from dicode_jax.typing import Array


class Rows(NamedTuple):
    """A run of rows, every array `[rows, ...]`; frames are counted from the first that is held.

    Attributes:
        index: number of the row in the whole run.
        start: first frame that the network sees.
        times: what it is told of each frame, ``[rows, 1, f]``.
        signal, spread: factors of frame and noise in what it sees, ``[rows, 1, f]``.
        coefficients: of the sampler.
    """

    index: np.ndarray
    start: np.ndarray
    times: np.ndarray
    signal: np.ndarray
    spread: np.ndarray
    coefficients: AsynchronousCoefficients


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
        history_noise: timestep of the noise under which the network sees frames that are done,
            given ones among them; 0 shows them as they are.
        history: that noise, of the shape of ``x``.
        return_trajectory: also return the state after every row.

    Returns:
        The frames, of the shape and dtype of ``x``, and None or the states, ``[rows, b, f, ...]``.

    Raises:
        UserError: a frame would have to move outside of the window.
        ValueError: there is a timestep of history, and no noise.
    """
    if history_noise and history is None:
        raise ValueError("history_noise needs history, the noise of the frames that are done")
    if given is not None:
        x = x.at[:, : given.shape[1]].set(given.astype(x.dtype))
    rows = row_tables(sampler, frames.check(), history_noise=history_noise)
    return run_rows(
        denoise, sampler, x, rows, frames.window, history=history, keep=return_trajectory
    )


def row_tables(
    sampler: AsynchronousDDIM,
    frames: FrameSchedule,
    part: tuple[int, int] | None = None,
    *,
    first: int = 0,
    held: int | None = None,
    length: int | None = None,
    history_noise: int = 0,
) -> Rows:
    """All that changes from row to row, arrays of numpy.

    Args:
        sampler: the update rule.
        frames: which frame moves when; it was checked.
        part: the first row and that behind the last; None for all.
        first: the first frame that is held.
        held: how many are; None for all.
        length: rows of the tables, which others fill up that are not to be run.
        history_noise: see `sample_frames`.
    """
    start, stop = part or (0, frames.num_rows)
    held = frames.num_frames if held is None else held
    length = stop - start if length is None else length
    rows = np.arange(start, start + length + 1)
    steps = frames.steps_at(rows[:, None], first + np.arange(held))
    times, coefficients = sampler.coefficients(steps[:, None])
    is_done = (steps[:-1, None] == frames.num_steps) & (history_noise > 0)
    level = sampler.schedule.alphas_cumprod64[history_noise]
    return Rows(
        index=rows[:-1].astype(np.int32),
        start=frames.starts_at(rows[:-1]) - np.int32(first),
        times=np.where(is_done, history_noise, times).astype(np.int32),
        signal=np.where(is_done, np.sqrt(level), 1).astype(np.float32),
        spread=np.where(is_done, np.sqrt(1 - level), 0).astype(np.float32),
        coefficients=coefficients,
    )


def run_rows(
    denoise: Denoise,
    sampler: AsynchronousDDIM,
    x: Array,
    rows: Rows,
    window: int,
    *,
    history: Array | None = None,
    keep: bool = False,
    part: tuple[Array, Array] | None = None,
) -> tuple[Array, Any]:
    """One loop over rows, which may be traced.

    Args:
        denoise: the guided model; it is given ``window`` frames.
        sampler: the update rule.
        x: ``[b, f, ...]``, the frames that are held, as they are before the first of the rows.
        rows: of `row_tables`.
        window: frames that the network sees.
        history: noise on what it sees of frames that are done, of the shape of ``x``; None where
            there is none on any.
        keep: also return the state after every row.
        part: the first row of the tables that is run and that behind the last, which may be traced;
            None for all of them.
    """
    b, f = x.shape[:2]

    def predict(x, row: Rows):
        times = jnp.broadcast_to(row.times, (b, f))
        if history is not None:
            signal, spread = (
                jnp.expand_dims(a, tuple(range(2, x.ndim))) for a in (row.signal, row.spread)
            )
            x = (signal * x + spread * history).astype(x.dtype)
        if window == f:
            return denoise(x, times, row.index)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, row.start, window, axis=1)  # noqa: E731
        seen = denoise(cut(x), cut(times), row.index)
        whole = jnp.zeros(x.shape, seen.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, seen, row.start, 1)

    def body(state: State, row: Rows):
        state = sampler.step(state, predict(state.x, row), row.coefficients, None)
        return state._replace(x=state.x.astype(x.dtype))

    def keeping(state: State, row: Rows):
        state = body(state, row)
        return state, (state if keep else None)

    if part is not None:
        return between(body, sampler.init(x), rows, *part).x, None
    state, states = jax.lax.scan(keeping, sampler.init(x), jax.tree.map(jnp.asarray, rows))
    return state.x, states

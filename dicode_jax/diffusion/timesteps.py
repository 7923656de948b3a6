"""Timesteps of training clips, `[b, f]`: one for all frames, one each, or one each in order.

In order means that no frame is less noisy than the one before it. Two ways to draw such a path
(AR-Diffusion, arXiv 2503.07418, section 3.3): "uniform_paths" gives all the same chance, by which
early frames are almost never noisy; "fopp" draws one frame and its timestep evenly, and then one of
all paths through that point, so that every timestep of every frame has at least 1 / (f K).

The number of paths of r frames in 0 .. t is C(t + r, r), and so are the sums over one frame of
them. A frame is therefore drawn by one comparison with a row of that table: of its logarithms under
`jit`, as float32 loses the ratios of counts beyond 1e32, of float64 on the host.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.nn.rngs import split
from dicode_jax.typing import Array, Int

MODES = ("fopp", "uniform_paths", "independent", "shared")


def path_counts(num_timesteps: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Paths from a point to the last frame, and from the first frame to it, float64 `[K, f]`.

    Raises:
        ValueError: there are more than a float64 holds.
    """
    k, f = num_timesteps, num_frames
    try:
        float(math.comb(k + f - 2, f - 1))  # the most of all, before the others are counted
    except OverflowError:
        raise ValueError(
            f"there are more paths of {num_frames} frames than a float64 holds; use fewer frames"
        ) from None
    ends = np.array([[math.comb(t + i, i) for i in range(f)] for t in range(k)], dtype=np.float64)
    return ends[::-1, ::-1], ends


def marginals(mode: str, num_timesteps: int, num_frames: int) -> np.ndarray:
    """The exact chance of every timestep in every frame, float64 `[f, K]`.

    Raises:
        ValueError: the mode has no such name.
    """
    check_mode(mode)
    k = num_timesteps
    if mode in ("independent", "shared"):
        return np.full((num_frames, k), 1 / k)
    starts, ends = path_counts(k, num_frames)
    if mode == "uniform_paths":
        return (starts * ends / starts[:, 0].sum()).T
    forward = np.full((num_frames, k), 1 / k)  # with the drawn frame at or before each
    backward = forward.copy()
    for f in range(1, num_frames):
        reached = np.cumsum(forward[f - 1] / starts[:, f - 1])
        forward[f] += starts[:, f] * reached
    for f in range(num_frames - 2, -1, -1):
        reached = np.cumsum((backward[f + 1] / ends[:, f + 1])[::-1])[::-1]
        backward[f] += ends[:, f] * reached
    return (forward + backward - 1 / k) / num_frames


@functools.partial(jax.jit, static_argnames=("mode", "num_timesteps", "num_frames", "batch"))
def draw_timesteps(
    key: Array, mode: str, num_timesteps: int, num_frames: int, batch: int
) -> Int[Array, "b f"]:
    """Draws timesteps in 0 .. num_timesteps - 1.

    Args:
        key: one for the batch, or ``[b]``, one for each clip.
        mode: one of `MODES`.
        num_timesteps: length of the training schedule.
        num_frames: frames of a clip.
        batch: clips.

    Raises:
        ValueError: the mode has no such name.
    """
    check_mode(mode)
    keys = key if key.ndim else split(key, batch)
    draw = functools.partial(_draw_one, mode=mode, k=num_timesteps, f=num_frames)
    return jax.vmap(draw)(keys)


def _draw_one(key: Array, mode: str, k: int, f: int) -> Array:
    """Timesteps of one clip, int32 `[f]`."""
    if mode in ("independent", "shared"):
        count = f if mode == "independent" else 1
        return jnp.broadcast_to(jax.random.randint(key, (count,), 0, k), (f,))
    frame_key, time_key, below_key, above_key = jax.random.split(key, 4)
    if mode == "fopp":
        pivot = jax.random.randint(frame_key, (), 0, f)
        time = jax.random.randint(time_key, (), 0, k)
    else:  # in front of the first frame, from where every path is open
        pivot, time = jnp.int32(-1), jnp.int32(0)
    logs = jnp.asarray(_log_counts(k, f))  # [f + 1, k]
    uniform = lambda key: jnp.log1p(-jax.random.uniform(key, (f,)))  # noqa: E731  (0, 1]

    def drawn(time, count, log_u):
        """A timestep in 0 .. time, when `count` frames, this one among them, end there."""
        return jnp.sum(logs[count] < logs[count, time] + log_u, dtype=jnp.int32)

    def backward(later, inputs):
        frame, log_u = inputs
        time = jnp.where(frame < pivot, drawn(later, frame + 1, log_u), later)
        return time, time

    def forward(earlier, inputs):  # the same, seen from the end of the clip
        frame, log_u = inputs
        up = k - 1 - drawn(k - 1 - earlier, f - frame, log_u)
        time = jnp.where(frame > pivot, up, earlier)
        return time, time

    frames = jnp.arange(f, dtype=jnp.int32)
    _, below = jax.lax.scan(backward, time, (frames, uniform(below_key)), reverse=True)
    _, above = jax.lax.scan(forward, time, (frames, uniform(above_key)))
    return jnp.where(frames <= pivot, below, above)


@functools.cache
def _log_counts(num_timesteps: int, num_frames: int) -> np.ndarray:
    """Logarithms of C(t + r, r), float32 `[f + 1, K]`."""
    r, t = np.arange(num_frames + 1)[:, None], np.arange(num_timesteps)[None]
    steps = np.log1p(t / np.maximum(np.arange(1, num_frames + 1)[:, None], 1))  # log((t + r) / r)
    logs = np.concatenate([np.zeros_like(t, np.float64), np.cumsum(steps, axis=0)])
    return np.where(r > 0, logs, 0.0).astype(np.float32)


class HostPaths:
    """Paths drawn one by one with NumPy's old generator, in the order of the original.

    Args:
        num_timesteps: length of the training schedule.
        num_frames: frames of a clip.
    """

    def __init__(self, num_timesteps: int, num_frames: int):
        self.num_timesteps, self.num_frames = num_timesteps, num_frames
        self.starts, self.ends = path_counts(num_timesteps, num_frames)
        self._sums: dict[tuple[int, int, int, bool], np.ndarray] = {}

    def draw(self, mode: str, rng: np.random.RandomState) -> np.ndarray:
        """One path of "fopp" or "uniform_paths", int64 `[f]`."""
        path = np.zeros(self.num_frames, np.int64)
        if mode == "fopp":
            pivot, path_at = rng.randint(0, self.num_frames), rng.randint(0, self.num_timesteps)
            path[pivot] = path_at
        else:
            pivot, path[0] = 0, self._pick(rng, self.starts, 0, 0, self.num_timesteps)
        for f in range(pivot - 1, -1, -1):
            path[f] = self._pick(rng, self.ends, f, 0, path[f + 1] + 1)
        for f in range(pivot + 1, self.num_frames):
            path[f] = self._pick(rng, self.starts, f, path[f - 1], self.num_timesteps)
        return path

    def _pick(self, rng, counts, frame: int, low: int, high: int) -> int:
        """One of low .. high - 1 with chances as the counts, as `RandomState.choice` picks it."""
        key = (frame, int(low), int(high), counts is self.starts)
        if key not in self._sums:
            weights = counts[low:high, frame]
            sums = np.cumsum(weights / weights.sum())
            self._sums[key] = sums / sums[-1]
        return int(low + np.searchsorted(self._sums[key], rng.random_sample(), side="right"))


def check_mode(mode: str) -> None:
    """Raises ValueError when it is none of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"timesteps must be one of {', '.join(MODES)}, got {mode!r}")

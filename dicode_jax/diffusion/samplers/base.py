"""The sampler protocol and the one loop, a ``lax.scan`` that knows neither model nor stepper.

The time grid is an argument, and a timestep may differ per frame. Randomness comes either as one
key per sample, from which step i uses ``fold_in(key, i)``, so that a sample does not depend on the
batch it is in, or as given arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.typing import Array

Denoise = Callable[[Array, Array], Array]
"""``(x [b, ...], timesteps [b] or [b, f]) -> prediction [b, ...]``, guidance included."""


class Sampler(Protocol):
    """One update rule. Implementations are frozen dataclasses of settings."""

    @property
    def is_stochastic(self) -> bool:
        """Whether `step` uses its noise; the loop draws none otherwise."""
        ...

    def coefficients(self, time_grid: np.ndarray) -> Any:
        """Everything `step` needs besides arrays: a pytree whose leaves lead with the step axis.

        Args:
            time_grid: int ``[steps + 1, ...]``, concrete (numpy).

        Raises:
            ValueError: the grid leaves the schedule or cannot be stepped.
        """
        ...

    def step(
        self, x: Array, prediction: Array, coefficients: Any, noise: Array | None
    ) -> tuple[Array, Array]:
        """From ``x`` at one grid point to the next; also the estimate of the clean sample."""
        ...


class Trajectory(NamedTuple):
    """States of a run, in sampling order.

    Attributes:
        x: after each step, ``[steps, b, ...]``.
        x0: clean-sample estimate of each step, ``[steps, b, ...]``.
    """

    x: Array
    x0: Array


def sample(
    denoise: Denoise,
    sampler: Sampler,
    x: Array,
    time_grid: np.ndarray,
    *,
    keys: Array | None = None,
    noise: Array | None = None,
    return_trajectory: bool = False,
    use_scan: bool = True,
) -> tuple[Array, Trajectory | None]:
    """Run a sampler from ``x`` along ``time_grid``. Pure; jit it with the grid closed over.

    Args:
        denoise: the guided model.
        sampler: the update rule.
        x: starting state ``[b, ...]`` (``[b, f, ...]`` when the grid is per frame).
        time_grid: int ``[steps + 1]``, ``[steps + 1, f]`` or ``[steps + 1, b, f]``, concrete.
        keys: one key per sample, ``[b]``.
        noise: noise for every step instead of keys, ``[steps, b, ...]``.
        return_trajectory: also return every intermediate state.
        use_scan: False runs the same steps in a Python loop, for a ``denoise`` that is compiled on
            its own; equal results.

    Returns:
        The final state (of the same shape and dtype as ``x``) and the trajectory or None.

    Raises:
        ValueError: a grid of the wrong shape, or a stochastic sampler without keys or noise.
    """
    grid = np.asarray(time_grid)
    if grid.ndim < 1 or grid.shape[0] < 2 or grid.ndim > 3:
        raise ValueError(f"a time grid has shape [steps + 1, ...], got {grid.shape}")
    num_steps, b = grid.shape[0] - 1, x.shape[0]
    if noise is not None and noise.shape != (num_steps, *x.shape):
        raise ValueError(f"noise must have shape {(num_steps, *x.shape)}, got {noise.shape}")
    if sampler.is_stochastic and keys is None and noise is None:
        raise ValueError("this sampler is stochastic: pass keys (one per sample) or noise")
    if keys is not None and keys.shape[:1] != (b,):
        raise ValueError(f"need one key per sample, shape ({b},), got {keys.shape}")
    if grid.ndim == 2:
        grid = np.broadcast_to(grid[:, None], (num_steps + 1, b, grid.shape[1]))

    def body(x, inputs):
        index, t, coefficients, given = inputs
        timesteps = jnp.broadcast_to(t, (b,)) if t.ndim == 0 else t
        step_noise = given
        if step_noise is None and sampler.is_stochastic:
            step_noise = per_sample_normal(keys, index, x.shape[1:])
        new_x, x0 = sampler.step(x, denoise(x, timesteps), coefficients, step_noise)
        new_x = new_x.astype(x.dtype)
        return new_x, (Trajectory(new_x, x0) if return_trajectory else None)

    steps = (
        jnp.arange(num_steps),
        jnp.asarray(grid[:-1], jnp.int32),
        jax.tree.map(jnp.asarray, sampler.coefficients(grid)),
        noise,
    )
    if use_scan:
        return jax.lax.scan(body, x, steps)
    states = []
    for index in range(num_steps):
        x, state = body(x, jax.tree.map(lambda leaf, i=index: leaf[i], steps))
        states.append(state)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def per_sample_normal(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 ``[b, *shape]`` from ``keys`` ``[b]``, each folded with ``index``."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)

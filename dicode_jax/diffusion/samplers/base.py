"""The sampler protocol and the one loop, a ``lax.scan`` that knows neither model nor sampler.

A sampler turns a time grid into what the network is told at each step and what the update needs
there; the two may differ, and both may differ per frame. Its state carries whatever it remembers.
Randomness comes either as one key per sample, from which step i uses ``fold_in(key, i)``, so that a
sample does not depend on the batch it is in, or as given arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.typing import Array

Denoise = Callable[..., Any]
"""``(x [b, ...], times [b] or [b, f], step) -> prediction [b, ...]``, guidance included.

``step`` counts from 0 and is traced, so that guidance may be a table with an entry for each step.
One that remembers takes its memory, a pytree, as a fourth argument, and gives it beside its result.
"""

Project = Callable[[Array, Array], Array]
"""``(x [b, ...], step) -> x`` with what is given put in its place; see `sample`."""


class State(NamedTuple):
    """What a sampler remembers; one that needs more has these two fields and others.

    Attributes:
        x: the noisy sample, ``[b, ...]``.
        x0: the last clean-sample estimate, float32 ``[b, ...]``; zeros before the first step.
    """

    x: Array
    x0: Array


class Sampler(Protocol):
    """One update rule. Implementations are frozen dataclasses of settings."""

    @property
    def is_stochastic(self) -> bool:
        """Whether `step` may use its noise; the loop draws none otherwise."""
        ...

    def coefficients(self, time_grid: np.ndarray) -> tuple[np.ndarray, Any]:
        """What the network is told, and everything `step` needs besides arrays.

        Args:
            time_grid: ``[steps + 1, ...]``, concrete (numpy).

        Returns:
            Network times ``[steps]`` or ``[steps, b, f]``, and a pytree whose leaves lead with the
            step axis.

        Raises:
            ValueError: the grid leaves the schedule or cannot be stepped.
        """
        ...

    def init(self, x: Array) -> Any:
        """The state in front of the first step."""
        ...

    def step(self, state: Any, prediction: Array, coefficients: Any, noise: Array | None) -> Any:
        """The state at the next grid point; ``noise`` is None where there is none to add."""
        ...


def initial_state(x: Array) -> State:
    """The state of a sampler that remembers no more than `State`."""
    return State(x, jnp.zeros(x.shape, jnp.float32))


def sample(
    denoise: Denoise,
    sampler: Sampler,
    x: Array,
    time_grid: np.ndarray,
    *,
    keys: Array | None = None,
    noise: Array | None = None,
    project: Project | None = None,
    memory: Any = None,
    return_trajectory: bool = False,
    use_scan: bool = True,
) -> tuple[Array, Any]:
    """Run a sampler from ``x`` along ``time_grid``. Pure; jit it with the grid closed over.

    Args:
        denoise: the guided model.
        sampler: the update rule.
        x: starting sample ``[b, ...]`` (``[b, f, ...]`` when the grid is per frame).
        time_grid: ``[steps + 1]``, ``[steps + 1, f]`` or ``[steps + 1, b, f]``, concrete.
        keys: one key per sample, ``[b]``.
        noise: noise for every step instead of keys, ``[steps, b, ...]``.
        project: puts in what is given (frames that are known): before step i as ``(x, i)``, and
            after the last as ``(x, steps)``.
        memory: what ``denoise`` remembers, in front of the first step; None where it does not.
        return_trajectory: also return every intermediate state.
        use_scan: False runs the same steps in a Python loop, for a ``denoise`` that is compiled on
            its own; equal results.

    Returns:
        The final sample (of the same shape and dtype as ``x``), and None or the state after each
        step, every array ``[steps, b, ...]``.

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

    def body(carry, inputs):
        (state, memory), (step, t, coefficients, step_noise) = carry, inputs
        if project is not None:
            state = state._replace(x=project(state.x, step))
        if step_noise is None and sampler.is_stochastic and keys is not None:
            step_noise = per_sample_normal(keys, step, x.shape[1:])
        times = jnp.broadcast_to(t, (b,)) if t.ndim == 0 else t
        if memory is None:
            prediction = denoise(state.x, times, step)
        else:
            prediction, memory = denoise(state.x, times, step, memory)
        state = sampler.step(state, prediction, coefficients, step_noise)
        state = state._replace(x=state.x.astype(x.dtype))
        return (state, memory), (state if return_trajectory else None)

    times, coefficients = sampler.coefficients(grid)
    steps = jax.tree.map(jnp.asarray, (np.arange(num_steps), times, coefficients, noise))
    carry = sampler.init(x), memory
    if use_scan:
        carry, trajectory = jax.lax.scan(body, carry, steps)
    else:
        states = []
        for index in range(num_steps):
            carry, kept = body(carry, jax.tree.map(lambda leaf, i=index: leaf[i], steps))
            states.append(kept)
        trajectory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    state, _ = carry
    return (state.x if project is None else project(state.x, num_steps)), trajectory


def per_sample_normal(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 ``[b, *shape]`` from ``keys`` ``[b]``, each folded with ``index``."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)

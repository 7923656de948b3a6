"""The sampler protocol and the one loop, which knows neither model nor sampler.

`Steps` are all steps of a loop. They are taken at once, or some at a time: how many is an argument
of the compiled program, so that any number of them is the same program and gives the same bits.

A sampler turns a time grid into what the network is told at each step and what the update needs
there; the two may differ, and both may differ per frame. Its state carries whatever it remembers.
Randomness comes either as one key per sample, from which step i uses ``fold_in(key, i)``, so that a
sample does not depend on the batch it is in, or as given arrays.
"""

import dataclasses
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

Project = Callable[[Array, Any], Array]
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


class Carry(NamedTuple):
    """What goes from step to step.

    Attributes:
        state: of the sampler.
        memory: what the model remembers, a pytree; None where it does not.
    """

    state: Any
    memory: Any = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a sampling, `make_steps` makes them. Pure; for use under a ``jit``.

    Attributes:
        sampler: the update rule.
        body: ``(carry, tables of a step) -> carry``.
        tables: what changes from step to step, arrays ``[steps, ...]``.
        project: see `make_steps`.
        remember: makes what the model remembers in front of the first step, of the sample.
    """

    sampler: Sampler
    body: Callable[[Carry, Any], Carry]
    tables: Any
    project: Project | None = None
    remember: Callable[[Array], Any] | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return jax.tree.leaves(self.tables)[0].shape[0]

    def begin(self, x: Array, memory: Any = None) -> Carry:
        """What goes into the first step.

        Args:
            x: starting sample ``[b, ...]``.
            memory: what the model remembers; None for what `remember` makes.
        """
        if memory is None and self.remember is not None:
            memory = self.remember(x)
        return Carry(self.sampler.init(x), memory)

    def advance(self, carry: Carry, start: Array, stop: Array) -> Carry:
        """Takes the steps from ``start`` to the one before ``stop``, which may be traced."""
        return between(self.body, carry, self.tables, start, stop)

    def scan(self, carry: Carry, *, keep: bool = False) -> tuple[Carry, Any]:
        """Takes all steps in one ``lax.scan``; ``keep`` also gives the states behind each."""

        def body(carry, tables):
            carry = self.body(carry, tables)
            return carry, (carry.state if keep else None)

        return jax.lax.scan(body, carry, self.tables)

    def finish(self, carry: Carry) -> Array:
        """The sample behind the last step."""
        x = carry.state.x
        return x if self.project is None else self.project(x, self.count)


def between(body: Callable[[Any, Any], Any], carry: Any, tables: Any, start: Any, stop: Any) -> Any:
    """The body's result for the rows of tables from ``start`` to the one before ``stop``.

    What ``lax.scan`` does with all of them; both numbers may be traced.
    """

    def turn(i, carry):
        return body(carry, jax.tree.map(lambda leaf: index(leaf, i, keepdims=False), tables))

    index = jax.lax.dynamic_index_in_dim
    tables = jax.tree.map(jnp.asarray, tables)
    start, stop = jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)
    return jax.lax.fori_loop(start, stop, turn, carry)


def make_steps(
    denoise: Denoise,
    sampler: Sampler,
    shape: tuple[int, ...],
    time_grid: np.ndarray,
    *,
    keys: Array | None = None,
    noise: Array | None = None,
    project: Project | None = None,
    remember: Callable[[Array], Any] | None = None,
) -> Steps:
    """The steps of a sampler along ``time_grid``.

    Args:
        denoise: the guided model.
        sampler: the update rule.
        shape: of the sample, ``[b, ...]`` (``[b, f, ...]`` when the grid is per frame).
        time_grid: ``[steps + 1]``, ``[steps + 1, f]`` or ``[steps + 1, b, f]``, concrete.
        keys: one key per sample, ``[b]``.
        noise: noise for every step instead of keys, ``[steps, b, ...]``.
        project: puts in what is given (frames that are known): before step i as ``(x, i)``, and
            after the last as ``(x, steps)``.
        remember: makes what ``denoise`` remembers in front of the first step, of the sample; None
            where it does not.

    Raises:
        ValueError: a grid of the wrong shape, or a stochastic sampler without keys or noise.
    """
    grid = np.asarray(time_grid)
    if grid.ndim < 1 or grid.shape[0] < 2 or grid.ndim > 3:
        raise ValueError(f"a time grid has shape [steps + 1, ...], got {grid.shape}")
    num_steps, b = grid.shape[0] - 1, shape[0]
    if noise is not None and noise.shape != (num_steps, *shape):
        raise ValueError(f"noise must have shape {(num_steps, *shape)}, got {noise.shape}")
    if sampler.is_stochastic and keys is None and noise is None:
        raise ValueError("this sampler is stochastic: pass keys (one per sample) or noise")
    if keys is not None and keys.shape[:1] != (b,):
        raise ValueError(f"need one key per sample, shape ({b},), got {keys.shape}")
    if grid.ndim == 2:
        grid = np.broadcast_to(grid[:, None], (num_steps + 1, b, grid.shape[1]))

    def body(carry: Carry, tables):
        (state, memory), (step, t, coefficients, step_noise) = carry, tables
        dtype = state.x.dtype
        if project is not None:
            state = state._replace(x=project(state.x, step))
        if step_noise is None and sampler.is_stochastic and keys is not None:
            step_noise = per_sample_normal(keys, step, shape[1:])
        times = jnp.broadcast_to(t, (b,)) if t.ndim == 0 else t
        if memory is None:
            prediction = denoise(state.x, times, step)
        else:
            prediction, memory = denoise(state.x, times, step, memory)
        state = sampler.step(state, prediction, coefficients, step_noise)
        return Carry(state._replace(x=state.x.astype(dtype)), memory)

    times, coefficients = sampler.coefficients(grid)
    tables = jax.tree.map(jnp.asarray, (np.arange(num_steps), times, coefficients, noise))
    return Steps(sampler, body, tables, project, remember)


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
        denoise, sampler, time_grid, keys, noise, project: see `make_steps`.
        x: starting sample ``[b, ...]`` (``[b, f, ...]`` when the grid is per frame).
        memory: what ``denoise`` remembers, in front of the first step; None where it does not.
        return_trajectory: also return every intermediate state.
        use_scan: False runs the same steps in a Python loop, for a ``denoise`` that is compiled on
            its own; equal results.

    Returns:
        The final sample (of the same shape and dtype as ``x``), and None or the state after each
        step, every array ``[steps, b, ...]``.

    Raises:
        ValueError: see `make_steps`.
    """
    steps = make_steps(
        denoise, sampler, x.shape, time_grid, keys=keys, noise=noise, project=project
    )
    return run_steps(steps, steps.begin(x, memory), return_trajectory, use_scan)


def run_steps(
    steps: Steps, carry: Carry, return_trajectory: bool = False, use_scan: bool = True
) -> tuple[Array, Any]:
    """Takes all steps; see `sample`."""
    if use_scan:
        carry, trajectory = steps.scan(carry, keep=return_trajectory)
        return steps.finish(carry), trajectory
    states = []
    for index in range(steps.count):
        carry = steps.body(carry, jax.tree.map(lambda leaf, i=index: leaf[i], steps.tables))
        states.append(carry.state if return_trajectory else None)
    trajectory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return steps.finish(carry), trajectory


def per_sample_normal(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 ``[b, *shape]`` from ``keys`` ``[b]``, each folded with ``index``."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)

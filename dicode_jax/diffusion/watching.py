"""Who is told of the steps of a sampling, and how many of them a call of its program takes.

A program that takes the steps from `start` to `stop`, both of which are arguments, is the same one
for any number of them and gives the same bits. Where nobody listens it takes all of them at once.
The host dispatches calls without waiting, and learns how far the device is from the small array
that each of them gives beside its result.
"""

import collections
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.samplers.base import Carry
from dicode_jax.errors import UserError
from dicode_jax.typing import Array

CALLS = 50  # at most for a clip: no bar shows more, and with fewer steps each is one of its own
AHEAD = 24  # calls under way: beyond 32 jax lets the host wait, and what it tells would come late

OnStep = Callable[[int, Any, dict[str, Array]], Mapping[str, Any] | None]
"""``(step, timestep, {"latents": [b, ...]}) -> None or {"latents": others of that shape}``"""

_Carry = TypeVar("_Carry", bound=Carry | Array)


class Taken(NamedTuple):
    """Steps that have been dispatched.

    Attributes:
        count: how many, of all clips.
        tick: there as soon as they have been taken.
    """

    count: int
    tick: Array


class Watch:
    """The listeners of a call, and how far it is.

    Args:
        progress: called as ``("steps", done, total)``; None for nobody.
        callback: see `OnStep`; None for nobody. It is called when the step is done, and before the
            next is dispatched, as that may have other latents.
    """

    def __init__(
        self,
        progress: Callable[[str, int, int], Any] | None = None,
        callback: OnStep | None = None,
    ):
        self._progress, self._callback = progress, callback
        self._done = self._total = 0
        self._held: collections.deque[Taken] = collections.deque()

    def expect(self, total: int) -> None:
        """Says how many steps there will be, of all clips."""
        self._total = total
        if self._progress is not None:
            self._progress("steps", 0, total)

    def parts(self, num_steps: int) -> list[tuple[int, int]]:
        """First step of each call, and that behind its last."""
        size = num_steps
        if self._callback is not None:
            size = 1
        elif self._progress is not None:
            size = -(-num_steps // CALLS)
        return [(i, min(i + size, num_steps)) for i in range(0, num_steps, size)]

    def ahead(self, num_steps: int) -> int:
        """Calls to dispatch before one is waited for: those of a clip, and what it ends with."""
        if self._callback is not None:
            return 0
        return 1 if self._progress is None else min(len(self.parts(num_steps)) + 1, AHEAD)

    def run(
        self,
        advance: Callable[[_Carry, np.int32, np.int32], tuple[_Carry, Array]],
        carry: _Carry,
        timesteps: Sequence[Any] | np.ndarray,
        clips: int = 1,
        first: int = 0,
    ) -> Generator[Taken, None, _Carry]:
        """Dispatches steps; gives news to `tell`, if anybody listens, and returns what they made.

        Args:
            advance: takes the steps from ``start`` to ``stop``; beside the carry it gives a tick.
            carry: in front of the first step: a `Carry`, or the latents alone.
            timesteps: what the network is told, one for each step.
            clips: that count, the first ones of the batch; others fill it up.
            first: number of the first step, for the callback.
        """
        for start, stop in self.parts(len(timesteps)):
            carry, tick = advance(carry, np.int32(start), np.int32(stop))
            if self._callback is not None:
                carry = self._ask(first + start, timesteps[start], carry, clips)
            if self._callback is not None or self._progress is not None:
                yield Taken((stop - start) * clips, tick)
        return carry

    def tell(self, taken: Taken) -> None:
        """Waits for steps, and says that they are taken."""
        taken.tick.block_until_ready()
        self._done += taken.count
        if self._progress is not None:
            self._progress("steps", self._done, self._total)

    def hold(self, taken: Taken, most: int = 2) -> None:
        """Tells of them later, when more than ``most`` are held, or by `settle`."""
        self._held.append(taken)
        while len(self._held) > most:
            self.tell(self._held.popleft())

    def drive(
        self,
        advance: Callable[[_Carry, np.int32, np.int32], tuple[_Carry, Array]],
        carry: _Carry,
        timesteps: Sequence[Any] | np.ndarray,
    ) -> _Carry:
        """`run`, whose news are told two steps late, so that the device has these to do."""

        def steps():
            nonlocal carry
            carry = yield from self.run(advance, carry, timesteps)

        for taken in steps():
            self.hold(taken)
        return carry

    def settle(self) -> None:
        """Tells of all that is held."""
        while self._held:
            self.tell(self._held.popleft())

    def _ask(self, step: int, timestep: Any, carry: _Carry, clips: int) -> _Carry:
        """What the callback makes of a step's result."""
        assert self._callback is not None
        x = carry.state.x if isinstance(carry, Carry) else carry
        x.block_until_ready()
        shown = x if clips == len(x) else x[:clips]
        if isinstance(timestep, np.generic):
            timestep = timestep.item()
        given = _latents(self._callback(step, timestep, {"latents": shown}), shown)
        if given is None:
            return carry
        new = given if clips == len(x) else jnp.concatenate([given, x[clips:]])
        if len(x.devices()) > 1:
            new = jax.device_put(new, x.sharding)
        if isinstance(carry, Carry):
            new = carry._replace(state=carry.state._replace(x=new))
        return cast(_Carry, new)


def _latents(answer: Any, x: Array) -> Array | None:
    """What a callback gives in place of latents.

    Raises:
        UserError: it is nothing of the kind.
    """
    if answer is None:
        return None
    if not isinstance(answer, Mapping) or (unknown := sorted(set(answer) - {"latents"}, key=str)):
        got = type(answer).__name__ if not isinstance(answer, Mapping) else f"also {unknown[0]!r}"
        raise UserError(
            f"callback_on_step_end gives None, or other latents as a dict with latents, got {got}"
        )
    new = answer.get("latents")
    if new is None or new is x:
        return None
    if np.shape(new) != x.shape:
        raise UserError(
            f"callback_on_step_end gave latents of shape {np.shape(new)}, want {x.shape}"
        )
    return jnp.asarray(new, x.dtype)

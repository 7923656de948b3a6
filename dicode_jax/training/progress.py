"""The progress bar of a run and its rates: steps, tokens, share of the devices' peak."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import jax
from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """Shows a run on process 0 and measures how fast it is.

    Time spent in `pause` does not count, nor does the first step, which is compiled.

    Args:
      name: What is trained.
      num_steps: Steps in all.
      step: Steps that are done already.
      units: What a step works off, by name: `{"tokens": 8192}` gives `tokens_per_second`.
      flops: Of one step over all devices, None when unknown.
      peak: FLOPs per second of all devices, None when unknown; with both there is `mfu`.
    """

    def __init__(
        self,
        name: str,
        num_steps: int,
        *,
        step: int = 0,
        units: Mapping[str, float] | None = None,
        flops: float | None = None,
        peak: float | None = None,
    ):
        self._units = dict(units or {})
        self._share = flops / peak if flops and peak else None  # seconds at the peak
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            desc=name,
            unit="step",
            mininterval=1.0,
            file=sys.stderr,
            disable=jax.process_index() != 0,
            dynamic_ncols=True,
        )
        self._since: float | None = None
        self._started, self._is_untold = time.perf_counter(), True
        self._steps = 0
        self._last: dict[str, float] = {}

    @property
    def is_new(self) -> bool:
        """Whether no step has been done yet by this process."""
        return self._since is None

    def compiling(self) -> None:
        """Says that the first step is compiled now, which may take minutes."""
        self._started = time.perf_counter()
        self.write("compiling the step")

    def compiled(self) -> None:
        """Says that it is, and that the first step is done; the second is measured from here."""
        self._since, self._steps = time.perf_counter(), -1
        self.write(f"compiled, and a first step done, in {self._since - self._started:.0f} s")

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Counts a step that is done."""
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._steps += 1
            if self._is_untold and self._steps == 1:
                self._is_untold = False
                self.write(f"a step takes {now - self._since:.3g} s")
        shown = {"loss": f"{metrics['loss']:.4g}", "lr": f"{metrics['lr']:.2g}"}
        shown["grad"] = f"{metrics['grad_norm']:.2g}"
        rates = self._last or self.rates()
        for unit in list(self._units)[:1]:
            if (name := f"{unit}_per_second") in rates:
                shown[f"{unit}/s"] = f"{rates[name]:.3g}"
        if "mfu" in rates:
            shown["mfu"] = f"{rates['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def rates(self) -> dict[str, float]:
        """Means since the last call, or since earlier ones if that was less than a second ago.

        Empty before two steps are done.
        """
        if self._since is None or not self._steps:
            return self._last
        seconds = time.perf_counter() - self._since
        pace = self._steps / seconds
        rates = {"steps_per_second": pace}
        rates |= {f"{name}_per_second": pace * count for name, count in self._units.items()}
        if self._share is not None:
            rates["mfu"] = pace * self._share
        if seconds >= 1.0:
            self._since, self._steps, self._last = time.perf_counter(), 0, rates
        return rates

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside out of the rates."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += time.perf_counter() - started

    def write(self, line: str) -> None:
        """Prints a line above the bar, on process 0."""
        if jax.process_index() == 0:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

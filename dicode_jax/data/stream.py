"""Endless batches through Grain, in an order that nothing but seed and batch size decides.

Batch n is examples n B to (n + 1) B - 1 of one seeded order over the data set, again and again, and
another order in each epoch. Process p of P gets rows p B / P to (p + 1) B / P of it. The number of
the next batch is therefore the whole state: a run goes on exactly with other numbers of processes
and workers.
"""

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast

import grain
import numpy as np

from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, ClipSource, Record, some
from dicode_jax.errors import UserError

__all__ = ["BatchStream", "Examples", "first_batches", "open_stream", "stream_examples"]

Example = Mapping[str, Any]
MakeExample = Callable[[int, np.random.Generator], Example]

_MAX_ATTEMPTS = 100  # broken examples in a row for one place in a batch
_MIN_READS = 100  # before which a share of broken examples says little

_log = logging.getLogger(__name__)


class BatchStream:
    """Batches of this process, one after the other, for ever.

    A broken example (`make_example` raises `BrokenRecord`) is replaced by another one that seed,
    place and number of the attempt decide; it is named once in the log, and counted.

    Args:
      make_example: `(index, generator) -> arrays by name`, of the same shapes for every index. The
        generator depends on seed, place in the order and attempt alone. With workers it must be
        picklable, and must not need a device.
      length: How many examples there are.
      names: The name of an example, by index: what `ids` show.
      batch_size: Examples per batch of all processes together.
      seed: Of the order and of the generators.
      shuffle: False keeps to the order of the data set.
      num_workers: Processes that make batches; 0 makes them in a thread of this one.
      prefetch: Batches that are made ahead.
      max_broken: Share of reads that may fail; 0 allows none.
      process_index, process_count: Which rows are this process's; None asks jax.

    Raises:
      UserError: There are no examples, or the batch does not divide among the processes.
    """

    def __init__(
        self,
        make_example: MakeExample,
        length: int,
        *,
        names: Callable[[int], str] | Sequence[str],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        prefetch: int = 2,
        max_broken: float = 0.1,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        if process_index is None or process_count is None:
            import jax

            process_index, process_count = jax.process_index(), jax.process_count()
        if length < 1:
            raise UserError("there are no examples to make batches of")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch_size {batch_size} does not divide among {process_count} processes"
            )
        rows, self.batch_size = batch_size // process_count, batch_size
        self._rows = _Rows(
            make_example=make_example,
            names=names if callable(names) else names.__getitem__,
            length=length,
            seed=seed,
            shuffle=shuffle,
            batch_size=batch_size,
            first_row=process_index * rows,
            num_rows=rows,
        )
        self._num_workers, self._prefetch = num_workers, prefetch
        self._max_broken = max_broken
        self._next_batch, self._broken = 0, {}
        self._iterator: Any = None

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: arrays [rows, ...] by name, and `ids`, an array of strings.

        Raises:
          UserError: More than `max_broken` of the reads have failed.
        """
        if self._iterator is None:
            self._iterator = self._start()
        try:
            made: _Made = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                "a worker process was killed; it may have run out of memory, or of shared memory "
                "(docker: --shm-size). Take fewer --data.num-workers or smaller batches"
            ) from error
        self._next_batch += 1
        for name, reason in made["broken"]:
            if name not in self._broken:
                _log.warning("left out: %s", reason)
            self._broken[name] = self._broken.get(name, 0) + 1
        if made["error"]:
            raise UserError(made["error"])
        self._check_broken()
        return made["arrays"] | {"ids": np.array(made["ids"])}

    def indices(self, count: int) -> np.ndarray:
        """Which examples come first on all processes together, broken ones not yet replaced."""
        order: Any = self._rows.order()
        return np.array([int(order[i]) for i in range(count)])

    def state(self) -> dict[str, Any]:
        """Where the stream is, ready for JSON: `next_batch`, and how often which name failed."""
        return {"next_batch": self._next_batch, "broken": dict(self._broken)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where a stream over the same data, seed and batch size said it was."""
        self.close()
        self._next_batch = int(state["next_batch"])
        self._broken = {str(name): int(count) for name, count in state["broken"].items()}

    def close(self) -> None:
        """Stops threads and workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self):
        rows = dataclasses.replace(self._rows, first_batch=self._next_batch)
        # Slices for workers are taken of whole batches, so that their number changes no batch.
        dataset = grain.MapDataset.source(cast(Sequence[_Made], rows))
        if not self._num_workers:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
            return iter(dataset.to_iter_dataset(options))
        _let_grain_start_workers()
        # No threads inside workers: a batch begun in one would only hold up the end.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return iter(
            dataset.to_iter_dataset(options).mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers,
                    per_worker_buffer_size=-(-self._prefetch // self._num_workers),
                ),
                worker_init_fn=_start_worker,
            )
        )

    def _check_broken(self) -> None:
        failed = sum(self._broken.values())
        reads = self._next_batch * self._rows.num_rows + failed
        enough = reads >= _MIN_READS or self._max_broken == 0
        if enough and failed > self._max_broken * reads:
            worst = sorted(self._broken, key=lambda name: -self._broken[name])
            raise UserError(
                f"{failed} of {reads} reads failed, more than max_broken={self._max_broken:g} "
                f"allows: {some(worst)}; mend or remove these files"
            )


def open_stream(
    source: ClipSource,
    read: Callable[[Record, np.random.Generator], Example],
    cfg: DataConfig,
    **options: Any,
) -> BatchStream:
    """Batches of what `read` makes of a record; otherwise as `stream_examples`."""
    return stream_examples(RecordExamples(source, read), cfg, **options)


class Examples(Protocol):
    """What batches are made of; called with an index and a generator it gives arrays by name."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, rng: np.random.Generator, /) -> Example: ...

    def name(self, index: int) -> str:
        """Name of an example."""
        ...


@dataclasses.dataclass(frozen=True)
class RecordExamples:
    """The examples that `read` makes of the records of a source."""

    source: ClipSource
    read: Callable[[Record, np.random.Generator], Example]

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Name of the record."""
        return self.source.name(index)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        return self.read(self.source.record(index), rng)


def stream_examples(examples: Examples, cfg: DataConfig, **options: Any) -> BatchStream:
    """Batches of examples with order, workers and limits of `cfg`.

    Args:
      options: `batch_size`, `seed`, `process_index` and `process_count` of `BatchStream`.
    """
    return BatchStream(
        examples,
        len(examples),
        names=examples.name,
        shuffle=cfg.shuffle,
        num_workers=cfg.num_workers,
        prefetch=cfg.prefetch,
        max_broken=cfg.max_broken,
        **options,
    )


def first_batches(
    examples: Examples, cfg: DataConfig, count: int, **options: Any
) -> list[dict[str, np.ndarray]]:
    """The first batches in the order of the data set, always the same, without their `ids`.

    They are whole unless `options` say which process reads.
    """
    options = {"process_index": 0, "process_count": 1} | options
    in_order = dataclasses.replace(cfg, shuffle=False, num_workers=0, prefetch=1)
    stream = stream_examples(examples, in_order, **options)
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return [{name: x for name, x in batch.items() if name != "ids"} for batch in batches]


class _Made(TypedDict):
    """What a worker hands over for one batch; Grain puts the arrays of a dict in shared memory."""

    arrays: dict[str, np.ndarray]
    ids: list[str]
    broken: list[tuple[str, str]]  # name and what is wrong with it
    error: str  # what stops the run, or ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """One process's part of every batch from `first_batch` on, by number."""

    make_example: MakeExample
    names: Callable[[int], str]
    length: int
    seed: int
    shuffle: bool
    batch_size: int
    first_row: int
    num_rows: int
    first_batch: int = 0

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size - self.first_batch

    def __getitem__(self, number: int) -> _Made:
        start = (self.first_batch + int(number)) * self.batch_size + self.first_row
        order = self.order()
        examples, ids, broken = [], [], []
        try:
            for position in range(start, start + self.num_rows):
                index, example = self._example(position, order, broken)
                examples.append(example)
                ids.append(self.names(index))
            arrays = _stack(examples, ids)
        except UserError as error:
            return _Made(arrays={}, ids=[], broken=broken, error=str(error))
        return _Made(arrays=arrays, ids=ids, broken=broken, error="")

    def order(self):
        order = grain.MapDataset.range(self.length)
        return (order.shuffle(seed=self.seed) if self.shuffle else order).repeat()

    def _example(self, position: int, order, broken: list) -> tuple[int, Example]:
        """The example at a place of the order, or the first that can be read in its stead."""
        for attempt in range(_MAX_ATTEMPTS):
            if attempt == 0:
                index, key = int(order[position]), (self.seed, position)
            else:
                key = (self.seed, position, attempt)
                index = int(np.random.default_rng((*key, 1)).integers(self.length))
            try:
                return index, self.make_example(index, np.random.default_rng(key))
            except BrokenRecord as error:
                broken.append((self.names(index), str(error)))
        raise UserError(
            f"{_MAX_ATTEMPTS} examples in a row cannot be read; the last one: {broken[-1][1]}"
        )


def _stack(examples: Sequence[Example], ids: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {}
    for name in examples[0]:
        rows = [np.asarray(example[name]) for example in examples]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            raise ValueError(f"{name} has shapes {sorted(shapes)} in one batch of {list(ids)}")
        arrays[name] = np.stack(rows)
    return arrays


def _start_worker(index: int, count: int) -> None:
    """Leaves signals to the main process and ends with it.

    Ctrl-C and schedulers signal whole groups of processes; the main one may still need batches to
    end in good order. When it is killed, nobody else would end its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    parent = multiprocessing.parent_process()
    assert parent is not None, "grain starts workers as processes"

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _let_grain_start_workers() -> None:
    """Grain reads absl's flags when it starts workers, which only absl's own main() parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

"""Training and held-out data of a run, read as its config says."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dicode_jax.data.examples import first_batches
from dicode_jax.data.records import ClipSource
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.stream import BatchStream, open_stream
from dicode_jax.runtime.sharding import batch_share, make_mesh
from dicode_jax.training.evaluate import Evaluation
from dicode_jax.training.stage import LossFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set's two sides.

    Attributes:
      train: Records to learn from.
      held_out: Records that no step sees; those of `train` when there are too few to keep any back.
    """

    train: ClipSource
    held_out: ClipSource


def open_splits(config: Any, *, images: bool = True) -> Splits:
    """Lists the data set of a run.

    Args:
      images: False leaves pictures out, of which no clip can be made.

    Raises:
      UserError: See `open_source`.
    """
    train = open_source(config.data, split="train", seed=config.seed, images=images)
    held_out = open_source(config.data, split="validation", seed=config.seed, images=images)
    if not len(held_out):
        say_nothing_is_held_out(config, len(train))
        held_out = train
    return Splits(train=train, held_out=held_out)


def say_nothing_is_held_out(config: Any, length: int) -> None:
    """Tells that what is called validation is none."""
    share = config.data.validation
    print(
        f"{config.data.path}: with --data.validation {share:g} none of {length} is held out; "
        "validation and samples are of training data",
        flush=True,
    )


def share(config: Any) -> tuple[int, int]:
    """Which share of a batch this process reads, and how many shares there are."""
    return batch_share(make_mesh(config.sharding))


def take(stream: BatchStream, count: int) -> list[dict[str, np.ndarray]]:
    """The next batches of a stream without their `ids`; closes it."""
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return [{name: x for name, x in batch.items() if name != "ids"} for batch in batches]


def train_stream(config: Any, source: ClipSource, read: Callable) -> BatchStream:
    """This process's part of the training batches."""
    index, count = share(config)
    return open_stream(
        source,
        read,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=index,
        process_count=count,
    )


def num_validated(config: Any, length: int) -> tuple[int, int]:
    """How many of `length` held-out examples are looked at, and in how many batches they lie."""
    count = min(config.validation_examples, length)
    return count, -(-count // config.batch_size)


def evaluation(config: Any, loss_fn: LossFn, source: ClipSource, read: Callable) -> Evaluation:
    """The run's `validation_examples`, always the same ones, and their loss."""
    count, num_batches = num_validated(config, len(source))
    batches = functools.partial(_held_out_batches, config, source, read, num_batches)
    return Evaluation(loss_fn, batches, count)


def _held_out_batches(
    config: Any, source: ClipSource, read: Callable, num_batches: int
) -> list[dict[str, np.ndarray]]:
    """This process's rows of the first batches."""
    index, count = share(config)
    return first_batches(
        source,
        read,
        config.data,
        num_batches,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=index,
        process_count=count,
    )


def held_out_examples(
    config: Any, source: ClipSource, read: Callable, count: int
) -> dict[str, np.ndarray]:
    """The first examples of a source, stacked, the same on every process; fewer if it has fewer."""
    count = min(count, len(source))
    return first_batches(source, read, config.data, 1, batch_size=count, seed=config.seed)[0]

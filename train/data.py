"""Training and held-out data of a run, read as its config says."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

from dicode_jax.data.examples import FrameReader, SpanReader
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.stream import (
    BatchStream,
    Examples,
    RecordExamples,
    first_batches,
    stream_examples,
)
from dicode_jax.errors import printable
from dicode_jax.runtime.sharding import batch_share, make_mesh
from dicode_jax.training.evaluate import Evaluation
from dicode_jax.training.stage import LossFn, Stage
from train import loop

Batch = Mapping[str, np.ndarray]
Sample = Callable[[nnx.Module, pathlib.Path, int], None]


_Examples = TypeVar("_Examples", bound=Examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits(Generic[_Examples]):
    """A data set's two sides.

    Attributes:
      train: Examples to learn from.
      held_out: Examples that no step sees; those of `train` when there are too few to keep any
        back.
    """

    train: _Examples
    held_out: _Examples


def open_splits(config: Any, read: Callable, *, images: bool = True) -> Splits[RecordExamples]:
    """Lists the data set of a run.

    Args:
      read: Makes an example of a record.
      images: False leaves pictures out, of which no clip can be made.

    Raises:
      UserError: See `open_source`.
    """
    options = {"seed": config.seed, "images": images}
    return make_splits(
        config, lambda split: RecordExamples(open_source(config.data, split=split, **options), read)
    )


def make_splits(config: Any, open_split: Callable[[Any], _Examples]) -> Splits[_Examples]:
    """Both sides of a data set; where nothing is held out, that is told.

    Args:
      open_split: Opens "train" or "validation".
    """
    train, held_out = map(open_split, ("train", "validation"))
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


def share(config: Any) -> dict[str, int]:
    """Which share of a batch this process reads, and how many shares there are."""
    index, count = batch_share(make_mesh(config.sharding))
    return {"process_index": index, "process_count": count}


def train_stream(config: Any, examples: Examples) -> BatchStream:
    """This process's part of the training batches."""
    options = {"batch_size": config.batch_size, "seed": config.seed, **share(config)}
    return stream_examples(examples, config.data, **options)


def evaluation(
    config: Any,
    loss_fn: LossFn,
    examples: Examples,
    encode: Callable[[Batch], Batch] = lambda batch: batch,
) -> Evaluation:
    """The loss of the run's `validation_examples`, the first ones always, once encoded."""
    count = min(config.validation_examples, len(examples))

    def batches() -> list[Batch]:
        """This process's rows of the first batches."""
        options = {"batch_size": config.batch_size, "seed": config.seed, **share(config)}
        num_batches = -(-count // config.batch_size)
        return [encode(x) for x in first_batches(examples, config.data, num_batches, **options)]

    return Evaluation(loss_fn, batches, count)


def held_out_examples(config: Any, examples: Examples, count: int) -> dict[str, np.ndarray]:
    """The first examples, stacked, the same on every process; fewer if there are fewer."""
    count = min(count, len(examples))
    return first_batches(examples, config.data, 1, batch_size=count, seed=config.seed)[0]


def sheets(paint: Callable[[nnx.Module], tuple[Sequence[np.ndarray], Sequence[str]]]) -> Sample:
    """Sample sheets of the rows that `paint` makes of a model, with their labels."""

    def sample(model: nnx.Module, folder: pathlib.Path, step: int) -> None:
        from dicode_jax.media.video import contact_sheet

        rows, labels = paint(model)
        if jax.process_index() == 0:
            shown = [printable(label, 200) for label in labels]
            contact_sheet(folder / f"{step:06d}.png", rows, labels=shown)

    return sample


def frame_task(
    stage: Stage,
    reconstruct: Callable[[nnx.Module, np.ndarray], np.ndarray],
    labels: Sequence[str],
    *,
    has_labels: bool = False,
    has_between: bool = False,
) -> loop.Task:
    """A training on single frames, whose sheets show frames above what the model makes of them.

    Args:
      reconstruct: From images uint8 [b, h, w, 3] to the like.
      labels: Of the two rows.
      has_labels: Whether batches hold what a frame shows.
      has_between: Whether they hold two keyframes and a frame between; the first is shown.
    """
    config = stage.config
    reader = SpanReader if has_between else FrameReader
    read = reader(data=config.data, frame_size=config.frame_size, labels=has_labels)
    splits = open_splits(config, read)
    images = held_out_examples(config, splits.held_out, 12)["image"]
    images = images[:, 0] if has_between else images
    return loop.Task(
        stage=stage,
        batches=train_stream(config, splits.train),
        evaluate=evaluation(config, stage.loss_fn, splits.held_out),
        sample=sheets(lambda model: ([images, np.asarray(reconstruct(model, images))], labels)),
        units={"frames": config.batch_size},
    )

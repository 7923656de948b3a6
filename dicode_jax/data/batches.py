"""Endless batches of the synthetic world through Grain; the iterator can be checkpointed."""

import dataclasses
from typing import Any, Protocol

import grain
import numpy as np

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.data.sources.shapes import FRAME_LABELS, frame_labels
from dicode_jax.text.gpt import TextTokenizer

__all__ = [
    "FRAME_LABELS",
    "FrameSource",
    "KeyframeSource",
    "Source",
    "make_batches",
    "psnr",
    "to_unit_range",
]


class Source(Protocol):
    """Random access to examples: dictionaries of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSource:
    """Single frames of synthetic scenes at random times, with what they show.

    Attributes:
      seed: Names the endless row of scenes.
      split: "train", "test" or "all".
      frame_size: Height and width in pixels.
      length: How many of the row belong to the source.
    """

    seed: int = 0
    split: str = "train"
    frame_size: int = 64
    length: int = 100_000_000

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`image` uint8 [h, w, 3] and `labels` int32 [3], indices into `FRAME_LABELS`."""
        rng = np.random.default_rng((self.seed, int(index)))
        scene = synthetic.sample_scene(rng, self.split)
        times = rng.uniform(0.0, 10.0, size=1)
        image = synthetic.render_at(scene, times, frame_size=self.frame_size)[0]
        return {"image": image, "labels": frame_labels(scene)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyframeSource:
    """Keyframes of synthetic videos from their beginning, with the caption as text ids.

    Attributes:
      tokenizer: Turns the caption into ids.
      text_length: Padded length of the ids.
      num_keyframes: Keyframes per video.
    """

    tokenizer: TextTokenizer
    text_length: int
    num_keyframes: int
    seed: int = 0
    split: str = "train"
    frame_size: int = 64
    length: int = 100_000_000

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`keyframes` uint8 [k, h, w, 3] and `text_ids` int32 [l]."""
        rng = np.random.default_rng((self.seed, int(index)))
        scene = synthetic.sample_scene(rng, self.split)
        keyframes = synthetic.render_keyframes(
            scene, self.num_keyframes, frame_size=self.frame_size
        )
        text_ids = self.tokenizer.encode(scene.caption, self.text_length).ids[0]
        return {"keyframes": keyframes, "text_ids": text_ids}


def make_batches(source: Source, batch_size: int) -> grain.DatasetIterator:
    """Batches in the order of the source, again and again; the iterator's state can be saved."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    dataset = grain.MapDataset.source(source).repeat().batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(read_options=options))


def to_unit_range(images: Any) -> Any:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def psnr(true: Any, other: Any) -> float:
    """Mean peak signal-to-noise ratio in dB of images or clips uint8 [b, ..., h, w, 3]."""
    error = np.asarray(true, np.float64) - np.asarray(other, np.float64)
    mse = np.square(error).mean(axis=tuple(range(1, error.ndim)))
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(mse, 1e-10))))

"""Examples of the trainings, one at a time: what a batch is made of."""

from typing import Any

import numpy as np

from dicode_jax.data import batches


def frames(config: Any, split: str) -> batches.Source:
    """Single frames: `image` uint8 [h, w, 3], and `labels` int32 [p] of the synthetic world."""
    held_out = split == "validation"
    return batches.FrameSource(
        seed=config.seed + held_out,
        split="test" if held_out else "train",
        frame_size=config.frame_size,
    )


def fixed(source: batches.Source, count: int) -> dict[str, np.ndarray]:
    """The first examples of a source, stacked."""
    examples = [source[i] for i in range(count)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

"""The synthetic world as a source of records, as long as anyone wants."""

import numpy as np

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.data.records import Record

# The labels of a scene that a single frame shows, in this order.
FRAME_LABELS = {
    "color": tuple(synthetic.COLORS),
    "shape": synthetic.SHAPES,
    "background": tuple(synthetic.BACKGROUNDS),
}
LENGTH = 100_000_000


class ShapesSource:
    """Scenes of the endless row that `seed` and `split` ("train", "test" or "all") name."""

    left_out: tuple[str, ...] = ()

    def __init__(self, *, seed: int, split: str, length: int = LENGTH):
        self.seed, self.split, self._length = seed, split, length

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{self.seed}/{index}"

    def canonical_name(self, index: int) -> str:
        return self.name(index)

    def record(self, index: int) -> Record:
        scene = synthetic.scene_at(self.seed, int(index), self.split)
        return Record(name=self.name(index), captions=(scene.caption,), media=scene)


def frame_labels(scene: synthetic.Scene) -> np.ndarray:
    """What a frame of a scene shows, int32 [3]: indices into `FRAME_LABELS`."""
    labels = [known.index(getattr(scene.attributes, name)) for name, known in FRAME_LABELS.items()]
    return np.asarray(labels, np.int32)

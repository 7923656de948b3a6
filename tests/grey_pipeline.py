"""A family of its own that paints grey clips at once, called as all pipelines are."""

import dataclasses
import types

import numpy as np

from dicode_jax.app.models import Model
from dicode_jax.errors import UserError
from dicode_jax.pipelines import base
from dicode_jax.pipelines.painting import Clip

FRAMES, SIZE, FPS = 4, 16, 8.0  # of a clip; pixels; a second
NAME = "grey"


class GreyPipeline(base.Pipeline):
    """Clip i of a video is of the grey `10 * (i + 1)`, behind what is given.

    Attributes:
      before: Called with the number of a clip before it is painted.
      asked: What each call asked for.
    """

    kind = NAME
    part_types: dict = {}  # noqa: RUF012
    takes = frozenset({"image", "video", "num_clips", "tokens"})

    def __init__(self, before=lambda index: None):
        config = types.SimpleNamespace(fps=FPS, frame_size=SIZE)
        super().__init__({}, config=config)
        self.before, self.asked = before, []

    def stream(
        self, prompt, *, image, video, seed, num_clips=1, quality=None, clips_per_batch="auto"
    ):
        if prompt == [""]:
            raise UserError("the prompt is empty; say what to show")
        asked = {"image": image, "video": video, "quality": quality, "seed": seed}
        self.asked.append(asked | {"clips_per_batch": clips_per_batch})
        for i in range(num_clips):
            self.before(i)
            yield Clip(0, i, np.full((FRAMES, SIZE, SIZE, 3), 10 * (i + 1), np.uint8))

    def _answer(self, call):
        answer = super()._answer(call)
        tokens = np.linspace(-1, 1, (call.num_clips + 1) * 6, dtype=np.float32)
        return dataclasses.replace(answer, tokens=tokens.reshape(1, -1, 2, 3))

    def fit_frame(self, frame):
        return frame[:SIZE, :SIZE]


def grey_model(folder, **changes):
    """The entry of the picker; nothing is read from its folder."""
    known = {
        "name": NAME,
        "folder": folder,
        "takes": GreyPipeline.takes,
        "has_presets": True,
        "is_batched": True,
        "num_frames": FRAMES,
        "fps": FPS,
        "examples": ("grey on grey", "<b>bold</b> grey"),
    }
    return Model(**known | changes)

"""The motion score: by hand, and in the order of how much really moves."""

import numpy as np
import pytest

from dicode_jax.data import shapes_world
from dicode_jax.models.landiff.motion import frame_motion


def test_it_is_the_mean_change_of_grey_as_a_share_of_all_grey():
    frames = np.zeros((9, 2, 2, 3), np.uint8)
    frames[3:, 0, 0] = 51  # one of four pixels, a fifth of all grey, once in frames 1 to 4
    frames[5:, 1] = (255, 0, 0)  # two of four, 0.299 of all grey, once in frames 5 to 8
    want = [0.0, 0.2 / 4 / 4, 0.299 / 2 / 4]
    np.testing.assert_allclose(frame_motion(frames), want, rtol=1e-5)
    with pytest.raises(ValueError, match=r"4k \+ 1 frames"):
        frame_motion(frames[:8])


def test_what_stays_still_has_none_and_what_moves_has_some():
    scenes = [shapes_world.scene_at(0, i, "train") for i in range(60)]
    scores = {}
    for scene in scenes:
        frames = shapes_world.render_at(scene, np.arange(17) / 16)
        scores.setdefault(scene.attributes.motion, []).append(frame_motion(frames)[1:].mean())
    assert max(scores.pop("stays still")) == 0
    assert all(min(found) > 0 and max(found) < 0.1 for found in scores.values())

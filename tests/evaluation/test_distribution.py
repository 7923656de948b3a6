"""Distances between sets: which clips go through a network, how, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.evaluation import distribution
from dicode_jax.evaluation.frechet import frechet_distance
from dicode_jax.evaluation.kernel_distance import kernel_distance
from dicode_jax.media.video import Frame, at_rate


def features(sizes=None):
    """Mean colour of the first frame, and of all."""

    def run(clips):
        (sizes if sizes is not None else []).append(len(clips))
        return np.concatenate([clips[:, 0].mean((1, 2)), clips.mean((1, 2, 3))], axis=1)

    return distribution.Features(
        name="mean", digest="0", num_frames=3, frame_size=4, fps=2.0, run=run
    )


def test_a_clip_is_of_the_frames_at_the_protocol_s_rate_in_its_size():
    frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 8, 3), np.uint8)
    clip = features().clip(frames, 6.0, "v")
    assert clip.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(clip[:, 0, 0, 0], [0, 3, 6])
    np.testing.assert_array_equal(features().clip(frames, 2.0, "v")[:, 0, 0, 0], [0, 1, 2])
    with pytest.raises(UserError, match="v has 8 frames, 8 a second"):
        features().clip(frames, 8.0, "v")


@pytest.mark.parametrize(("fps", "own"), [(8.0, 16.0), (6.0, 4.0), (10.0, 4.0), (30.0, 8.0)])
def test_kept_frames_and_those_of_a_file_are_chosen_by_one_rule(fps, own):
    frames = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    network = dataclasses.replace(features(), num_frames=9, fps=own)
    shown = at_rate(
        (Frame(image=x, time=i / fps, duration=1 / fps) for i, x in enumerate(frames)), own
    )
    clip = network.clip(frames, fps, "v")
    np.testing.assert_array_equal(clip, [x.image for x in itertools.islice(shown, 9)])


def test_a_frame_keeps_its_middle_square():
    frame = np.zeros((4, 8, 3), np.uint8)
    frame[:, 2:6] = 90
    np.testing.assert_array_equal(distribution.fitted(frame, 4), 90)


def test_distances_are_those_of_the_features_whatever_the_batches():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 19, 3, 4, 4, 3), np.uint8)
    sizes = []
    found = distribution.distances(features(sizes), list(first), list(second))
    a, b = (features().run(x) for x in (first, second))
    np.testing.assert_allclose(found["FD-mean"], frechet_distance(a, b), rtol=1e-9)
    np.testing.assert_allclose(found["KVD-mean"], kernel_distance(a, b), rtol=1e-9)
    assert sizes == [16] * 4  # one program


def test_a_clip_without_antialiasing_is_two_taps_of_the_middle_and_not_rounded():
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 10, 3), np.uint8)
    plain = dataclasses.replace(features(), antialias=False, fps=None)
    clip = plain.clip(frames, 25.0, "v")  # every frame, whatever their rate
    middle = frames[:, :, 2:8].astype(np.float64)
    at = np.array([0.25, 1.75, 3.25, 4.75])  # centres of four pixels among six
    first = at.astype(int)
    share = (at - first)[:, None]
    rows = middle[:, first] * (1 - share[..., None]) + middle[:, first + 1] * share[..., None]
    both = rows[:, :, first] * (1 - share) + rows[:, :, first + 1] * share
    np.testing.assert_allclose(clip, both, atol=1e-4)
    assert plain.names == ("FD-mean", "KVD-mean")
    named = dataclasses.replace(plain, labels=("FVD", "KVD"))
    assert named.names == ("FVD", "KVD")
    assert distribution.protocol(named)["frames a second"] == "as the videos have"


def test_frames_with_features_of_their_own_are_all_kept_and_no_filling():
    net = dataclasses.replace(
        features(), of_frames=True, at_once=2, run=lambda clips: clips.reshape(-1, 48)[:, :3]
    )
    clips = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(net(iter(clips)), clips.reshape(9, 48)[:, :3])


def test_of_the_distances_those_that_are_wanted_are_taken():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))
    found = distribution.between(features(), a, b, lambda name: name.startswith("KVD"))
    assert found == {"KVD-mean": kernel_distance(a, b)}


def test_sets_of_other_sizes_are_refused():
    clips = list(np.zeros((3, 3, 4, 4, 3), np.uint8))
    for first, second, said in ((clips, clips[:2], "3 videos cannot"), (clips[:1],) * 2 + ("two",)):
        with pytest.raises(UserError, match=said):
            distribution.distances(features(), first, second)

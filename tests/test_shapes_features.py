"""The classifier behind FD-shapes: a step of its training, and distances of folders."""

import json

import numpy as np
import pytest

from dicode_jax import cli
from dicode_jax.data import shapes_world
from dicode_jax.evaluation import distribution
from dicode_jax.media.video import write_video
from dicode_jax.models.shapes_classifier import ShapesClassifierConfig
from scripts import train_shapes_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "w"
    words = ["--num-clips", "3", "--num-steps", "1", "--batch-size", "2"]
    train_shapes_features.main(["--out", str(folder), *words])
    return folder


def test_the_words_are_those_of_the_world():
    sizes = tuple(map(len, train_shapes_features.WORDS))
    assert ShapesClassifierConfig().words == sizes
    assert np.prod(sizes) == len(shapes_world.all_captions())
    clips, labels = train_shapes_features.drawn(0, 2)
    for label, i in zip(labels, range(2)):
        said = shapes_world.scene_at(0, i, "all").attributes
        told = [words[j] for words, j in zip(train_shapes_features.WORDS, label)]
        assert told == [getattr(said, field) for field in train_shapes_features.FIELDS]
    np.testing.assert_array_equal(
        clips[1], shapes_world.render(shapes_world.scene_at(0, 1, "all"))[0, ::2]
    )


@pytest.fixture(scope="module")
def features(folder):
    return distribution.shapes_features(folder)


def test_features_hear_of_every_frame_and_of_the_order(features):
    clip = train_shapes_features.drawn(0, 1)[0][0]
    black = clip.copy()
    black[5] = 0
    found = features([clip, clip[::-1], black])
    assert found.shape == (3, ShapesClassifierConfig().features)
    assert np.abs(found[1:] - found[0]).max(axis=1).min() > 1e-5


def test_folders_are_compared_and_the_protocol_is_reported(folder, features, tmp_path, capsys):
    for name, row in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for i in range(3):
            clip = shapes_world.render(shapes_world.scene_at(row, i))[0]
            if i:
                write_video(tmp_path / name / f"{i}.mp4", clip, 8)
            else:
                np.savez_compressed(tmp_path / name / "0.npz", video=clip)
    words = ["--reference", tmp_path / "b", "--features", folder, "--out", tmp_path / "out"]
    command = ["evaluate", "--videos", tmp_path / "a", *words]
    assert cli.main(list(map(str, command))) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["values"].keys() == {"FD-shapes", "KVD-shapes"}
    assert found["values"]["FD-shapes"] > 0
    assert found["settings"] | distribution.protocol(features) == found["settings"]
    assert found["settings"]["count of each"] == 3
    (tmp_path / "a/0.npz").unlink()
    assert cli.main(list(map(str, command))) == 2
    assert "2 videos cannot be compared with 3" in capsys.readouterr().err

"""The classifier behind FD-shapes: a step of its training, and distances of folders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax import cli
from dicode_jax.cli import distances
from dicode_jax.data import shapes_world
from dicode_jax.evaluation import distribution, networks
from dicode_jax.media.video import write_video
from dicode_jax.models.i3d import I3DConfig
from dicode_jax.models.inception import InceptionConfig
from dicode_jax.models.shapes_classifier import ShapesClassifierConfig
from dicode_jax.storage import weights
from scripts import train_shapes_features


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


@pytest.mark.slow
def test_a_step_of_training_is_written_with_the_spread_of_its_features(tmp_path, capsys):
    words = ["--num-clips", "3", "--num-steps", "1", "--batch-size", "2"]
    train_shapes_features.main(["--out", str(tmp_path / "w"), *words])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(train_shapes_features.FIELDS)
    clips, _ = train_shapes_features.drawn(train_shapes_features.TRIED, 3)
    found = networks.shapes(tmp_path / "w")(clips)
    np.testing.assert_allclose(np.sqrt(found.var(axis=0).mean()), 1, rtol=0.02)


@pytest.fixture(scope="module")
def features():
    return networks.shapes()


def test_the_packaged_classifier_hears_of_motion_and_of_little_grain(features):
    clips = train_shapes_features.drawn(1, 24)[0]
    still = np.repeat(clips[:, :1], clips.shape[1], axis=1)
    grain = np.random.default_rng(0).normal(0, 4, clips.shape)
    grainy = np.clip(clips + grain, 0, 255).astype(np.uint8)
    near, far = (distribution.distances(features, list(clips), list(x)) for x in (grainy, still))
    assert 0 < near["FD-shapes"] < 0.1 * far["FD-shapes"]
    assert near["KVD-shapes"] < far["KVD-shapes"]


def test_features_hear_of_every_frame_and_of_the_order(features):
    clip = train_shapes_features.drawn(0, 1)[0][0]
    black = clip.copy()
    black[5] = 0
    found = features([clip, clip[::-1], black])
    assert found.shape == (3, ShapesClassifierConfig().features)
    assert np.abs(found[1:] - found[0]).max(axis=1).min() > 1e-5


def test_folders_are_compared_and_the_protocol_is_reported(features, tmp_path, capsys):
    for name, row in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for i in range(3):
            clip = shapes_world.render(shapes_world.scene_at(row, i))[0]
            if i:
                write_video(tmp_path / name / f"{i}.mp4", clip, 8)
            else:
                np.savez_compressed(tmp_path / name / "0.npz", video=clip, fps=8)
    words = ["--reference", tmp_path / "b", "--features", "--out", tmp_path / "out"]
    command = ["evaluate", "--videos", tmp_path / "a", *words]
    assert cli.main(list(map(str, command))) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["distances"]
    assert found["values"].keys() == {"FD-shapes", "KVD-shapes"}
    assert found["values"]["FD-shapes"] > 0
    told = distribution.protocol(features).items()
    told = {f"FD-shapes, KVD-shapes: {name}": value for name, value in told}
    assert found["settings"] | told == found["settings"]
    assert found["settings"]["count of each"] == 3
    (tmp_path / "a/0.npz").unlink()
    assert cli.main(list(map(str, command))) == 2
    assert "2 videos cannot be compared with 3" in capsys.readouterr().err


class Network(nnx.Module):
    """Of the first and the last frame the mean colour, in place of a network of many layers."""

    def __init__(self, cfg, *, rngs, dtype=None, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        ends = x[:, jnp.array([0, -1])] if x.ndim == 5 else x
        return self.scale[...] * ends.mean((-3, -2)).reshape(len(x), -1)


@pytest.fixture
def videos(tmp_path):
    """Two folders of two videos of 20 frames at 8 a second, and what names them."""
    for name, levels in (("a", (10, 60)), ("b", (30, 70))):
        (tmp_path / name).mkdir()
        for level in levels:
            frames = (
                np.full((20, 32, 48, 3), level, np.uint8)
                + np.arange(20, dtype=np.uint8)[:, None, None, None]
            )
            write_video(tmp_path / name / f"{level}.mp4", frames, 8)
    return ["evaluate", "--videos", str(tmp_path / "a"), "--reference", str(tmp_path / "b")]


def test_fvd_and_fid_have_their_names_from_the_published_networks_alone(
    videos, tmp_path, monkeypatch, capsys
):
    """With networks of their sizes' names; tests/convert holds I3D and Inception-v3 to torch."""
    monkeypatch.setattr(networks, "I3D", Network)
    monkeypatch.setattr(networks, "Inception", Network)
    words, values = [*videos], {}
    for divisor in (1, 8):
        for option, config in (("i3d", I3DConfig), ("inception", InceptionConfig)):
            folder, cfg = tmp_path / f"{option}{divisor}", config(divisor=divisor)
            weights.save_module(folder, Network(cfg, rngs=nnx.Rngs(0)), cfg)
            words = [*words, f"--{option}", str(folder)]
        out = tmp_path / f"out{divisor}"
        assert cli.main([*words, "--out", str(out)]) == 0
        found = json.loads((out / "results.json").read_text())["distances"]
        values[divisor], words = found["values"], [*videos]
    assert values[1].keys() == {"FVD", "KVD", "FID", "KID"}
    assert values[8].keys() == {
        "FD-i3d", "KVD-i3d", "FD-inception", "KVD-inception"
    }  # fmt: skip
    assert list(values[1].values()) == list(values[8].values())
    assert values[1]["FVD"] > values[1]["FID"] > 0  # frames fill what lies between the ends
    settings = found["settings"]
    assert settings["FD-i3d, KVD-i3d: frames a second"] == 8
    assert settings["FD-i3d, KVD-i3d: frames of a clip"] == 16
    assert settings["FD-inception, KVD-inception: samples"] == "each frame"
    for name, size in (("FD-i3d, KVD-i3d", 224), ("FD-inception, KVD-inception", 299)):
        told = f"{size} x {size}, the middle square, bilinear, two taps"
        assert settings[f"{name}: size"] == told
    one = [*videos, "--i3d", str(tmp_path / "i3d1"), "--out", str(tmp_path / "one")]
    assert cli.main([*one, "--metrics", "kvd"]) == 0
    found = json.loads((tmp_path / "one/results.json").read_text())["distances"]
    assert found["values"] == {"KVD": values[1]["KVD"]}
    assert cli.main([*one, "--metrics", "fid"]) == 2
    assert "those given measure FVD, KVD); it is of --inception" in capsys.readouterr().err
    assert cli.main([*one, "--fps", "16"]) == 0  # every frame twice: the clip is half as long
    write_video(tmp_path / "b/70.mp4", np.zeros((20, 32, 48, 3), np.uint8), 4)
    assert cli.main(one) == 2
    assert "have 4 and 8 frames a second" in capsys.readouterr().err
    assert cli.main([*one, "--fps", "9"]) == 0


def test_without_a_rate_of_its_own_a_clip_is_of_neighbouring_frames(tmp_path):
    levels = np.arange(20, dtype=np.uint8) * 12
    frames = np.broadcast_to(levels[:, None, None, None], (20, 32, 32, 3))
    write_video(tmp_path / "a.gif", frames, 24)  # which says that it has 25 a second
    net = distribution.Features(
        name="n", digest="0", num_frames=16, frame_size=32, fps=None, run=np.asarray
    )
    (clip,) = distances.clips_of([tmp_path / "a.gif"], net, lambda *told: None, set())
    np.testing.assert_array_equal(clip[:, 0, 0, 0], levels[:16])


def test_what_is_no_kept_video_and_no_folder_of_weights_is_one_line(videos, tmp_path, capsys):
    command = [*videos, "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--i3d", ""]) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "a/10.mp4").unlink()
    clip = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "a/0.npz", video=clip, fps=8)
    whole = (tmp_path / "a/0.npz").read_bytes()
    np.save(tmp_path / "one.npy", clip)
    for wrong in (
        whole[:1000] + bytes(8) + whole[1008:],
        whole[: len(whole) // 2],
        (tmp_path / "one.npy").read_bytes(),
    ):
        (tmp_path / "a/0.npz").write_bytes(wrong)
        assert cli.main(command) == 2
        assert "0.npz is no kept video" in capsys.readouterr().err
    (tmp_path / "a/0.npz").unlink()
    (tmp_path / "a/0.NPZ").write_bytes(whole)
    assert cli.main(command) == 0

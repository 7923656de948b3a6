"""Windows of scenes and files: any start, neighbouring frames, whole steps."""

import numpy as np
import pytest

from dicode_jax.data import windows
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, Record
from dicode_jax.data.shapes_world import render_at, scene_at
from dicode_jax.data.windows import BeginningReader, WindowReader, read_window

SCENE = scene_at(0, 0, "train")
RECORD = Record(name="scene", captions=(SCENE.caption,), media=SCENE)


def test_a_window_of_a_scene_is_neighbouring_frames_from_any_of_them():
    cfg = DataConfig(num_frames=3, fps=8.0)
    drawn = [int(np.random.default_rng(seed).integers(160)) for seed in range(4)]
    assert any(first % 16 for first in drawn)  # not at keyframes alone
    for seed, first in enumerate(drawn):
        got = read_window(RECORD, cfg, 16, np.random.default_rng(seed))
        want = render_at(SCENE, (first + np.arange(3)) / 16, frame_size=16)
        np.testing.assert_array_equal(got, want)


def test_a_square_is_cut_from_all_frames_alike():
    cfg = DataConfig(num_frames=3, clip_start="start")
    whole = WindowReader(data=cfg, frame_size=16)(RECORD, np.random.default_rng(0))["video"]
    rng = np.random.default_rng(5)
    top, left = (int(rng.integers(16 - 6 + 1)) for _ in range(2))
    got = WindowReader(data=cfg, frame_size=16, crop_size=6)(RECORD, np.random.default_rng(5))
    np.testing.assert_array_equal(got["video"], whole[:, top : top + 6, left : left + 6])


@pytest.mark.parametrize(("held", "wanted"), [(30, 17), (17, 17), (16, 9), (9, 9)])
def test_a_beginning_has_whole_steps(held, wanted, monkeypatch):
    frames = np.arange(held)
    monkeypatch.setattr(windows, "read_whole", lambda *_: {"frames": frames, "times": frames / 8})
    read = BeginningReader(data=DataConfig(num_frames=20), frame_size=16, step=8)
    got = read(Record(name="file", captions=(), media=None), np.random.default_rng(0))
    assert got["frames"].tolist() == list(range(wanted))
    assert len(got["times"]) == wanted


def test_a_video_of_less_than_a_step_is_told(monkeypatch):
    monkeypatch.setattr(windows, "read_whole", lambda *_: {"frames": np.zeros(8)})
    read = BeginningReader(data=DataConfig(num_frames=20), frame_size=16, step=8)
    with pytest.raises(BrokenRecord, match="shows 8 frames of the 9 that are the least"):
        read(Record(name="file", captions=(), media=None), np.random.default_rng(0))
    scene = read(RECORD, np.random.default_rng(0))
    np.testing.assert_allclose(scene["times"], np.arange(17) / 8)

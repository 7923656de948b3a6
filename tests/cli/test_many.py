"""Folders of videos, and videos that go on from files: what the pipeline is asked for."""

import json
import types

import numpy as np
import pytest
from PIL import Image

import dicode_jax
from dicode_jax import cli
from dicode_jax.errors import UserError
from dicode_jax.media import video
from dicode_jax.media.videos import Video, Videos
from dicode_jax.pipelines import load
from dicode_jax.storage import hub

GIVEN = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
SEED = "--seed 3 --model some"


class Stub:
    """Paints flat clips of 4 frames, behind the frames of a video that is given."""

    config = types.SimpleNamespace(fps=2.0, sampling=types.SimpleNamespace(num_frames=4))
    calls: list

    def __call__(self, prompt, *, seed, num_clips, **options):
        if prompt == "bad":
            raise UserError("cannot be spelled")
        self.calls.append((prompt, seed, num_clips, options))
        frames = np.full((4 * num_clips, 10, 12, 3), 10 * seed, np.uint8)
        if (given := options.get("video")) is not None:
            frames = np.concatenate([given, frames])
        record = self.record(prompt=prompt, seed=seed)
        return Videos([Video(frames=frames, fps=2.0, seed=seed, record=record)])

    def fit_frame(self, frame):
        return frame

    def record(self, **told):
        return {"dicode_jax": "0.1", **told}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts the stub in place, in a folder with two pictures and a video; notes how it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "find_model", lambda name: name)
    monkeypatch.setattr(load, "pipeline_kind", lambda folder: "dicode")
    monkeypatch.setattr(dicode_jax, "load", lambda *_, **__: Stub())
    monkeypatch.setattr(Stub, "calls", [], raising=False)
    for name, image in (("a.png", GIVEN[0]), ("b.png", GIVEN[1])):
        Image.fromarray(image).save(name)
    video.write_video("in.webp", GIVEN, fps=2)
    return Stub.calls


def run(line):
    assert cli.main(line.split()) == 0


def fails(capsys, line):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_a_list_becomes_a_folder_that_says_how_each_video_was_made(calls, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,num_clips,image\na cat,2,\na dog,,a.png\n")
    line = f"generate --prompts p.csv --out out --num-videos-per-prompt 2 --steps 5 {SEED}"
    run(line)
    image = {"image": "a.png"}
    assert [call[:3] for call in calls] == [
        ("a cat", 3, 2), ("a cat", 4, 2), ("a dog", 3, 1), ("a dog", 4, 1),
    ]  # fmt: skip
    assert calls[2][3].items() >= {"num_inference_steps": 5, **image}.items()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["a-cat_3.mp4", "a-cat_4.mp4", "a-dog_3.mp4", "a-dog_4.mp4", "manifest.jsonl"]
    text = (tmp_path / "out/manifest.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[3]["options"] == image
    assert lines[0]["settings"]["num_inference_steps"] == 5
    assert lines[0]["settings"]["model"] == "some"
    assert (lines[0]["frames"], lines[0]["fps"]) == (8, 2.0)
    assert lines[1]["record"] == video.probe("out/a-cat_4.mp4").record
    capsys.readouterr()
    run(line)  # paints nothing
    assert len(calls) == 4
    assert "4 of 4 videos are there already" in capsys.readouterr().out
    assert "made with other settings" in fails(capsys, line.replace("--steps 5", "--steps 6"))
    run("info out/a-dog_3.mp4")
    out = capsys.readouterr().out
    assert "a video of 12 x 10" in out
    assert f"  {'prompt':<20} a dog\n  {'seed':<20} 3\n" in out


def test_several_videos_of_one_prompt_are_a_folder_too(calls, tmp_path):
    run(f"generate cat --out out --num-videos-per-prompt 2 --format webp --image a.png {SEED}")
    assert [(prompt, seed) for prompt, seed, *_ in calls] == [("cat", 3), ("cat", 4)]
    assert calls[0][3]["image"] == "a.png"
    assert (tmp_path / "out/cat_4.webp").is_file()


def test_a_prompt_that_fails_is_told_at_the_end(calls, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("bad\ncat\n")
    line = fails(capsys, f"generate --prompts p.txt --out out {SEED}")
    assert "1 of 2 videos are not made: bad_3.mp4: cannot be spelled" in line
    assert (tmp_path / "out/cat_3.mp4").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate cat --prompts a.png --out out", "one prompt, or a file of them"),
        ("generate --prompts no.txt --out out", "no.txt cannot be read"),
        ("generate cat --num-videos-per-prompt 2 --out out.mp4", "--out is the folder of many"),
        ("generate cat --num-videos-per-prompt 2 --out o --sheet a.png", "leave --sheet out"),
        ("generate --num-videos-per-prompt 2 --out out", "the prompt is empty"),
        ("generate cat --num-videos-per-prompt 0 --out out", "want a whole number from 1"),
        ("generate cat --last-image b.png --out a.mp4", "--last-image goes with --image"),
        ("interpolate a.png no.png --out a.mp4", "no.png"),
        ("continue no.mp4 --out a.mp4", "there is no file no.mp4"),
        ("continue in.webp --out in.webp", "is read by this command"),
        ("continue in.webp --num-clips 5000 --out a.mp4", "from 1 to 1800"),
    ],
)
def test_a_mistake_costs_one_line_and_paints_nothing(calls, tmp_path, capsys, line, message):
    before = sorted(tmp_path.iterdir())
    assert message in fails(capsys, line)
    assert not calls
    assert sorted(tmp_path.iterdir()) == before


def test_continue_keeps_the_given_frames_and_says_what_it_was(calls, tmp_path, capsys):
    run(f"continue in.webp cat --out out.webp --num-clips 2 --sheet sheet.png {SEED}")
    ((prompt, seed, num_clips, options),) = calls
    assert (prompt, seed, num_clips) == ("cat", 3, 2)
    np.testing.assert_array_equal(options["video"], GIVEN)
    made = video.read_video("out.webp").frames
    assert len(made) == 4 + 2 * 4
    np.testing.assert_array_equal(made[:4], GIVEN)
    assert (tmp_path / "sheet.png").is_file()
    assert "out.webp: 12 frames of 12 x 10, 6 s" in capsys.readouterr().out


def test_interpolate_and_image_give_the_pictures(calls, capsys):
    run(f"interpolate a.png b.png --out out.mp4 {SEED}")
    options = calls[0][3]
    np.testing.assert_array_equal(options["image"], GIVEN[0])
    np.testing.assert_array_equal(options["last_image"], GIVEN[1])
    record = video.probe("out.mp4").record
    told = {"command": "interpolate", "image": "a.png", "last_image": "b.png", "seed": 3}
    assert record.items() >= told.items()
    run(f"generate cat --image a.png --out out.mp4 {SEED}")
    assert calls[1][0] == "cat"
    assert calls[1][3]["last_image"] is None

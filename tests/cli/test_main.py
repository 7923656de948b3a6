"""The command line does its work through the pipeline, and every mistake costs one line."""

import dataclasses
import gc
import json
import os
import pathlib
import re
import tracemalloc
import types
import warnings

import numpy as np
import pytest
from media_files import gif_bytes, greys, write
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import dicode_jax
from dicode_jax import cli
from dicode_jax.cli import video as video_commands
from dicode_jax.data import shapes_world as synthetic
from dicode_jax.errors import UserError
from dicode_jax.media import video
from dicode_jax.pipelines import load
from dicode_jax.pipelines.painting import Clip
from dicode_jax.storage import hub, model_card

PROMPT = "a red circle moves right on a black background"


class StubPipeline:
    """Stands where the real pipeline does, paints flat frames, and notes how it was called."""

    calls: list[tuple]
    config = types.SimpleNamespace(
        fps=8.0, frame_size=20, sampling=types.SimpleNamespace(num_frames=16)
    )

    @classmethod
    def load(cls, name, *, dtype, param_dtype):
        assert dtype == param_dtype == np.float32
        cls.calls.append(("load", name))
        if name == "nowhere":
            raise UserError("no model 'nowhere'")
        return cls()

    def stream(self, prompt, *, num_clips, num_frames, progress, **options):
        self.calls.append(("generate", prompt, num_clips, num_frames, options))
        if prompt.count(" ") > 80:
            for file in (synthetic.__file__, np.__file__):
                text = f"too long for\n{pathlib.Path(file).parent.name}"
                warnings.warn_explicit(text, UserWarning, filename=file, lineno=1)
        if "7" in prompt:
            raise UserError("the prompt holds characters that the model has never seen: '7'")
        if "interrupt" in prompt:
            raise KeyboardInterrupt
        if "memory" in prompt:
            raise MemoryError
        return self._paint(num_clips, num_frames)

    def encode_frames(self, frames):
        means = np.stack([frame.mean((0, 1)) for frame in frames])  # [k, 3]
        self.calls.append(("encode", len(means)))
        return np.repeat(means[:, None], 4, axis=1).astype(np.float32)

    def decode_stream(self, tokens, *, num_frames, progress, **options):
        self.calls.append(("decode", tokens.shape, num_frames, options))
        return self._paint(len(tokens) - 1, num_frames)

    def record(self, **told):
        return {"dicode_jax": "0.1", **told}

    def _paint(self, num_clips, num_frames):
        for index in range(num_clips):
            yield Clip(0, index, np.full((num_frames or 16, 20, 24, 3), 90, np.uint8))


@pytest.fixture
def calls(monkeypatch):
    """Puts the stub in place; what was called is noted here."""
    monkeypatch.setattr(hub, "find_model", lambda name: name)
    monkeypatch.setattr(load, "pipeline_kind", lambda folder: "dicode")
    monkeypatch.setattr(dicode_jax, "load", StubPipeline.load)
    monkeypatch.setattr(StubPipeline, "calls", [], raising=False)
    return StubPipeline.calls


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clip(work):
    """A video of two clips that differ, `in.mp4`."""
    frames = synthetic.render(synthetic.scene_at(0, 4), 2).reshape(-1, 64, 64, 3)
    video.write_video("in.mp4", frames)
    return "in.mp4"


def fails(capsys, *argv, status=2):
    """Runs a command that must fail, and returns its only line on stderr."""
    before = sorted(os.listdir())
    assert cli.main(list(argv)) == status
    assert sorted(os.listdir()) == before, "a file was left behind"
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    assert err.startswith("dicode: error: ")
    return err


class TestGenerate:
    @pytest.mark.parametrize("suffix", video_commands.VIDEO_SUFFIXES)
    def test_writes_the_video(self, calls, work, capsys, suffix):
        assert cli.main(["generate", PROMPT, "--out", f"out{suffix}", "--num-clips", "3"]) == 0
        read = video.read_video(f"out{suffix}")
        assert read.frames.shape == (48, 20, 24, 3)
        assert read.fps == pytest.approx(8, abs=0.1)  # a gif counts hundredths of a second
        out, err = capsys.readouterr()
        assert f"out{suffix}: 48 frames of 24 x 20, 6 s" in out
        assert not err

    def test_passes_every_option_on(self, calls, work):
        options = "--num-clips 2 --num-frames 8 --seed 5 --steps 20 --guidance-scale 1.5"
        options += " --sampler dpm++ --quality draft --eta 0.5 --guidance-interval 0 0.5"
        options += " --deep-cache-interval 2"
        argv = ["generate", PROMPT, "--out", "a.gif", *options.split(), "--model", "some"]
        assert cli.main(argv) == 0
        given = {
            "seed": 5,
            "quality": "draft",
            "num_inference_steps": 20,
            "guidance_scale": 1.5,
            "guidance_interval": (0.0, 0.5),
            "sampler": "dpm++",
            "eta": 0.5,
            "deep_cache_interval": 2,
            "clips_per_batch": "auto",
        }
        assert calls == [("load", "some"), ("generate", PROMPT, 2, 8, given)]
        assert video.read_video("a.gif").fps == pytest.approx(4, abs=0.1)  # a clip stays 2 s long

    def test_leaves_defaults_to_the_model(self, calls, work):
        assert cli.main(["generate", PROMPT, "--out", "a.mp4"]) == 0
        given = {"seed": 0, "clips_per_batch": "auto"}
        assert calls == [("load", None), ("generate", PROMPT, 1, None, given)]

    def test_writes_a_contact_sheet(self, calls, work, capsys):
        argv = ["generate", PROMPT, "--out", "a.mp4", "--sheet", "a.png", "--num-clips", "40"]
        assert cli.main(argv) == 0
        sheet = Image.open("a.png")
        assert sheet.height > video_commands.SHEET_ROWS * 100
        assert "a.png: contact sheet" in capsys.readouterr().out

    def test_our_own_warnings_are_one_line_and_others_are_not_shown(self, calls, work, capsys):
        assert cli.main(["generate", "red " * 99, "--out", "a.mp4"]) == 0
        assert capsys.readouterr().err == "dicode: warning: too long for data\n"

    def test_cycles_are_looked_for_seldom_and_as_before_afterwards(self, calls, work, monkeypatch):
        before, inside = gc.get_threshold(), []

        def stream(self, *_, **__):
            inside.append(gc.get_threshold())
            return self._paint(1, 8)

        monkeypatch.setattr(StubPipeline, "stream", stream)
        assert cli.main(["generate", PROMPT, "--out", "out.gif"]) == 0
        assert inside[0][0] > 10 * before[0]
        assert gc.get_threshold() == before

    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_an_empty_prompt_is_refused_before_the_model_loads(self, calls, work, capsys, prompt):
        assert "prompt is empty" in fails(capsys, "generate", prompt, "--out", "a.mp4")
        assert not calls

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--num-clips", "0", "from 1 to 1000000, got 0"),
            ("--num-clips", "-3", "got -3"),
            ("--num-clips", "1000000000", "from 1 to 1000000"),
            ("--num-clips", "two", "want a whole number from 1 to 1000000, got 'two'"),
            ("--num-clips", "1.5", "want a whole number"),
            ("--num-frames", "0", "from 1 to 1000000"),
            ("--num-frames", "1", "from 2 to 256"),
            ("--num-frames", "258", "from 2 to 256"),
            ("--guidance-scale", "101", "at most 100, got 101"),
            ("--seed", "4294967296", "from 0 to 4294967295"),
            ("--num-frames", "7", "even"),
            ("--steps", "0", "from 1 to 1000"),
            ("--steps", "5000", "from 1 to 1000"),
            ("--steps", "nan", "want a whole number"),
            ("--guidance-scale", "nan", "above 0"),
            ("--guidance-scale", "inf", "above 0"),
            ("--guidance-scale", "-1", "above 0"),
            ("--guidance-scale", "0", "above 0"),
            (
                "--guidance-scale",
                "much",
                "want a finite number above 0 and of at most 100, got 'much'",
            ),
            ("--seed", "-1", "from 0 to 4294967295"),
            ("--seed", "99999999999999999999", "from 0 to"),
        ],
    )
    def test_absurd_numbers_are_refused(self, calls, work, capsys, option, value, message):
        line = fails(capsys, "generate", PROMPT, "--out", "a.mp4", option, value)
        assert message in line
        assert option in line
        assert not calls

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "required: --out"),
            (["--out", "a.mpg"], "'.mpg'; write to one of: .mp4, .gif, .webp"),
            (["--out", "none/a.mp4"], "the output folder none does not exist"),
            (["--out", "/proc/a.mp4"], "cannot write into the folder /proc"),
            (["--out", "a.mp4", "--sheet", "a.jpg"], "'.jpg'; write to one of: .png"),
            (["--out", "a.mp4", "--step", "5"], "unknown option --step; did you mean --steps?"),
            (["--out", "a.mp4", "--sampler", "dpm"], "argument --sampler: invalid choice: 'dpm'"),
            (["--out", "a.mp4", "--quality", "good"], "argument --quality: invalid choice: 'good'"),
            (
                ["--out", "a.mp4", "--eta", "2"],
                "argument --eta: want a finite number of at least 0",
            ),
            (
                ["--out", "a.mp4", "--guidance-interval", "0.5", "0.2"],
                "argument --guidance-interval: want two numbers that ascend within 0..1, got",
            ),
            (["--out", "a.mp4", "more"], "unrecognized arguments: more"),
        ],
    )
    def test_bad_outputs_and_options_are_refused(self, calls, work, capsys, argv, message):
        assert message in fails(capsys, "generate", PROMPT, *argv)
        assert not calls

    def test_an_unknown_model_is_refused(self, calls, work, capsys):
        argv = ("generate", PROMPT, "--out", "a.mp4", "--model", "nowhere")
        assert "no model 'nowhere'" in fails(capsys, *argv)

    def test_what_the_alphabet_lacks_is_refused(self, calls, work, capsys):
        assert "'7'" in fails(capsys, "generate", "7 circles", "--out", "a.mp4")

    def test_an_interruption_is_one_line(self, calls, work, capsys):
        assert "stopped" in fails(capsys, "generate", "interrupt", "--out", "a.mp4", status=130)

    def test_too_little_memory_is_one_line(self, calls, work, capsys):
        assert "not enough memory" in fails(capsys, "generate", "memory", "--out", "a.mp4")

    def test_an_existing_file_stays_when_the_work_fails(self, calls, work, capsys):
        pathlib.Path("a.mp4").write_text("old")
        fails(capsys, "generate", "interrupt", "--out", "a.mp4", status=130)
        assert pathlib.Path("a.mp4").read_text() == "old"


class TestVideoCommands:
    def test_encode_then_decode(self, calls, clip, capsys):
        assert cli.main(["encode", clip, "--out", "t.safetensors"]) == 0
        assert "3 keyframes x 4 tokens x 3 numbers" in capsys.readouterr().out
        with safe_open("t.safetensors", "np") as file:
            times = json.loads(file.metadata()["keyframe_times"])
            tokens = file.get_tensor("tokens")
        assert times == [0.0, 2.0, 3.875]
        frames = video.read_video(clip).frames
        means = frames[[0, 16, 31]].mean((1, 2))
        np.testing.assert_allclose(tokens[:, 2], means, rtol=1e-6)
        assert cli.main(["decode", "t.safetensors", "--out", "out.webp", "--seed", "3"]) == 0
        given = {"seed": 3, "clips_per_batch": "auto"}
        assert calls[-1] == ("decode", (3, 4, 3), None, given)
        assert len(video.read_video("out.webp").frames) == 32

    @pytest.mark.parametrize(("mode", "clips"), [("every", 2), ("demo", 1)])
    def test_reconstruct(self, calls, clip, mode, clips):
        argv = ["reconstruct", clip, "--out", "out.mp4", "--sheet", "s.png", "--keyframes", mode]
        assert cli.main(argv) == 0
        assert len(video.read_video("out.mp4").frames) == 16 * clips
        assert Image.open("s.png").format == "PNG"

    def test_an_output_is_never_the_input(self, calls, clip, work, capsys):
        before = pathlib.Path(clip).read_bytes()
        os.link(clip, "hard.mp4")
        os.symlink(clip, "link.mp4")
        for out in (clip, f"../{work.name}/{clip}", "hard.mp4", "link.mp4"):
            assert "is read by this command" in fails(capsys, "reconstruct", clip, "--out", out)
        os.symlink(clip, "sheet.png")
        line = fails(capsys, "reconstruct", clip, "--out", "o.mp4", "--sheet", "sheet.png")
        assert "has another extension" in line
        os.mkfifo("pipe.mp4")
        assert "is a pipe" in fails(capsys, "reconstruct", clip, "--out", "pipe.mp4")
        assert pathlib.Path(clip).read_bytes() == before
        assert calls == []

    def test_deep_tokens_replace_deep_tokens_alone(self, calls, clip, capsys):
        for _ in range(2):
            assert cli.main(["encode", clip, "--out", "t.safetensors"]) == 0
        capsys.readouterr()
        save_file({"weight": np.ones(3)}, "model.safetensors")
        before = pathlib.Path("model.safetensors").read_bytes()
        assert "is no file of deep tokens" in fails(
            capsys, "encode", clip, "--out", "model.safetensors"
        )
        assert pathlib.Path("model.safetensors").read_bytes() == before

    def test_an_output_that_is_a_link_stays_one(self, calls, clip, work):
        (work / "videos").mkdir()
        os.symlink("videos/target.mp4", "out.mp4")
        for _ in range(2):
            assert cli.main(["reconstruct", clip, "--out", "out.mp4"]) == 0
            assert os.readlink("out.mp4") == "videos/target.mp4"
        assert len(video.read_video("videos/target.mp4").frames) == 32

    @pytest.mark.parametrize("num_clips", [1, 70])
    def test_long_videos_are_encoded(self, calls, work, num_clips):
        frames = np.arange(num_clips + 1, dtype=np.uint8)[:, None, None, None]
        frames = np.broadcast_to(frames, (num_clips + 1, 4, 4, 3))
        video.write_video("long.webp", frames, fps=0.5)
        assert cli.main(["encode", "long.webp", "--out", "t.safetensors"]) == 0
        tokens = video_commands.read_arrays("t.safetensors")["tokens"]
        shown = [*range(num_clips + 1), num_clips]  # the last frame lasts two seconds too
        np.testing.assert_array_equal(tokens[:, 0, 0], shown)

    @pytest.mark.parametrize("mode", ["every", "demo"])
    def test_few_frames_are_in_memory_at_once(self, calls, work, mode):
        pathlib.Path("a.gif").write_bytes(gif_bytes(500, 400, 40))  # 0.6 MB each
        tracemalloc.start()
        try:
            assert cli.main(["encode", "a.gif", "--out", "t.safetensors", "--keyframes", mode]) == 0
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert calls[-1] == ("encode", 41 if mode == "every" else 2)
        assert peak < 8e6  # of means in float64 4.8 MB

    @pytest.mark.parametrize("command", ["encode", "reconstruct"])
    @pytest.mark.parametrize("form", ["gif", "mkv", "no duration"])
    def test_more_clips_than_the_most_are_refused_before_the_work(
        self, calls, work, capsys, monkeypatch, command, form
    ):
        if form == "gif":
            pathlib.Path("a").write_bytes(gif_bytes(32, 32, 6, delay=65535))
        else:
            write(work / "a.mkv", greys(200), times=350000 * np.arange(200))
            os.rename("a.mkv", "a")
        if form == "no duration":
            info = dataclasses.replace(video.probe("a"), duration=None)
            monkeypatch.setattr(video, "probe", lambda path: info)
        out = "t.safetensors" if command == "encode" else "out.mp4"
        line = fails(capsys, command, "a", "--out", out)
        assert re.search(r"a has \d+ clips or more; at most 1800 are encoded or painted", line)
        assert calls == ([("load", None)] if form == "no duration" else [])

    @pytest.mark.parametrize("command", ["encode", "reconstruct"])
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("no.mp4", None, "there is no file no.mp4"),
            ("empty.mp4", b"", "empty.mp4 is empty"),
            ("text.mp4", b"hello " * 500, "cannot be read as a video"),
            ("text.txt", b"hello " * 500, "cannot be read as a video"),
        ],
    )
    def test_bad_videos_are_refused_before_the_model_loads(
        self, calls, work, capsys, command, name, content, message
    ):
        if content is not None:
            pathlib.Path(name).write_bytes(content)
        out = "t.safetensors" if command == "encode" else "out.mp4"
        assert message in fails(capsys, command, name, "--out", out)
        assert not calls

    def test_a_cut_and_a_one_frame_video_are_refused(self, calls, clip, capsys):
        data = pathlib.Path(clip).read_bytes()
        pathlib.Path("cut.mp4").write_bytes(data[: len(data) // 2])
        assert "cut short" in fails(capsys, "reconstruct", "cut.mp4", "--out", "out.mp4")
        video.write_video("one.mp4", video.read_video(clip).frames[:1])
        assert "one frame only" in fails(capsys, "reconstruct", "one.mp4", "--out", "out.mp4")

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"weights": np.zeros((2, 2))}, "holds weights, not deep tokens"),
            ({"tokens": np.zeros((2, 4), np.float32)}, "want deep tokens"),
            ({"tokens": np.zeros((1, 4, 3), np.float32)}, "two keyframes or more"),
            ({"tokens": np.zeros((2, 4, 3), np.int32)}, "want deep tokens"),
            ({"tokens": np.full((2, 4, 3), np.nan, np.float32)}, "not finite"),
        ],
    )
    def test_bad_tokens_are_refused(self, calls, work, capsys, arrays, message):
        save_file(arrays, "t.safetensors")
        assert message in fails(capsys, "decode", "t.safetensors", "--out", "a.mp4")
        assert not calls

    @pytest.mark.parametrize("content", [None, b"", b"hello", b"\xff" * 100])
    def test_files_that_hold_no_tokens_are_refused(self, calls, work, capsys, content):
        if content is not None:
            pathlib.Path("t.safetensors").write_bytes(content)
        line = fails(capsys, "decode", "t.safetensors", "--out", "a.mp4")
        assert "there is no file" in line or "not a whole safetensors file" in line

    def test_a_cut_token_file_is_refused(self, calls, clip, capsys):
        assert cli.main(["encode", clip, "--out", "t.safetensors"]) == 0
        capsys.readouterr()
        data = pathlib.Path("t.safetensors").read_bytes()
        pathlib.Path("t.safetensors").write_bytes(data[:-7])
        line = fails(capsys, "decode", "t.safetensors", "--out", "a.mp4")
        assert "not a whole safetensors file" in line

    def test_info_of_a_foreign_model_keeps_to_its_lines(self, work, capsys):
        """What a terminal would obey, a forged line, and text without an end."""
        forged = "x\x1b]0;t\x07\x1b[2J\nlicence          Apache-2.0, do as you like"
        metadata = {
            "origin": f"gpt2,{forged}",
            "converter": forged + "x" * 10**5,
            "sources": json.dumps({forged: forged, "y" * 10**5: {"nested": ["z"]}, "z": None}),
        }
        part = work / "model" / "de\ncoder\x1b[2J"
        part.mkdir(parents=True)
        save_file({"w": np.ones(3, np.float32)}, part / "model.safetensors", metadata=metadata)
        assert cli.main(["info", "model"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [
            *("de", "in", "converted"),
            *["source"] * len(model_card.inspect(work / "model")[0].sources),
            *["licence"] * 3,  # gpt2, and what stands before and after a comma
        ]
        assert all(line.isprintable() and len(line) < 400 for line in lines)

    def test_names_of_files_are_printed_as_one_line(self, calls, clip, capsys):
        out = "a\x1b[2J\nb.mp4"
        assert cli.main(["reconstruct", clip, "--out", out, "--sheet", "s\x1b.png"]) == 0
        assert cli.main(["info", out]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line[:6] for line in lines[:3]] == ["a\\x1b[", "s\\x1b.", "a\\x1b["]
        assert all(line.startswith("  ") for line in lines[3:])  # how it was made
        assert not [line for line in lines[3:] if line.endswith("False")]  # what was not asked for
        assert all(line.isprintable() for line in lines)

    def test_info_describes_videos_and_tokens(self, calls, clip, capsys):
        assert cli.main(["encode", clip, "--out", "t.safetensors"]) == 0
        assert cli.main(["info", "t.safetensors"]) == 0
        assert cli.main(["info", clip]) == 0
        out = capsys.readouterr().out
        assert "deep tokens of 3 keyframes, 4 x 3 each: 2 clips" in out
        assert "in.mp4: a video of 64 x 64, 8 frames a second, 4.00 s" in out

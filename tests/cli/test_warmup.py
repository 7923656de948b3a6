"""A second start compiles nothing: prompts and lengths share programs, which are kept."""

import argparse
import pathlib

import jax
import numpy as np
import pytest
import tiny_ar_diffusion
from jax import monitoring
from PIL import Image
from tiny import tiny_pipeline

import dicode_jax
from dicode_jax import cli
from dicode_jax.cli import landiff
from dicode_jax.cli.arguments import ATTENTION, VIDEO_SUFFIXES
from dicode_jax.media import writer
from dicode_jax.runtime import compile_cache, platform

SHORT, LONG = "a red circle", "a red circle moves right on a black background " * 2


@pytest.fixture
def misses(tmp_path, monkeypatch):
    """Programs that were compiled and not found, as they are; of a cache that is empty."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    before["jax_disable_most_optimizations"] = jax.config.read("jax_disable_most_optimizations")
    settings["jax_disable_most_optimizations"] = True  # not how well matters here
    for name, value in settings.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()
    log = []

    def note(event, **_):
        if event == "/jax/compilation_cache/cache_misses":
            log.append(event)

    monitoring.register_event_listener(note)
    yield log
    monitoring.unregister_event_listener(note)
    for name, value in before.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return ["--model", str(folder), "--steps", "2"]


def generate(model, prompt, num_clips, *more):
    argv = ["generate", prompt, "--out", "a.webp", "--num-clips", str(num_clips), *model, *more]
    assert cli.main(argv) == 0


@pytest.mark.slow
@pytest.mark.long
def test_after_a_warmup_no_prompt_and_no_length_compiles(misses, model, capsys):
    jax.clear_caches()
    assert cli.main(["warmup", "--num-clips", "9", *model]) == 0
    assert misses
    out = capsys.readouterr().out
    assert "denoise" in out
    assert "small ones" in out
    assert f"{pathlib.Path('programs').absolute()}: ready in" in out
    misses.clear()
    jax.clear_caches()  # as in another process
    for prompt, num_clips in ((SHORT, 1), (LONG, 2), (SHORT, 5), (LONG, 9)):
        generate(model, prompt, num_clips)
    pipe = dicode_jax.load(model[1])
    pipe(SHORT, num_inference_steps=2, progress=lambda *_: None)  # step by step
    assert not misses


@pytest.mark.slow
@pytest.mark.long
def test_after_a_warmup_of_ar_diffusion_no_length_and_no_class_compiles(misses, capsys):
    tiny_ar_diffusion.make().save_pretrained("rolling")
    options, image = ["--model", "rolling", "--lag", "4"], np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(image).save("first.png")
    jax.clear_caches()
    assert cli.main(["warmup", *options]) == 0
    assert misses
    assert "advance" in capsys.readouterr().out
    misses.clear()
    jax.clear_caches()
    for prompt, more in (("0", ["5"]), ("Crawling", ["11", "--image", "first.png"])):
        argv = ["generate", prompt, "--out", "a.webp", *options, "--num-frames", *more]
        assert cli.main(argv) == 0
    dicode_jax.load("rolling")(0, num_frames=5, lag=4, callback_on_step_end=lambda *_: None)
    assert not misses
    assert cli.main(["warmup", *options, "--sampler", "unipc"]) == 2
    assert "--guidance-scale and --guidance-interval alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_clips", "offload", "asked"),
    [(1, False, [1]), (2, False, [1, 2]), (9, False, [1, 2, 9]), (9, True, [1, 2])],
)
def test_of_landiff_further_windows_are_run_and_longer_videos_begun(
    monkeypatch, num_clips, offload, asked
):
    begun, clips = [], []

    class Pipe:
        def stream(self, prompt, *, num_clips):
            begun.append(num_clips)
            for _ in range(num_clips):
                clips.append(num_clips)
                yield

    monkeypatch.setattr(landiff, "settings", lambda args, folder: {})
    args = argparse.Namespace(num_clips=num_clips, offload=offload)
    landiff.warm_up(args, pathlib.Path("model"), Pipe(), "a")
    assert begun == asked
    assert clips == [1, 2, 2, 9][: len(clips)]
    assert len(clips) == {1: 1, 2: 3, 3: 4}[len(asked)]


def test_other_kinds_refuse_a_lag(model, capsys):
    assert cli.main(["warmup", *model, "--lag", "2"]) == 2
    assert "is no AR-Diffusion model; leave --lag out" in capsys.readouterr().err
    assert cli.main(["warmup", *model, "--num-frames", "7"]) == 2
    assert "--num-frames: want an even number, got 7" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_cache_nothing_is_kept_or_read(misses, model, capsys, tmp_path):
    jax.clear_caches()
    generate(model, SHORT, 1, "--no-compile-cache")
    assert not list(tmp_path.glob("programs/*"))
    assert jax.config.jax_enable_compilation_cache
    capsys.readouterr()
    assert cli.main(["warmup", *model, "--no-compile-cache"]) == 2
    assert "compiled programs are not kept" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_forms_of_attention_and_batches_paint_the_same(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from dicode_jax.media.video import read_video

    found = []
    for more in ([], ["--attention", "mapped"], ["--clips-per-batch", "1"]):
        generate(model, SHORT, 2, *more)
        found.append(read_video("a.webp").frames.astype(int))
    assert np.abs(found[1] - found[0]).max() <= 1
    assert np.abs(found[2] - found[0]).max() <= 1
    assert platform.attention() == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--clips-per-batch 0", "from 1 to 1800, got 0; or auto"),
        ("--clips-per-batch some", "got 'some'; or auto"),
        ("--attention flash", "invalid choice: 'flash'"),
        ("--attention cudnn", "--attention cudnn is for NVIDIA's GPUs, this is a cpu"),
        ("--no-compile-cach", "unknown option --no-compile-cach; did you mean --no-compile-cache?"),
    ],
)
def test_wrong_options_are_one_line(model, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    argv = ["generate", SHORT, "--out", "a.mp4", *model[:2], *options.split()]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert platform.attention() == "auto"


def test_the_parser_knows_the_same_names_as_what_is_slow_to_import():
    assert ATTENTION == platform.ATTENTION
    assert VIDEO_SUFFIXES == writer.VIDEO_SUFFIXES

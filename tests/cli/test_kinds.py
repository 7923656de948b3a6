"""Every command for every kind of model: what it does, or one line that says what the model can."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from tiny import random_module

import dicode_jax
from dicode_jax import cli
from dicode_jax.cli.video import CAN
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.media import video
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines import base, divot, load
from dicode_jax.pipelines.load import PIPELINES

OLD = pathlib.Path(__file__).parents[1] / "old_models"
DICODE, DYNAMICRAFTER = str(OLD / "dicode"), str(OLD / "dynamicrafter")
FRAMES, TOKENS, WIDTH, FEATURES = 4, 3, 8, (5, 6)
CONFIGS = {
    "unet": UNet3DConfig(
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        temporal_attention=False,
        temporal_conv=False,
        init_attention=False,
        head_dim=8,
        context_dim=WIDTH,
        context_rule="length",
        num_groups=4,
    ),
    "autoencoder": AutoencoderKLConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4, mid_attention=False
    ),
    "resampler": ResamplerConfig(
        dim=16, depth=1, head_dim=8, num_heads=2, num_queries=TOKENS, embed_dim=6, output_dim=WIDTH
    ),
}


@pytest.fixture(scope="module")
def divot_folder(tmp_path_factory):
    parts = {
        name: random_module(lambda kind=kind, name=name: kind(CONFIGS[name], rngs=ShapeRngs()))
        for name, (kind, _) in divot.PARTS.items()
    }
    sampling = SamplingConfig(fs=3, num_frames=FRAMES, num_inference_steps=2)
    config = divot.DivotConfig(frame_size=(8, 16), fps=4.0, sampling=sampling)
    folder = tmp_path_factory.mktemp("models") / "divot"
    divot.DivotDetokenizer(parts, config=config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with two images, a video, deep tokens and features of two clips."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(name)
    video.write_video("in.webp", np.zeros((4, 8, 8, 3), np.uint8), fps=2)
    save_file({"tokens": np.zeros((2, 3, 8), np.float32)}, "t.safetensors")
    features = rng.normal(size=(2, *FEATURES)).astype(np.float32)
    save_file({"features": features, "null_features": 0 * features[0]}, "f.safetensors")
    return tmp_path


def run(*argv):
    assert cli.main([*map(str, argv)]) == 0


def line_of(capsys, *argv):
    """Runs a command that must fail; returns its only line."""
    capsys.readouterr()
    assert cli.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


@pytest.mark.slow
def test_dynamicrafter_paints_what_follows_an_image(work, capsys):
    argv = ["generate", "--model", DYNAMICRAFTER, "--sheet", "sheet.png"]
    run(*argv, "cat", "--image", "a.png", "--out", "a.webp")
    run(*argv, "--image", "b.png", "--out", "b.webp", "--seed", 0, "--steps", 2)
    a, b = (video.read_video(name).frames for name in ("a.webp", "b.webp"))
    assert a.shape == b.shape == (FRAMES, 8, 16, 3)
    assert not np.array_equal(a, b)
    assert f"a.webp: {FRAMES} frames of 16 x 8, 0.5 s" in capsys.readouterr().out
    assert (work / "sheet.png").is_file()


@pytest.mark.slow
def test_divot_paints_a_clip_for_each_set_of_features(work, divot_folder, capsys):
    run("decode", "f.safetensors", "--model", divot_folder, "--out", "a.webp")
    run("decode", "f.safetensors", "--model", divot_folder, "--out", "b.webp", "--seed", 1)
    a, b = (video.read_video(name).frames for name in ("a.webp", "b.webp"))
    assert a.shape == (2 * FRAMES, 8, 16, 3)
    assert not np.array_equal(a, b)
    assert f"a.webp: {2 * FRAMES} frames of 16 x 8, 2 s" in capsys.readouterr().out


@pytest.mark.slow
def test_features_of_one_clip_without_guidance_need_nothing_else(work, divot_folder, capsys):
    save_file({"features": np.ones(FEATURES, np.float32)}, "one.safetensors")
    argv = ["decode", "one.safetensors", "--model", divot_folder, "--out", "a.webp"]
    assert "guidance needs null_features" in line_of(capsys, *argv)
    run(*argv, "--guidance-scale", 1)
    assert len(video.read_video("a.webp").frames) == FRAMES


@pytest.mark.slow
@pytest.mark.long
def test_every_kind_paints_with_the_sampler_that_is_asked_for(work, divot_folder):
    for argv in (
        ["generate", "a red circle grows", "--model", DICODE],
        ["generate", "--image", "a.png", "--model", DYNAMICRAFTER],
        ["decode", "f.safetensors", "--model", divot_folder],
    ):
        for sampler in ("ddim", "dpm++"):
            run(*argv, "--steps", 3, "--sampler", sampler, "--out", f"{sampler}.webp")
        ddim, dpm = (video.read_video(f"{name}.webp").frames for name in ("ddim", "dpm++"))
        assert ddim.shape == dpm.shape
        assert not np.array_equal(ddim, dpm)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
@pytest.mark.long
def test_every_kind_computes_in_the_type_that_is_asked_for(work, divot_folder, monkeypatch, dtype):
    loaded = []
    monkeypatch.setattr(base, "auto_dtype", lambda: jnp.bfloat16)
    monkeypatch.setattr(
        dicode_jax,
        "load",
        lambda *a, **options: loaded.append(load.load(*a, **options)) or loaded[-1],
    )
    for argv in (
        ["generate", "a red circle grows", "--model", DICODE],
        ["generate", "--image", "a.png", "--model", DYNAMICRAFTER],
        ["decode", "f.safetensors", "--model", divot_folder],
    ):
        run(*argv, "--dtype", dtype, "--out", "a.webp")
        assert video.read_video("a.webp").frames.std() > 0
        leaves = jax.tree.leaves([nnx.state(part) for part in loaded[-1].parts.values()])
        assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_a_cpu_refuses_float16_in_one_line(work, capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="cpu")])
    argv = ["generate", "cat", "--model", DICODE, "--dtype", "float16", "--out", "a.webp"]
    assert "does not compute in float16; take --dtype float32 or bf" in line_of(capsys, *argv)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, jnp.float32),
        ("tpu", None, jnp.bfloat16),
        ("gpu", "7.5", jnp.float16),
        ("gpu", "8.0", jnp.bfloat16),
        ("gpu", "10.0", jnp.bfloat16),
    ],
)
def test_auto_takes_what_the_device_has(monkeypatch, platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert base.auto_dtype() is dtype


def test_info_describes_every_kind(work, divot_folder, capsys):
    for kind, folder in (("dynamicrafter", DYNAMICRAFTER), ("divot", divot_folder)):
        run("info", folder)
        out = capsys.readouterr().out
        assert f"{'kind':<16} {kind}\n" in out
        assert f"{'clip':<16} {FRAMES} frames of 16 x 8 at " in out
        assert f"{'sampling':<16} 2 steps of ddim, guidance 7.5" in out
    run("info", "f.safetensors")
    assert "f.safetensors: features of 2 clips, 5 x 6 each" in capsys.readouterr().out


def test_every_kind_has_a_line_on_what_it_can():
    assert set(CAN) == set(PIPELINES)


@pytest.mark.parametrize(
    ("argv", "model", "message"),
    [
        ("encode in.webp --out x.safetensors", DYNAMICRAFTER, "not encode; it generates from --im"),
        ("reconstruct in.webp --out x.webp", DYNAMICRAFTER, "does not reconstruct; it generates"),
        ("decode t.safetensors --out x.webp", DYNAMICRAFTER, "does not decode; it generates"),
        ("generate cat --out x.webp", DYNAMICRAFTER, "goes on from an image; name it with --image"),
        ("generate --image a.png --num-clips 2 --out x.webp", DYNAMICRAFTER, "paints one clip"),
        ("generate --image a.png --last-image b.png --out x.webp", DYNAMICRAFTER, "interpolation"),
        ("generate --image in.webm --out x.webp", DYNAMICRAFTER, "in.webm"),
        ("generate --last-image a.png --out x.webp", DYNAMICRAFTER, "--last-image goes with"),
        ("continue in.webp --out x.webp", DYNAMICRAFTER, "goes on from an image"),
        ("interpolate a.png a.txt --out x.webp", DICODE, "a.txt"),
        ("interpolate a.png b.png --out x.webp", None, "does not interpolate; it decodes"),
        ("decode f.safetensors --out x.webp", DICODE, "'dicode', decodes tokens"),
        ("generate cat --out x.webp", None, "does not generate; it decodes features"),
        ("encode in.webp --out x.safetensors", None, "does not encode; it decodes features"),
        ("decode t.safetensors --out x.webp", None, "holds tokens; .* decodes features"),
        ("decode f.safetensors --out x.webp --num-frames 8", None, "leave --num-frames out"),
        ("decode f.safetensors --out x.webp --seed 4294967295", None, "seed: sample i of 2"),
    ],
)
def test_what_a_kind_cannot_do_is_one_line(work, divot_folder, capsys, argv, model, message):
    before = sorted(work.iterdir())
    line = line_of(capsys, *argv.split(), "--model", model or divot_folder)
    assert re.search(message, line), line
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros(5, np.float32)}, r"\[5\]; want features \[l, e\]"),
        ({"features": np.zeros((5, 6), np.int32)}, "int32"),
        ({"features": np.full((5, 6), np.nan, np.float32)}, "not finite"),
        ({"null_features": np.zeros((5, 6), np.float32)}, "holds null_features, not deep tokens"),
    ],
)
def test_files_of_no_features_are_refused(work, divot_folder, capsys, arrays, message):
    save_file(arrays, "bad.safetensors")
    argv = ["decode", "bad.safetensors", "--model", divot_folder, "--out", "x.webp"]
    assert re.search(message, line_of(capsys, *argv))

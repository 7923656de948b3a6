"""Latents on disk, encoded here or by the release, and a run on them that stops and goes on."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_ar_diffusion import DIT, VAE, alive

import dicode_jax
from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.shapes_world import COLORS, SHAPES, scene_at
from dicode_jax.data.sources.open import open_source
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.dit import DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE
from dicode_jax.models.patch_discriminator import PatchDiscriminatorConfig
from dicode_jax.stages.ar_diffusion import dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig, FrameVAETrainConfig
from dicode_jax.stages.ar_diffusion.examples import open_latents
from dicode_jax.stages.export import Exported, export
from dicode_jax.storage import weights
from dicode_jax.training.optim import OptimConfig
from train import ar_diffusion, ar_diffusion_vae, encode, import_latents, loop

NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    model = alive(FrameVAE(VAE, rngs=nnx.Rngs(1)), 1)
    weights.save_module(folder, model, VAE)
    return str(folder), model


@pytest.fixture(scope="module")
def config(vae):
    return DiTTrainConfig(
        model=DenoiserConfig(dit=DIT, num_classes=32),
        class_names=NAMES,
        vae=vae[0],
        data=DataConfig(num_frames=4, validation=0.0),
        optim=OptimConfig(optimizer="sgd", lr=0.1, warmup_steps=0, schedule="constant"),
        ema_decay=0.9,
        num_steps=4,
        batch_size=2,
        validation_examples=2,
        sample_steps=2,
        sample_lag=1,
    )


@pytest.fixture(scope="module")
def cache(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "c"
    encode.encode(config, encode.EncodeOptions(out=out, limit=3))
    return out


def test_a_cache_holds_the_latents_of_all_frames_of_its_videos(config, cache, vae):
    held = EncodedCache(cache)
    source = open_source(config.data, split="train", seed=0)
    assert held.lengths("latents").tolist() == [4, 4, 4]
    reader = encode.find_encoder(config).read
    for i in range(3):
        record, rng = source.record(i), np.random.default_rng(0)
        assert (held[i].name, held[i].captions) == (record.name, record.captions)
        frames = jnp.asarray(reader(record, rng)["frames"])
        assert frames.shape == (4, 8, 8, 3)
        want = vae[1].encode(frames[None] / 255)[0]
        np.testing.assert_allclose(held[i].arrays["latents"], want, atol=1e-5)
    settled = dit.settle(
        dataclasses.replace(config, data=DataConfig(path=str(cache), num_frames=4, validation=0.0))
    )
    clips = open_latents(settled, "train")
    words = scene_at(0, 1, "train").attributes
    assert clips(1, rng)["classes"] == NAMES.index(f"{words.color} {words.shape}")


@pytest.mark.slow
def test_a_run_that_stops_goes_on_to_the_same_bits(config, cache, tmp_path):
    data = DataConfig(path=str(cache), num_frames=4)

    def train(name, steps, **changes):
        changed = dataclasses.replace(config, data=data, **changes)
        options = loop.RunOptions(workdir=tmp_path / name, steps=steps, checkpoint_every=2)
        loop.run(ar_diffusion.build(changed, tmp_path / name), options)
        config_lib.to_json(changed, tmp_path / name / "config.json")

    train("whole", 4)
    train("parts", 2, vae=None)  # without sheets, which draw from no stream of the training
    train("parts", 4, vae=None)
    one, two = (
        weights.read_arrays(tmp_path / name / "model/denoiser/model.safetensors")
        for name in ("whole", "parts")
    )
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], name)
    assert (tmp_path / "whole/samples/000004.png").exists()
    made = export(
        tmp_path / "whole", tmp_path / "pipe", dtype="float16", settings=["sampling.lag=2"]
    )
    assert made == Exported(4, True, True)
    pipe = dicode_jax.load(tmp_path / "pipe")
    assert pipe.config.sampling.lag == 2
    held = weights.read_arrays(tmp_path / "pipe/denoiser/model.safetensors")
    assert {str(x.dtype) for x in held.values()} == {"float16"}
    for name, array in one.items():
        np.testing.assert_array_equal(held[name], array.astype(np.float16), name)
    for odd, said in (({"dtype": "float16"}, "--dtype"), ({"settings": ["fps=4"]}, "--set")):
        with pytest.raises(UserError, match=f"gives no pipeline, so that {said} says nothing"):
            export(tmp_path / "parts", tmp_path / "none", **odd)
    assert not (tmp_path / "none").exists()


@pytest.mark.long
def test_optimisers_that_take_turns_go_on_from_a_lost_end_to_the_same_bits(tmp_path):
    config = FrameVAETrainConfig(
        model=VAE,
        frame_size=VAE.image_size,
        data=DataConfig(num_frames=4),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
        batch_size=2,
        validation_examples=2,
        disc_start=1,
        discriminator=PatchDiscriminatorConfig(channels=4, num_layers=1),
    )

    def train(name, steps):
        workdir = tmp_path / name
        options = loop.RunOptions(workdir=workdir, steps=steps, checkpoint_every=3, log_every=1)
        loop.run(ar_diffusion_vae.build(config, workdir), options)

    train("whole", 8)
    train("parts", 5)
    shutil.rmtree(tmp_path / "parts/checkpoints/5")  # killed before it came to be
    train("parts", 8)
    seen = {name: read_steps(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")}
    assert [step for step, _ in seen["parts"]] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    whole = dict(seen["whole"])
    assert all(told == whole[step] for step, told in seen["parts"])
    assert {"hinge" in told for told in whole.values()} == {True, False}  # both had turns
    one, two = (weights.read_arrays(tmp_path / name / "model/model.safetensors") for name in seen)
    assert one.keys() == two.keys()
    assert all(np.array_equal(array, two[name]) for name, array in one.items())


def read_steps(path):
    """Step and what was logged of its training, in the order of the log, without speeds."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    left = ("step", "frames_per", "validation")
    return [(r["step"], {k: v for k, v in r.items() if not k.startswith(left)}) for r in records]


def test_latents_of_the_release_are_imported_with_their_class(vae, config, tmp_path, capsys):
    folder, rng = tmp_path / "npy", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    latents = rng.normal(size=(2, 4, 4, 1, 3)).astype(np.float32)
    np.save(folder / "0000_00_v_1_g01.npy", latents[0])
    np.save(folder / "more" / "0000_01_v_0_g01.npy", latents[1])
    args = [str(folder), "--vae", vae[0], "--out", str(tmp_path / "c")]
    assert import_latents.main(args) == 0
    assert "2 clips, 8 frames" in capsys.readouterr().out
    settled = dataclasses.replace(
        config,
        model=DenoiserConfig(dit=DIT, num_classes=2),
        class_names=(),
        data=DataConfig(path=str(tmp_path / "c"), num_frames=4, validation=0.0),
    )
    clips = open_latents(dit.settle(settled), "train")
    for i, want in enumerate((1, 0)):
        found = clips(i, rng)
        assert found["classes"] == want
        np.testing.assert_array_equal(found["latents"], latents[i, :, :, 0].swapaxes(1, 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 1, 4), np.float32), r"of shape \(4, 3, 1, 4\), .* \[f, 4, 1, 3\]"),
        (np.full((4, 4, 1, 3), np.nan, np.float32), "not finite"),
        (np.zeros((4, 4, 1, 3), np.int32), "holds int32"),
        (b"no array", "is not a readable"),
    ],
)
def test_what_is_no_clip_of_latents_is_named_and_no_cache_is_left(vae, tmp_path, array, message):
    path = tmp_path / "npy" / "a.npy"
    path.parent.mkdir()
    path.write_bytes(array) if isinstance(array, bytes) else np.save(path, array)
    with pytest.raises(encode.UserError, match=message):
        import_latents.import_latents(path.parent, *map(type(path), (vae[0], tmp_path / "c")))
    assert not (tmp_path / "c" / "manifest.json").exists()

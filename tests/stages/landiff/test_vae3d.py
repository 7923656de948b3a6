"""Training of the causal autoencoder: its configs, what learns, its clips and what it writes."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.data.sources.open import open_source
from dicode_jax.media.transforms import to_float
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.nn.causal_conv import CausalConv, Past
from dicode_jax.nn.rngs import blank
from dicode_jax.stages import pixel_losses
from dicode_jax.stages.landiff import vae3d
from dicode_jax.stages.landiff.config import VAE3DTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.evaluate import jit_local

FOLDER = pathlib.Path(__file__).parents[3] / "configs" / "landiff"
MODEL = AutoencoderCausal3DConfig(
    channels=4, encoder_mult=(1, 2), decoder_mult=(1, 2), encoder_blocks=1, decoder_blocks=1,
    z_channels=3, time_factor=2, num_groups=2,
)  # fmt: skip
CONFIG = VAE3DTrainConfig(
    model=MODEL, data=DataConfig(num_frames=5), frame_size=16, crop_size=8, batch_size=2
)


@pytest.fixture(scope="module")
def model():
    return vae3d.Trained(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("name", "count"), [("released", 215_583_907), ("shapes", 765_315)])
def test_a_config_survives_json_and_names_the_model(name, count):
    config = config_lib.load_config_file(FOLDER / f"{name}_vae.py")
    assert config_lib.from_dict(type(config), config_lib.to_dict(config)) == config
    model = blank(build_stage(config).create)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model.vae))) == count


def test_the_loss_has_a_gradient_for_all_that_is_trained():
    stage = build_stage(config_lib.load_config_file(FOLDER / "shapes_vae.py"))
    graph, trained, frozen = nnx.split(blank(stage.create), stage.is_trained, ...)
    assert not jax.tree.leaves(frozen)

    def loss(trained, batch):
        return stage.loss_fn(nnx.merge(graph, trained, frozen), batch, jax.random.key(0))

    step = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), grads = jax.eval_shape(step, trained, stage.batch_shapes(2))
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert all(metric.shape == () for metric in metrics.values())
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_a_run_learns_from_squares_that_are_drawn_from_whole_clips():
    record = open_source(CONFIG.data, split="train", seed=0).record(0)
    whole = vae3d.reader(CONFIG)(record, np.random.default_rng(0))["video"]
    assert whole.shape == (5, 16, 16, 3)
    squares = [
        vae3d.reader(CONFIG, 8)(record, np.random.default_rng(seed))["video"] for seed in (0, 1)
    ]
    assert {square.shape for square in squares} == {(5, 8, 8, 3)}
    found = [
        (y, x)
        for y in range(9)
        for x in range(9)
        if np.array_equal(whole[:, y : y + 8, x : x + 8], squares[0])
    ]
    assert found  # of the same clip, as the same generator draws its start first
    shapes = build_stage(CONFIG).batch_shapes(2)
    assert shapes["video"].shape == (2, 5, 8, 8, 3)


def test_the_loss_is_that_of_chunks_of_drawn_latents(model):
    """In float64, of what the model says one call after the other."""
    rng = np.random.default_rng(1)
    video = rng.integers(0, 255, (2, 5, 8, 8, 3)).astype(np.uint8)
    config = dataclasses.replace(CONFIG, squared_weight=0.7, edge_weight=0.3, kl_weight=0.2)
    keys = jax.random.split(jax.random.key(3), 2)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, video):
        model = nnx.merge(graph, state)
        loss, metrics = vae3d.loss_fn(config, model, {"video": video}, keys)
        posterior = model.vae.encode(to_float(video))
        return loss, metrics, posterior, model.vae.decode_chunk(posterior.sample(keys))[0]

    loss, metrics, posterior, made = run(state, jnp.asarray(video))
    error = np.asarray(made, np.float64) - (video / 127.5 - 1)
    sides, spans = 0.0, error
    for scale in range(3):
        if scale:
            spans = spans.reshape(2, 5, len(spans[0, 0]) // 2, 2, -1, 2, 3).mean((3, 5))
        sides += np.abs(np.diff(spans, axis=2)).mean() + np.abs(np.diff(spans, axis=3)).mean()
    kl = np.mean([posterior.kl()]) / posterior.mean[0].size
    want = np.abs(error).mean() + 0.7 * np.square(error).mean() + 0.3 * sides / 3 + 0.2 * kl
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    of_clips = 10 * np.log10(4 / np.square(error).mean((1, 2, 3, 4)))
    np.testing.assert_allclose(metrics["psnr"], of_clips.mean(), rtol=1e-5)


def test_what_learned_single_frames_sees_each_frame_alone_when_it_is_inflated(model, tmp_path):
    rngs = nnx.Rngs(1)
    of_frames, of_clips = (CausalConv(2, 3, rngs=rngs) for _ in range(2))
    of_clips.kernel[...] = jnp.asarray(vae3d.inflated(of_frames.kernel[...]))
    clip = jax.random.normal(jax.random.key(0), (1, 4, 5, 5, 2))
    alone = [of_frames(clip[:, i : i + 1], Past()) for i in range(4)]
    got = of_clips(clip, Past())
    np.testing.assert_allclose(got, jnp.concatenate(alone, axis=1), rtol=1e-5, atol=1e-5)
    assert not np.allclose(of_frames(clip, Past())[:, 1:], got[:, 1:], atol=0.1)

    weights.save_module(tmp_path, model.vae, MODEL)
    config = dataclasses.replace(CONFIG, init=str(tmp_path), inflate=True)
    loaded = build_stage(config).load()
    before = {("vae", *path): x.get_value() for path, x in nnx.to_flat_state(nnx.state(model.vae))}
    assert loaded.keys() == before.keys()
    for path, x in loaded.items():
        is_changed = x.ndim == 5
        np.testing.assert_array_equal(
            x, vae3d.inflated(before[path]) if is_changed else before[path]
        )
    with pytest.raises(ValueError, match="inflate changes what init names"):
        dataclasses.replace(CONFIG, inflate=True)


def test_an_encoder_that_stays_keeps_its_scale(model, tmp_path):
    weights.save_module(tmp_path / "old", model.vae, dataclasses.replace(MODEL, scale_factor=0.7))
    config = dataclasses.replace(CONFIG, init=str(tmp_path / "old"), train_encoder=False)
    vae3d.export(config, model, tmp_path / "new")
    stored = weights.load_module(tmp_path / "new", AutoencoderCausal3D, AutoencoderCausal3DConfig)
    assert stored[1].scale_factor == 0.7


def test_an_encoder_that_stays_is_left_out_of_what_learns():
    stage = build_stage(dataclasses.replace(CONFIG, init="x", train_encoder=False))
    _, trained, frozen = nnx.split(blank(stage.create), stage.is_trained, ...)
    assert {path[1] for path, _ in nnx.to_flat_state(trained)} == {"decoder"}
    assert {path[1] for path, _ in nnx.to_flat_state(frozen)} == {"encoder"}
    for change in ({}, {"init": "x", "inflate": True}):
        with pytest.raises(ValueError, match="an encoder that stays is that of init"):
            dataclasses.replace(CONFIG, train_encoder=False, **change)


def test_psnr_ends_a_hundred_decibels_below_the_span():
    np.testing.assert_allclose(pixel_losses.psnr(jnp.zeros((2, 3)), 2.0), 100.0)
    np.testing.assert_allclose(pixel_losses.psnr(jnp.full((2, 3), 0.2), 2.0), 20.0, rtol=1e-6)


def test_what_is_written_has_latents_of_variance_one(model, tmp_path):
    config = dataclasses.replace(CONFIG, frame_size=8)
    vae3d.export(config, model, tmp_path)
    stored, cfg = weights.load_module(tmp_path, AutoencoderCausal3D, AutoencoderCausal3DConfig)
    record = open_source(CONFIG.data, split="validation", seed=0)
    read = vae3d.reader(config)
    clips = [read(record.record(i), np.random.default_rng(i))["video"] for i in range(16)]
    run = jit_local(lambda vae, video: vae.encode_latents(to_float(video)))
    latents = np.stack([run(stored, clip[None]) for clip in clips])
    assert 0.8 < np.std(latents) < 1.25  # of other clips than those it was measured on
    assert cfg == dataclasses.replace(MODEL, scale_factor=cfg.scale_factor)


def test_lpips_judges_and_does_not_learn(tmp_path):
    tiny = LPIPSConfig(widths=((4,), (6,)))
    weights.save_module(tmp_path, LPIPS(tiny, rngs=nnx.Rngs(3)), tiny)
    stage = build_stage(dataclasses.replace(CONFIG, lpips=str(tmp_path)))
    judged = blank(stage.create)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.split(judged, stage.is_trained, ...)[1])} \
        == {"vae"}  # fmt: skip
    assert all(path[0] == "lpips" for path in stage.load())
    batch = {"video": jax.ShapeDtypeStruct((1, 5, 8, 8, 3), jnp.uint8)}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    _, metrics = jax.eval_shape(stage.loss_fn, judged, batch, keys)
    assert "lpips" in metrics
    assert "edges" not in metrics


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": DataConfig(num_frames=7)}, r"4 m \+ 1 frames"),
        ({"crop_size": 5}, "crop_size must be a multiple of 2, got 5"),
        ({"frame_size": 6}, "crop_size must be at most the frame_size 6, got 8"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative, got -1.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)

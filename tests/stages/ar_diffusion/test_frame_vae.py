"""Stage 1 of AR-Diffusion: its configs, what learns, where it starts and what it writes."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_ar_diffusion import VAE

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.ar_diffusion import frame_vae
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.setup import prepare

FOLDER = pathlib.Path(__file__).parents[3] / "configs" / "ar_diffusion"
FILES = sorted(p for p in FOLDER.glob("*_vae*.py") if "get_config" in p.read_text())
MODEL = dataclasses.replace(VAE, image_size=16)
CONFIG = FrameVAETrainConfig(
    model=MODEL,
    data=DataConfig(num_frames=3),
    optim=OptimConfig(lr=1e-2, warmup_steps=0),
    num_steps=30,
    batch_size=4,
    frame_size=16,
)
PROXY = AutoencoderKLConfig(
    channels=4, channel_mult=(1, 2), num_res_blocks=1, num_groups=2, scale_factor=0.5
)
KEY = jax.random.key(1)
IMAGES = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configs_survive_json_and_build(path, tmp_path):
    config = config_lib.load_config_file(path)
    again = config_lib.from_dict(type(config), config_lib.to_dict(config))
    assert again == config
    if config.proxy is not None:
        weights.save_module(tmp_path, AutoencoderKL(PROXY, rngs=nnx.Rngs(3)), PROXY)
        config = dataclasses.replace(config, proxy=str(tmp_path))
    model = blank(build_stage(config).create).vae
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    counts = {"sky_vae_time": 842_713_355}
    counts |= dict.fromkeys(("shapes_vae", "shapes_vae_pixels"), 1_631_683)
    assert count == counts.get(path.stem, 640_993_547)


def test_the_files_of_the_release_are_there():
    names = {path.stem for path in FILES}
    assert {"sky_vae", "taichi_vae", "ucf101_vae", "face_vae", "sky_vae_time"} <= names


@pytest.mark.long
def test_the_loss_falls_and_the_model_is_written(tmp_path):
    stage = build_stage(CONFIG)
    prepared = prepare(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))
    state, losses = prepared.state, []
    for _ in range(30):
        state, metrics = prepared.train_step(state, {"image": jnp.asarray(IMAGES)})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    model = prepared.model_of(state)
    stage.export(model, tmp_path / "model")
    stored, cfg = weights.load_module(tmp_path / "model", FrameVAE, FrameVAEConfig)
    assert cfg == MODEL
    got = frame_vae.from_unit(stored(frame_vae.to_unit(jnp.asarray(IMAGES[:, None])))[0])[:, 0]
    np.testing.assert_array_equal(got, frame_vae.reconstruct(model, jnp.asarray(IMAGES)))


def test_noise_of_a_fixed_size_leaves_the_posterior_s_own_out():
    fixed = dataclasses.replace(CONFIG, token_noise=0.1)
    graph, state = nnx.split(frame_vae.Trained(CONFIG, rngs=nnx.Rngs(0)))
    batch, keys = {"image": jnp.asarray(IMAGES)}, jax.random.split(jax.random.key(1), 4)

    @jax.jit
    def l1(state, logvar):
        model = nnx.merge(graph, state)
        bias = model.vae.moments_proj.bias
        bias[...] = bias[...].at[MODEL.token_dim :].set(logvar)
        return frame_vae.loss_fn(fixed, model, batch, keys)[1]["l1"]

    assert l1(state, -9.0) == l1(state, 20.0)
    with pytest.raises(ValueError, match="token_noise must not be negative, got -1"):
        dataclasses.replace(CONFIG, token_noise=-1)


def test_logits_of_codes_weigh_by_their_spread_over_the_codes():
    plain = dataclasses.replace(CONFIG, token_noise=0.0)
    weighed = dataclasses.replace(plain, logit_weight=0.25)
    model = frame_vae.Trained(CONFIG, rngs=nnx.Rngs(0))
    model.vae.code_logits.bias[...] += 3.0  # which no softmax sees
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        model, batch = nnx.merge(graph, state), {"image": jnp.asarray(IMAGES)}
        keys = jax.random.split(jax.random.key(1), 4)
        losses = [frame_vae.loss_fn(c, model, batch, keys)[0] for c in (plain, weighed)]
        latents = model.vae.posterior(frame_vae.to_unit(batch["image"])).mode()
        return losses, model.vae.logits(model.vae.patches(latents[:, None]))

    (without, with_weight), logits = run(state)
    spread = np.var(np.asarray(logits, np.float64), axis=-1).mean()
    np.testing.assert_allclose(with_weight - without, 0.25 * spread, rtol=1e-4)


def test_pixels_read_off_the_patches_weigh_and_are_not_exported(tmp_path):
    quiet = dataclasses.replace(CONFIG, token_noise=0.0)
    read = dataclasses.replace(quiet, patch_weight=0.5)
    stage = build_stage(read)
    model = frame_vae.Trained(read, rngs=nnx.Rngs(0))
    kernel = model.patch_head.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    model.patch_head.bias[...] += 0.25  # whatever the patches hold
    batch, keys = {"image": jnp.asarray(IMAGES)}, jax.random.split(jax.random.key(1), 4)
    without, with_weight = (
        jax.jit(functools.partial(frame_vae.loss_fn, config))(model, batch, keys)[0]
        for config in (quiet, read)
    )
    want = np.square(0.25 - IMAGES / 255.0).mean()
    np.testing.assert_allclose(with_weight - without, 0.5 * want, rtol=1e-4)
    assert stage.is_trained(("patch_head", "kernel"), None)
    stage.export(model, tmp_path / "model")
    weights.load_module(tmp_path / "model", FrameVAE, FrameVAEConfig)
    with pytest.raises(ValueError, match="patch_weight must not be negative, and 0 for the temp"):
        dataclasses.replace(with_time("x"), patch_weight=1.0)


def test_a_proxys_latents_are_read_off_the_patches_without_the_pixel_decoder(tmp_path):
    proxy = AutoencoderKL(PROXY, rngs=nnx.Rngs(3))
    weights.save_module(tmp_path / "proxy", proxy, PROXY)
    config = dataclasses.replace(
        CONFIG, token_noise=0.0, pixel_weight=0, patch_weight=2.0, proxy=str(tmp_path / "proxy")
    )
    stage = build_stage(config)
    assert not stage.is_trained(("proxy", "encoder"), None)
    model = frame_vae.Trained(config, rngs=nnx.Rngs(0))
    loaded = stage.load()
    assert {path[0] for path in loaded} == {"proxy"}
    model.proxy = proxy
    kernel = model.patch_head.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    model.patch_head.bias[...] += 0.25  # whatever the patches hold
    batch, keys = {"image": jnp.asarray(IMAGES)}, jax.random.split(KEY, 4)
    loss, metrics = jax.jit(functools.partial(frame_vae.loss_fn, config))(model, batch, keys)
    latents = 0.5 * proxy.encode(jnp.asarray(IMAGES / 127.5 - 1, jnp.float32)).mode()
    np.testing.assert_allclose(loss, 2 * np.square(0.25 - np.asarray(latents)).mean(), rtol=1e-4)
    assert "psnr" not in metrics

    wider = dataclasses.replace(PROXY, channel_mult=(1, 2, 2, 2))
    weights.save_module(tmp_path / "wide", AutoencoderKL(wider, rngs=nnx.Rngs(3)), wider)
    with pytest.raises(UserError, match="a latent for 8 pixels, of which the decoder's patch_size"):
        build_stage(dataclasses.replace(config, proxy=str(tmp_path / "wide")))
    for name in ("pixel_weight", "proxy"):
        with pytest.raises(ValueError, match="the patches are read: set patch_weight"):
            dataclasses.replace(CONFIG, **{name: getattr(config, name)})
    with pytest.raises(ValueError, match="judges what the pixel decoder makes: set pixel_weight"):
        dataclasses.replace(config, disc_start=0)


def test_an_encoder_that_is_kept_does_not_learn_and_comes_from_somewhere(tmp_path):
    model = frame_vae.Trained(CONFIG, rngs=nnx.Rngs(0))
    weights.save_module(tmp_path / "vae", model.vae, MODEL)
    config = dataclasses.replace(CONFIG, init=str(tmp_path / "vae"), train_encoder=False)
    stage = build_stage(config)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    still = {path[:2] for path in paths if not stage.is_trained(path, None)}
    assert still == {("vae", "encoder"), ("vae", "moments_proj")}
    with pytest.raises(ValueError, match="has to come from init: name its folder"):
        dataclasses.replace(CONFIG, train_encoder=False)


def test_probes_read_the_latents_and_know_the_drawn_world_alone(tmp_path):
    quiet = dataclasses.replace(CONFIG, token_noise=0.0)
    probed = dataclasses.replace(quiet, probe_weight=2.0)
    stage = build_stage(probed)
    model = frame_vae.Trained(probed, rngs=nnx.Rngs(0))
    for probe in model.probes:  # sure of the first class, whatever the latents are
        probe.kernel[...] = jnp.zeros_like(probe.kernel[...])
        probe.bias[...] = probe.bias[...].at[0].set(1.0)
    labels = jnp.zeros((4, 3), jnp.int32).at[0, 0].set(1)
    assert stage.batch_shapes(4)["labels"].shape == labels.shape
    batch, keys = {"image": jnp.asarray(IMAGES), "labels": labels}, jax.random.split(KEY, 4)
    without, _ = jax.jit(functools.partial(frame_vae.loss_fn, quiet))(model, batch, keys)
    loss, metrics = jax.jit(functools.partial(frame_vae.loss_fn, probed))(model, batch, keys)
    assert (metrics["probe_color"], metrics["probe_shape"]) == (0.75, 1)
    counts = [probe.bias.shape[0] for probe in model.probes]
    right = [np.log(np.e + n - 1) - 1 for n in counts]
    want = (np.sum(right) + 0.25) / 3  # a quarter of the colours is wrong by one logit
    np.testing.assert_allclose(loss - without, 2 * want, rtol=1e-4)
    videos = dataclasses.replace(probed, data=dataclasses.replace(CONFIG.data, path=str(tmp_path)))
    with pytest.raises(UserError, match="know the synthetic world only"):
        build_stage(videos)


@pytest.fixture
def stored(tmp_path):
    weights.save_module(tmp_path / "vae", FrameVAE(MODEL, rngs=nnx.Rngs(5)), MODEL)
    return str(tmp_path / "vae")


def with_time(init):
    model = dataclasses.replace(MODEL, temporal=True)
    return dataclasses.replace(CONFIG, model=model, init=init)


@pytest.mark.long
def test_only_the_temporal_part_learns_and_the_rest_is_what_it_started_from(stored):
    stage = build_stage(with_time(stored))
    prepared = prepare(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))
    video = jnp.asarray(np.stack([np.roll(IMAGES, i, axis=1) for i in range(3)], axis=1))
    paths = {path[:2] for path, _ in nnx.to_flat_state(prepared.state.params)}
    assert paths == {("vae", "temporal")}
    before = prepared.model_of(prepared.state)
    frozen = weights.load_module(stored, FrameVAE, FrameVAEConfig)[0]
    want = frozen(frame_vae.to_unit(video))[0]  # at the start it decodes frame by frame
    np.testing.assert_allclose(before.vae(frame_vae.to_unit(video))[0], want, atol=1e-5)
    _, metrics = prepared.train_step(prepared.state, {"video": video})
    assert metrics["grad_norm"] > 0


def test_a_start_of_other_sizes_or_none_is_refused(stored):
    with pytest.raises(ValueError, match="name its folder as init"):
        with_time(None)
    other = dataclasses.replace(CONFIG, init=stored, model=dataclasses.replace(MODEL, num_tokens=4))
    with pytest.raises(UserError, match="VAE of other sizes"):
        build_stage(other).load()
    with pytest.raises(ValueError, match="frame_size must be the model's image_size, got 32"):
        dataclasses.replace(CONFIG, frame_size=32)


@pytest.mark.long
def test_lpips_judges_and_does_not_learn(tmp_path):
    tiny = LPIPSConfig(widths=((4,), (6,)))
    weights.save_module(tmp_path / "lpips", LPIPS(tiny, rngs=nnx.Rngs(3)), tiny)
    stage = build_stage(dataclasses.replace(CONFIG, lpips=str(tmp_path / "lpips")))
    prepared = prepare(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))
    assert {path[0] for path, _ in nnx.to_flat_state(prepared.state.params)} == {"vae"}
    _, metrics = prepared.train_step(prepared.state, {"image": jnp.asarray(IMAGES)})
    assert metrics["lpips"] != 0
    assert "edges" not in metrics

"""The regression of keyframes, and of frames between two, from deep tokens."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module, tiny_pipeline

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.dicode import representation, tokenizer
from dicode_jax.stages.dicode.configs import RepresentationTrainConfig, TokenizerTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.dicode.representation_model import RepresentationConfig

PLACE = np.array([0.25, 0.8], np.float32)


@pytest.fixture(scope="module")
def regression():
    """A config that reads frames between, and its modules."""
    pipe = tiny_pipeline()
    head = dataclasses.replace(
        pipe.tokenizer.cfg.resampler, embed_dim=8, num_queries=4, output_shape=(8, 8, 4)
    )
    config = RepresentationTrainConfig(
        model=RepresentationConfig(tokenizer=pipe.tokenizer.cfg, head=head, probe_classes=(3,)),
        autoencoder="runs/autoencoder/model",
        frame_size=16,
        probe_weight=0.0,
        between_weight=4.0,
    )
    build = lambda: representation.Regression(  # noqa: E731
        config, pipe.decoder.cfg.autoencoder, rngs=ShapeRngs()
    )
    return config, random_module(build)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).integers(256, size=(2, 3, 16, 16, 3)), jnp.uint8)


def test_the_image_between_is_that_of_tokens_between(regression, images):
    model = regression[1].model
    keyframes = to_float(images[:, ::2])
    places = np.stack([np.zeros(2), PLACE, np.ones(2)], 1).astype(np.float32)
    got, probed = model.between(keyframes, jnp.asarray(places))
    first, rear = model.tokenizer(keyframes).swapaxes(0, 1)
    between = first + PLACE[:, None, None] * (rear - first)
    for i, tokens in enumerate((first, between, rear)):
        np.testing.assert_allclose(got[:, i], model.head(tokens), atol=2e-5)
    alone, probes = model(keyframes[:, 0])
    np.testing.assert_allclose(got[:, 0], alone, atol=2e-5)
    np.testing.assert_allclose(probed[0], probes[0], atol=1e-5)


def test_a_row_is_read_the_same_beside_any_other(regression, images):
    model, keys = regression[1].model, jax.random.split(jax.random.key(3), 2)
    keyframes, place = to_float(images[:, ::2]), jnp.asarray(PLACE)[:, None]
    both, _ = model.between(keyframes, place, keys)
    alone, _ = model.between(keyframes[1:], place[1:], keys[1:])
    np.testing.assert_allclose(both[1:], alone, atol=2e-5)
    assert np.abs(both - model.between(keyframes, place)[0]).max() > 1e-3


@pytest.mark.parametrize("trained", ["all", "path"])
def test_the_frame_between_weighs_what_the_config_says(regression, images, monkeypatch, trained):
    config, model = regression
    config = types.SimpleNamespace(**vars(config) | {"trained": trained, "has_between": True})
    config.has_labels = False
    places = []

    def nothing(model, keyframes, asked, keys):  # so that the error is the target
        places.append(asked)
        return jnp.zeros((*asked.shape, 8, 8, 4)), []

    monkeypatch.setattr(type(model.model), "between", nothing)
    batch = {"image": images, "place": jnp.asarray(PLACE)}
    target = np.stack(
        [model.autoencoder.encode(to_float(images[:, i])).mode() for i in range(3)], 1
    )
    target = model.autoencoder.cfg.scale_factor * target
    weight = np.array([1, 4, 1]) / 2
    if trained == "path":
        target, weight = target[:, 1:2], np.array([4])
    weight = weight[:, None, None, None]
    loss, metrics = representation.loss_fn(config, model, batch, jax.random.key(0))
    mse = np.mean(weight * target**2)
    np.testing.assert_allclose(metrics["mse"], mse, rtol=1e-5)
    between = target[:, target.shape[1] // 2]
    np.testing.assert_allclose(metrics["between_mse"], np.mean(between**2), rtol=1e-5)
    np.testing.assert_allclose(loss, mse + 0.1 * np.mean(weight * np.abs(target)), rtol=1e-5)
    want = np.stack([np.zeros(2), PLACE, np.ones(2)], 1) if trained == "all" else PLACE[:, None]
    np.testing.assert_allclose(places[0], want)


def test_pixels_are_weighed_too_and_everything_learns(regression, images):
    config, model = regression
    config = dataclasses.replace(config, pixel_weight=1.0)
    graph, trained, frozen = nnx.split(model, lambda path, _: path[0] == "model", ...)
    batch = {"image": images, "place": jnp.asarray(PLACE)}

    @jax.jit
    def gradient(trained):
        loss = lambda trained: representation.loss_fn(  # noqa: E731
            config, nnx.merge(graph, trained, frozen), batch, jax.random.key(0)
        )
        return jax.grad(loss, has_aux=True)(trained)

    gradients, metrics = gradient(trained)
    assert np.isfinite(metrics["psnr"])
    silent = {
        str(path)
        for path, leaf in jax.tree.leaves_with_path(gradients)
        if not np.abs(leaf).max() > 0
    }
    assert all("probes" in path for path in silent), silent


def test_a_path_alone_learns_behind_a_representation_that_has_none(regression, tmp_path):
    config, model = regression
    representation.export(settle(config), model, tmp_path / "ready")
    z = config.model.tokenizer.token_dim
    path = dataclasses.replace(
        config.model.tokenizer.resampler, embed_dim=z + 2, output_dim=z, video_length=None
    )
    bent = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=path),
        init=str(tmp_path / "ready"),
        trained="path",
    )
    start = representation.load_start(bent, bent.init)
    assert start.path is None
    config_lib.to_json(model.autoencoder.cfg, tmp_path / "config.json")
    stage = representation.make_stage(dataclasses.replace(bent, autoencoder=str(tmp_path)))
    made = nnx.eval_shape(lambda: stage.create(ShapeRngs()))
    _, trained, kept = nnx.split(made, stage.is_trained, ...)
    assert {path[:2] for path, _ in nnx.to_flat_state(trained)} == {("model", "path")}
    assert ("model", "tokenizer") in {path[:2] for path, _ in nnx.to_flat_state(kept)}
    with pytest.raises(ValueError, match='trained "path" needs a model'):
        dataclasses.replace(bent, init=None)
    with pytest.raises(ValueError, match="between_weight must be above 0"):
        dataclasses.replace(bent, between_weight=0.0)
    other = dataclasses.replace(bent, model=dataclasses.replace(bent.model, token_noise=0.3))
    with pytest.raises(UserError, match="holds a model of other sizes"):
        representation.load_start(other, bent.init)


def test_a_decoder_wants_the_path_that_its_config_names(regression, tmp_path):
    config, model = regression
    representation.export(settle(config), model, tmp_path / "ready")
    pipe = tiny_pipeline()
    head, z = config.model.head, config.model.tokenizer.token_dim
    cfg = dataclasses.replace(
        pipe.decoder.cfg,
        unet=dataclasses.replace(pipe.decoder.cfg.unet, in_channels=9),
        latent_head=head,
        latent_view="between",
        token_path=dataclasses.replace(
            config.model.tokenizer.resampler, embed_dim=z + 2, output_dim=z, video_length=None
        ),
    )
    unfit = TokenizerTrainConfig(
        tokenizer=config.model.tokenizer, decoder=cfg, representation=str(tmp_path / "ready")
    )
    with pytest.raises(UserError, match=r"has no path, decoder\.token_path wants one"):
        tokenizer.load(unfit)

"""Training losses of the decoder: dropping, gradients, trainable parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.dicode.tiny_decoder import TOKENS, build, with_prior

from dicode_jax.models.dicode.decoder import is_constant
from dicode_jax.stages.dicode import tokenizer_loss as training
from dicode_jax.stages.dicode.tokenizer_loss import Draws, TokenizerLossConfig
from dicode_jax.stages.dicode.trainable import TrainableParts

LATENTS = jax.random.normal(jax.random.key(0), (3, 4, 4, 4, 2))
DROP = jnp.array([0.02, 0.12, 0.6])  # text only, keyframes only, nothing; with p = 0.05


@pytest.fixture(scope="module")
def decoder():
    return build()


@pytest.fixture(scope="module")
def loss_of(decoder):
    """Compiled `decoder_loss` and its gradient with given randomness."""
    graph, state = nnx.split(decoder)

    def loss(state, tokens, draws, cfg):
        model = nnx.merge(graph, state)
        return training.decoder_loss(model, LATENTS, tokens, draws, cfg, deterministic=True)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    return lambda tokens, draws, cfg=TokenizerLossConfig(): compiled(state, tokens, draws, cfg)  # noqa: B008


def draws(drop=DROP):
    return Draws(
        timesteps=jnp.array([999, 300, 0]),
        noise=jax.random.normal(jax.random.key(1), LATENTS.shape),
        uniform_drop=drop,
    )


def test_one_number_drops_text_both_or_keyframes():
    r = jnp.array([0.0, 0.049, 0.05, 0.099, 0.1, 0.149, 0.15, 0.9])
    text, image = training.drop_masks(r, 0.05)
    np.testing.assert_array_equal(text, [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(image, [0, 0, 1, 1, 1, 1, 0, 0])


@pytest.mark.parametrize(("loss_type", "power"), [("l1", 1), ("l2", 2)])
def test_beside_a_prior_the_error_is_that_of_the_unets_own_output(loss_type, power):
    decoder = build(with_prior(latent_prior=0.3))
    cfg = TokenizerLossConfig(loss_type=loss_type)
    given = draws(jnp.ones(3))
    _, metrics = training.decoder_loss(decoder, LATENTS, TOKENS, given, cfg, deterministic=True)
    error = np.abs(metrics["prediction"] - metrics["target"]) ** power
    std = np.asarray(decoder.cfg.prior.output_std(given.timesteps, 1))
    wanted = error.mean((1, 2, 3, 4)) / std**power
    np.testing.assert_allclose(metrics["loss_per_sample"], wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], wanted.mean(), rtol=1e-5)
    assert std[0] < 0.31
    assert std[2] > 0.95


def test_a_dropped_sample_is_trained_on_the_null_tokens(decoder, loss_of):
    (_, metrics), _ = loss_of(TOKENS, draws())
    replaced = TOKENS.at[1].set(decoder.null_tokens[...])
    (_, by_hand), _ = loss_of(replaced, draws(jnp.ones(3)))
    np.testing.assert_allclose(metrics["loss_per_sample"], by_hand["loss_per_sample"], rtol=1e-5)
    (_, kept), _ = loss_of(TOKENS, draws(jnp.ones(3)))
    differs = np.abs(metrics["loss_per_sample"] - kept["loss_per_sample"]) > 1e-4
    np.testing.assert_array_equal(differs, [False, True, False])


def test_gradients_reach_unet_and_latent_head_but_not_the_autoencoder(loss_of):
    _, grads = loss_of(TOKENS, draws())
    norms = {path: float(jnp.abs(g[...]).max()) for path, g in nnx.to_flat_state(grads)}
    assert all(np.isfinite(list(norms.values())))
    for part, learns in (("unet", True), ("latent_head", True), ("autoencoder", False)):
        assert any(norms[path] > 0 for path in norms if path[0] == part) == learns, part


def test_draws_repeat_with_their_key_and_cover_the_schedule():
    cfg = TokenizerLossConfig(offset_noise=0.1)
    shape = (64, 2, 3, 3, 2)
    one, two = (
        training.sample_draws(jax.random.key(9), shape, cfg, num_timesteps=10) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert set(np.asarray(one.timesteps)) == set(range(10))
    assert one.noise.shape == one.posterior_noise.shape == shape


def test_text_is_dropped_only_where_it_is_used(decoder):
    text = jnp.ones((3, 3, 6))
    with_text = TokenizerLossConfig(no_text=False)
    got = training.training_text(decoder, text, DROP, with_text)
    np.testing.assert_array_equal(got[0], decoder.text_context[...])
    np.testing.assert_array_equal(got[1:], text[1:])
    assert training.training_text(decoder, text, DROP, TokenizerLossConfig()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncond_prob": 0.5}, "0.5"),
        ({"loss_type": "huber"}, "'huber'"),
        ({"offset_noise": -1.0}, "-1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerLossConfig(**options)


def test_the_freezing_modes_pick_the_parts_they_name(decoder):
    paths = [("decoder", *path) for path, _ in nnx.to_flat_state(nnx.state(decoder))]
    unet = {p for p in paths if p[1] == "unet"}
    head = {p for p in paths if p[1] == "latent_head"}
    chosen = lambda **options: {p for p in paths if TrainableParts(**options)(p)}  # noqa: E731
    assert chosen() == unet | head
    assert not any(is_constant(p) for p in chosen())
    frozen = {"unet": False}
    assert chosen(**frozen, first_block=False, image_projections=False) == head
    first = chosen(**frozen, image_projections=False) - head
    assert {p[2:4] for p in first} >= {("down_stages", 0), ("down_stages", 1)}
    assert all(p[2] in ("down_stages", "init_attention") for p in first)
    image = chosen(**frozen, first_block=False) - head
    assert {p[-2] for p in image} == {"k_image", "v_image"}
    assert TrainableParts()(("tokenizer", "resampler", "latents"))
    assert not TrainableParts(resampler=False)(("tokenizer", "resampler", "latents"))
    assert not TrainableParts()(("tokenizer", "vision", "proj", "kernel"))
    with pytest.raises(ValueError, match="first_block"):
        TrainableParts(first_block=False)


def test_keyframes_are_the_first_and_last_frame():
    video = jnp.arange(5.0).reshape(1, 5, 1, 1, 1)
    assert training.select_keyframes(video).ravel().tolist() == [0.0, 4.0]


@pytest.mark.parametrize("options", [{}, {"per_frame": False}])
def test_pixels_become_latents_frame_by_frame_and_two_keyframes(decoder, monkeypatch, options):
    video = jax.random.normal(jax.random.key(4), (3, 4, 8, 8, 3))
    drawn = draws()._replace(posterior_noise=LATENTS)
    seen = []

    def encode(self, *args, **given):
        seen.append((args, given))
        return 2 * LATENTS

    monkeypatch.setattr(type(decoder.autoencoder), "encode_latents", encode)
    monkeypatch.setattr(training, "keyframe_loss", lambda *args, **given: ((args, given), {}))
    cfg = TokenizerLossConfig()
    (args, given), metrics = training.tokenizer_loss(
        "tokenizer", decoder, video, drawn, cfg, fs=1, **options
    )
    (encoded,), told = seen[0]
    assert (len(seen), encoded is video, told["noise"] is LATENTS) == (1, True, True)
    assert told["per_frame"] is options.get("per_frame", True)
    np.testing.assert_array_equal(metrics["latents"], 2 * LATENTS)
    assert (args[:2], args[4:], given) == (("tokenizer", decoder), (drawn, cfg), {"fs": 1})
    np.testing.assert_array_equal(args[2], 2 * LATENTS)
    np.testing.assert_array_equal(args[3], video[:, ::3])


def test_config_is_hashable_so_that_it_can_be_static():
    assert hash(TokenizerLossConfig()) == hash(dataclasses.replace(TokenizerLossConfig()))

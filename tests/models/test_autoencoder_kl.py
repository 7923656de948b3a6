"""KL autoencoder: video helpers, posterior, attention levels, sizes, errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.nn.rngs import ShapeRngs

TINY = AutoencoderKLConfig(
    channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    resolution=16,
    z_channels=3,
    embed_dim=5,
    num_groups=4,
)
B, F, H, W = 2, 3, 8, 12


@pytest.fixture(scope="module")
def autoencoder():
    return AutoencoderKL(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(1), (B, F, H, W, 3), minval=-1.0)


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(2), (B, F, H // 4, W // 4, 5))


def test_frames_one_by_one_equal_all_at_once(autoencoder, video, latents):
    encode = nnx.jit(
        lambda model, x, per_frame: model.encode_video(x, per_frame=per_frame).mean,
        static_argnums=2,
    )
    decode = nnx.jit(
        lambda model, z, per_frame: model.decode_video(z, per_frame=per_frame), static_argnums=2
    )
    a, b = (encode(autoencoder, video, per_frame) for per_frame in (False, True))
    assert a.shape == (B, F, H // 4, W // 4, 5)
    np.testing.assert_allclose(a, b, atol=1e-5)
    a, b = (decode(autoencoder, latents, per_frame) for per_frame in (False, True))
    assert a.shape == (B, F, H, W, 3)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_frame_does_not_see_the_others(autoencoder, video):
    encode = nnx.jit(lambda model, x: model.encode_video(x).mean)
    changed = encode(autoencoder, video.at[:, 1].add(0.5))
    mean = encode(autoencoder, video)
    np.testing.assert_allclose(mean[:, [0, 2]], changed[:, [0, 2]], atol=1e-5)
    assert np.abs(mean[:, 1] - changed[:, 1]).max() > 1e-4


def test_the_scale_factor_is_applied_by_the_latent_helpers_only(autoencoder, video, latents):
    mean = autoencoder.encode_video(video).mean
    np.testing.assert_allclose(
        autoencoder.encode_latents(video), TINY.scale_factor * mean, rtol=1e-6
    )
    np.testing.assert_allclose(
        autoencoder.decode_latents(latents),
        autoencoder.decode_video(latents / TINY.scale_factor),
        rtol=1e-6,
    )


def test_encoding_with_noise_samples_the_posterior(autoencoder, video, latents):
    posterior = autoencoder.encode_video(video)
    got = autoencoder.encode_latents(video, noise=latents)
    want = TINY.scale_factor * (posterior.mean + jnp.exp(posterior.logvar / 2) * latents)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_draws_with_a_key_per_sample_do_not_depend_on_the_batch():
    keys = jax.random.split(jax.random.key(0), 3)
    posterior = DiagonalGaussian(mean=jnp.zeros((3, 4, 5)), logvar=jnp.ones((3, 4, 5)))
    alone = DiagonalGaussian(mean=jnp.zeros((1, 4, 5)), logvar=jnp.ones((1, 4, 5)))
    np.testing.assert_array_equal(posterior.sample(keys)[1:2], alone.sample(keys[1:2]))


def test_samples_have_the_moments_of_the_posterior():
    posterior = DiagonalGaussian(mean=jnp.full((1, 50_000), 3.0), logvar=jnp.full((1, 50_000), 0.5))
    draws = posterior.sample(jax.random.key(0))  # both within four standard errors
    assert abs(draws.mean() - 3.0) < 0.02
    assert abs(draws.var() - math.exp(0.5)) < 0.03


def test_kl_is_zero_for_the_standard_normal_and_matches_a_hand_computed_case():
    standard = DiagonalGaussian(mean=jnp.zeros((2, 3)), logvar=jnp.zeros((2, 3)))
    np.testing.assert_allclose(standard.kl(), 0.0, atol=1e-7)
    other = DiagonalGaussian(mean=jnp.array([[2.0]]), logvar=jnp.log(jnp.array([[4.0]])))
    np.testing.assert_allclose(other.kl(), 0.5 * (4 + 4 - 1 - math.log(4)), rtol=1e-6)


def test_log_variance_is_clamped():
    moments = jnp.array([[1.0, 2.0, -99.0, 99.0]])
    posterior = DiagonalGaussian.from_moments(moments)
    np.testing.assert_array_equal(posterior.mean, [[1.0, 2.0]])
    np.testing.assert_array_equal(posterior.logvar, [[-30.0, 20.0]])


@pytest.mark.parametrize("given", [(), ("key", "noise")])
def test_sampling_takes_exactly_one_source_of_randomness(given):
    posterior = DiagonalGaussian(mean=jnp.zeros((1, 2)), logvar=jnp.zeros((1, 2)))
    sources = {"key": jax.random.key(0), "noise": jnp.zeros((1, 2))}
    with pytest.raises(ValueError, match="exactly one"):
        posterior.sample(**{name: sources[name] for name in given})


def test_attention_sits_at_the_named_resolutions_and_in_the_middle():
    model = AutoencoderKL(
        dataclasses.replace(TINY, attn_resolutions=(8,), num_res_blocks=2), rngs=nnx.Rngs(0)
    )
    assert [len(level.attentions) for level in model.encoder.levels] == [0, 2, 0]
    assert [len(level.attentions) for level in model.decoder.levels] == [0, 3, 0]
    assert model.encoder.middle.attention is not None
    plain = AutoencoderKL(dataclasses.replace(TINY, mid_attention=False), rngs=nnx.Rngs(0))
    assert plain.decoder.middle.attention is None


def test_full_size_has_the_released_number_of_parameters():
    model = nnx.eval_shape(lambda: AutoencoderKL(AutoencoderKLConfig(), rngs=ShapeRngs()))
    leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 83_653_863


def test_wrong_shapes_are_named(autoencoder):
    with pytest.raises(ValueError, match="multiples of 4, got 8x10"):
        autoencoder.encode(jnp.zeros((1, 8, 10, 3)))
    with pytest.raises(ValueError, match=r"3 channels .*got 4"):
        autoencoder.encode(jnp.zeros((1, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"5 channels .*got 3"):
        autoencoder.decode(jnp.zeros((1, 2, 2, 3)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channels": 6}, "multiple of num_groups"),
        ({"channel_mult": ()}, "at least one level"),
        ({"scale_factor": 0.0}, "scale_factor must be positive"),
    ],
)
def test_impossible_configs_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(TINY, **options)

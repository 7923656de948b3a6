"""Resampler: attention by hand, options, shapes, errors, the released size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.nn.resampler import (
    LinearImageProjection,
    PerceiverAttention,
    Resampler,
    ResamplerConfig,
)
from dicode_jax.nn.rngs import ShapeRngs

TINY = ResamplerConfig(
    dim=12, depth=2, head_dim=4, num_heads=5, num_queries=9, embed_dim=7, output_dim=10, ff_mult=2
)


def build(seed=0, **options):
    return Resampler(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(seed))


def features(b=3, length=6, width=7, seed=1):
    return jax.random.normal(jax.random.key(seed), (b, length, width))


def test_released_size_has_48541696_parameters():
    model = nnx.eval_shape(lambda: Resampler(ResamplerConfig(), rngs=ShapeRngs()))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.split(model, nnx.Param)[1])]
    assert sum(sizes) == 48_541_696


def test_attention_matches_numpy():
    attn = PerceiverAttention(6, 2, 4, rngs=nnx.Rngs(0))  # inner width 8 differs from 6
    x, latents = features(2, 5, 6), features(2, 3, 6, seed=2)

    def norm(y):
        y = np.asarray(y, np.float64)
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)

    w = {name: np.asarray(getattr(attn, name).kernel[...]) for name in ("to_q", "to_kv", "to_out")}
    q = norm(latents) @ w["to_q"]
    kv = np.concatenate([norm(x), norm(latents)], axis=1) @ w["to_kv"]
    want = np.zeros((2, 3, 8))
    for i in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            k, v = kv[i, :, :8][:, head], kv[i, :, 8:][:, head]
            scores = q[i, :, head] @ k.T / 2  # sqrt(4)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            want[i, :, head] = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(attn(x, latents), want @ w["to_out"], atol=1e-5)


def test_output_does_not_depend_on_the_order_of_the_features():
    model, x = build(), features()
    np.testing.assert_allclose(model(x), model(x[:, ::-1]), atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    model, x = build(), features()
    np.testing.assert_allclose(model(x)[1], model(x[1:2])[0], atol=1e-5)


def test_video_length_multiplies_the_tokens():
    assert build(video_length=4)(features()).shape == (3, 36, 10)
    assert build()(features()).shape == (3, 9, 10)


def test_output_is_normalised_unless_it_shall_not_be():
    x = features()
    normed = build()(x)
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normed.std(-1), 1, atol=1e-4)  # the norm adds 1e-5 below its root
    assert np.abs(build(use_norm_out=False)(x).std(-1) - 1).max() > 0.05


def test_each_token_fills_its_patch_of_the_image():
    model = build(output_shape=(6, 12, 2))  # 3 x 3 patches of 2 x 4 pixels, 2 channels
    tokens = np.arange(9 * 16, dtype=np.float32).reshape(1, 9, 16)
    image = np.asarray(model._to_image(jnp.asarray(tokens)))[0]
    for index in range(9):
        row, column = divmod(index, 3)
        patch = image[2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
        want = tokens[0, index].reshape(2, 2, 4)  # channel, height, width
        np.testing.assert_array_equal(patch, want.transpose(1, 2, 0))
    assert model(features()).shape == (3, 6, 12, 2)


def test_bfloat16_compute_stays_close_to_float32():
    cfg = TINY
    low = Resampler(cfg, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert low.proj_in.kernel.dtype == jnp.float32
    y = low(features())
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), build()(features()), atol=0.15)  # 8 bits


def test_holds_parameters_only():
    nnx.split(build(output_shape=(3, 3, 2)), nnx.Param)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"video_length": 0}, "video_length"),
        ({"ff_mult": 0}, "ff_mult"),
        ({"output_shape": (6, 6, 1), "num_queries": 8}, "square number of tokens, got 8"),
        ({"output_shape": (6, 7, 1)}, "3 x 3 patches"),
        ({"output_shape": (6, 6)}, r"must be \(h, w, c\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_wrong_feature_width_is_refused():
    with pytest.raises(ValueError, match=r"width 7, got shape \(3, 6, 8\)"):
        build()(features(width=8))


def test_linear_image_projection_gives_normalised_tokens():
    model = LinearImageProjection(5, 6, 3, rngs=nnx.Rngs(0))
    y = model(jax.random.normal(jax.random.key(0), (2, 5)))
    assert y.shape == (2, 3, 6)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)

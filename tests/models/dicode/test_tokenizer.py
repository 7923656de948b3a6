"""The encode path: one keyframe at a time, preprocessing, the bottleneck, sizes, errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.media.transforms import clip_preprocess
from dicode_jax.models.clip import CLIPVisionConfig
from dicode_jax.models.dicode.tokenizer import (
    DeepTokenizer,
    DeepTokenizerConfig,
    mask_leading_tokens,
)
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs

TINY = DeepTokenizerConfig(
    vision=CLIPVisionConfig(
        image_size=12, patch_size=4, embed_dim=8, num_layers=1, num_heads=2, output_dim=None
    ),
    resampler=ResamplerConfig(
        dim=12, depth=1, head_dim=4, num_heads=2, num_queries=5, embed_dim=8, output_dim=6
    ),
)


def build(**options):
    return DeepTokenizer(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokenizer():
    return build()


@pytest.fixture(scope="module")
def keyframes():
    return jax.random.uniform(jax.random.key(0), (2, 3, 14, 20, 3), minval=-1)


def test_released_size():
    model = nnx.eval_shape(lambda: DeepTokenizer(DeepTokenizerConfig(), rngs=ShapeRngs()))
    leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 632_076_800 + 48_541_696
    assert (model.cfg.num_tokens, model.cfg.token_dim) == (16, 1024)


def test_the_defaults_are_those_of_the_original():
    assert DeepTokenizerConfig() == DeepTokenizerConfig(
        vision=CLIPVisionConfig(),
        resampler=ResamplerConfig(),
        preprocess="clip",
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        resize=None,
        antialias=False,
    )


def test_each_keyframe_is_encoded_alone(tokenizer, keyframes):
    tokens = tokenizer(keyframes)
    assert tokens.shape == (2, 3, 5, 6)
    changed = tokenizer(keyframes.at[1, 2].set(0.5))
    same = np.ones((2, 3), bool)
    same[1, 2] = False
    np.testing.assert_allclose(changed[same], tokens[same], atol=1e-5)
    assert np.abs(changed[1, 2] - tokens[1, 2]).max() > 1e-3


def test_plain_preprocessing_hands_the_pixels_on(keyframes):
    model = build(preprocess="plain")
    images = keyframes[0, :, :12, :12]
    np.testing.assert_array_equal(model.preprocess(images), images)
    assert model(images[None]).shape == (1, 3, 5, 6)
    with pytest.raises(ValueError, match=r"takes images \[b, 12, 12, 3\], got \(6, 14, 20, 3\)"):
        model(keyframes)


def test_clip_preprocessing_is_that_of_the_tower(tokenizer, keyframes):
    want = tokenizer.vision(clip_preprocess(keyframes[0], 12))
    np.testing.assert_allclose(tokenizer.encode_images(keyframes[0]), want, atol=1e-5)


def test_null_tokens_are_those_of_a_grey_image_of_any_size(tokenizer):
    null = tokenizer.null_tokens()
    assert null.shape == (5, 6)
    np.testing.assert_allclose(tokenizer(jnp.zeros((1, 1, 30, 16, 3)))[0, 0], null, atol=1e-5)


@pytest.mark.parametrize("last", [-1, 0, 2, 4])
def test_masking_removes_the_first_tokens_of_every_keyframe(last):
    tokens = jax.random.normal(jax.random.key(0), (2, 3, 5, 6))
    got = jax.jit(mask_leading_tokens)(tokens, last)
    assert not got[:, :, : last + 1].any()
    np.testing.assert_array_equal(got[:, :, last + 1 :], tokens[:, :, last + 1 :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resampler": dataclasses.replace(TINY.resampler, embed_dim=9)}, "embed_dim 9 and 8"),
        (
            {
                "resampler": dataclasses.replace(
                    TINY.resampler, num_queries=4, output_shape=(4, 4, 1)
                )
            },
            "set output_shape to None",
        ),
        ({"preprocess": "none"}, "got 'none'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)

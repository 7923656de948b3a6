"""CLIP towers: patches, causality, pooling, sizes, errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.clip import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
    PatchEmbed,
)
from dicode_jax.nn.rngs import ShapeRngs

VISION = CLIPVisionConfig(
    image_size=12, patch_size=4, embed_dim=16, num_layers=2, num_heads=2, output_dim=5
)
TEXT = CLIPTextConfig(
    max_seq_len=11, vocab_size=23, embed_dim=12, num_layers=3, num_heads=3, output_dim=5
)


@pytest.fixture(scope="module")
def clip():
    return CLIP(CLIPConfig(vision=VISION, text=TEXT), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 12, 12, 3))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (3, 11), 1, 20)


@pytest.fixture(scope="module")
def vit_h_14():
    """The published model by shape alone."""
    return nnx.eval_shape(lambda: CLIP(CLIPConfig(), rngs=ShapeRngs()))


def num_params(module):
    state = nnx.split(module, nnx.Param)[1]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def test_vit_h_14_has_the_published_number_of_parameters(vit_h_14):
    assert num_params(vit_h_14) == 986_109_441
    assert num_params(vit_h_14.vision) == 632_076_800
    assert num_params(vit_h_14.text) == 354_032_640


def test_vit_h_14_has_257_image_tokens():
    assert CLIPVisionConfig().num_tokens == 257


def test_patch_embedding_is_a_strided_convolution():
    embed = PatchEmbed(4, 6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 12, 8, 3))
    want = jax.lax.conv_general_dilated(
        x, embed.kernel[...], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(embed(x), want.reshape(2, 6, 6), atol=1e-5)


def test_class_token_comes_first_and_sees_every_patch(clip, images):
    tokens = clip.vision(images)
    assert tokens.shape == (2, 10, 16)
    embedded = clip.vision.embed(images)
    want = clip.vision.class_embed[...] + clip.vision.pos_embed[0]
    np.testing.assert_allclose(embedded[1, 0], want, atol=1e-6)
    changed = clip.vision(images.at[0, -1, -1].add(1.0))
    assert np.abs(changed[0, 0] - tokens[0, 0]).max() > 1e-4
    np.testing.assert_allclose(changed[1], tokens[1], atol=1e-6)


def test_text_is_causal(clip, ids):
    changed = ids.at[:, 6:].set(3)
    for layer in ("penultimate", "last"):
        a, b = clip.text(ids, layer), clip.text(changed, layer)
        np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-5)
        assert np.abs(a[:, 6:] - b[:, 6:]).max() > 1e-3


def test_penultimate_skips_the_last_block_but_not_the_final_norm(ids):
    text = CLIPText(TEXT, rngs=nnx.Rngs(0))
    penultimate, last = text(ids), text(ids, "last")
    text.blocks[2].mlp.down.bias[...] += 1.0 * jnp.arange(12)
    np.testing.assert_array_equal(text(ids), penultimate)
    assert np.abs(text(ids, "last") - last).max() > 1e-2
    text.norm_final.bias[...] += 2.0
    np.testing.assert_allclose(text(ids), penultimate + 2, atol=1e-6)


def test_pooled_text_is_read_at_the_first_end_of_text(clip, ids):
    ids = ids.at[:, 4].set(22).at[:, 8].set(22)
    tokens = clip.text(ids, "last")
    want = tokens[:, 4] @ clip.text.proj.kernel[...]
    np.testing.assert_allclose(clip.text.pooled(tokens, ids), want, atol=1e-5)


def test_logits_are_scaled_cosines(clip, images, ids):
    cosine = clip.encode_image(images) @ clip.encode_text(ids).T
    np.testing.assert_allclose(jnp.linalg.norm(clip.encode_text(ids), axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(clip(images, ids), cosine / 0.07, rtol=1e-5)
    assert clip(images, ids).shape == (2, 3)


def test_small_vit_trains_under_jit():
    cfg = CLIPVisionConfig(
        image_size=64, patch_size=8, embed_dim=128, num_layers=3, num_heads=4, output_dim=None
    )
    graph, params = nnx.split(CLIPVision(cfg, rngs=nnx.Rngs(0)), nnx.Param)
    x = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3), minval=-1)

    def loss(params):
        tokens = nnx.merge(graph, params)(x)
        return jnp.mean(tokens**2)

    grads = jax.jit(jax.grad(loss))(params)
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(grads)]
    # The key third of each q, k, v bias has no gradient, but no whole array is without one.
    assert np.isfinite(norms).all()
    assert min(norms) > 0


def test_tower_without_projection_cannot_pool(images):
    tower = CLIPVision(dataclasses.replace(VISION, output_dim=None), rngs=nnx.Rngs(0))
    assert not hasattr(tower, "norm_post")
    with pytest.raises(ValueError, match="no pooled embedding: set output_dim"):
        tower.pooled(tower(images))


def test_quick_gelu_is_another_function(images):
    towers = [
        CLIPVision(dataclasses.replace(VISION, activation=name), rngs=nnx.Rngs(0))
        for name in ("gelu", "quick_gelu")
    ]
    a, b = (tower(images) for tower in towers)
    assert 1e-4 < np.abs(a - b).max() < 0.5


def test_bfloat16_compute_keeps_float32_parameters(images):
    tower = CLIPVision(VISION, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(tower))} == {jnp.dtype("float32")}
    tokens = tower(images)
    assert tokens.dtype == jnp.bfloat16
    want = CLIPVision(VISION, rngs=nnx.Rngs(0))(images)
    np.testing.assert_allclose(tokens.astype(jnp.float32), want, atol=0.15)  # 8 bits


def test_wrong_calls_are_refused(clip, ids):
    with pytest.raises(ValueError, match=r"takes images \[b, 12, 12, 3\], got \(1, 16, 12, 3\)"):
        clip.vision(jnp.zeros((1, 16, 12, 3)))
    with pytest.raises(ValueError, match="11 positions, got 12 ids"):
        clip.text(jnp.zeros((1, 12), jnp.int32))
    with pytest.raises(ValueError, match="layer"):
        CLIPText.__call__.__wrapped__(clip.text, ids, "first")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (VISION, {"image_size": 13}, "multiple of patch_size, got 13 and 4"),
        (VISION, {"num_heads": 3}, "divisible by num_heads, got 16 and 3"),
        (VISION, {"activation": "relu"}, "got 'relu'"),
        (TEXT, {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (TEXT, {"vocab_size": 0}, "vocab_size"),
    ],
)
def test_impossible_sizes_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **options)


def test_towers_must_project_to_one_width():
    with pytest.raises(ValueError, match=r"5 \(vision\) and 6 \(text\)"):
        CLIPConfig(vision=VISION, text=dataclasses.replace(TEXT, output_dim=6))

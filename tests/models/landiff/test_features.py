"""Features of a video. Numbers of transformers' ViT are in tests/golden/landiff/theia."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_module

from dicode_jax.models.landiff.features import num_semantic_frames, vit_features
from dicode_jax.models.vit import ViT, ViTConfig, bicubic
from dicode_jax.nn.rngs import ShapeRngs

TINY = ViTConfig(
    image_size=8, patch_size=4, embed_dim=6, num_layers=1, num_heads=2, mlp_dim=7
)  # fmt: skip


def test_every_fourth_frame_counts_and_other_lengths_are_refused():
    assert [num_semantic_frames(n) for n in (1, 5, 49, 481)] == [1, 2, 13, 121]
    for count in (0, 4, 50):
        with pytest.raises(ValueError, match=f"4k \\+ 1 frames .* got {count}"):
            num_semantic_frames(count)


def test_a_wide_video_keeps_the_grid_of_its_own_patches_of_frames_that_count():
    vit = random_module(lambda: ViT(TINY, rngs=ShapeRngs()))
    video = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4, 12, 3)).astype(np.float32)
    got = vit_features(vit, jnp.asarray(video))
    assert got.shape == (2, 2, 1, 3, 6)
    square = np.full((1, 12, 12, 3), (127 - 127.5) / 127.5, np.float32)
    square[0, :4] = video[1, 4]
    np.testing.assert_allclose(got[1, 1, 0], vit(jnp.asarray(square))[0, 1:4], atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4, got 4x10"):
        vit_features(vit, jnp.asarray(video[:, :, :, :10]))
    with pytest.raises(ValueError, match="multiple of 4, got 8x6"):
        vit(jnp.zeros((1, 8, 6, 3)))


def test_resampling_keeps_constants_and_is_exact_where_nothing_changes():
    np.testing.assert_allclose(bicubic(14, 45).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5))

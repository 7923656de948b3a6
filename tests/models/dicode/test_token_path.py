"""The way of deep tokens between two keyframes, and who reads what lies on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.dicode.tiny_decoder import CONFIG, TOKENS, build

from dicode_jax.models.dicode.token_path import TokenPath
from dicode_jax.models.dicode.tokenizer import tokens_between
from dicode_jax.nn.resampler import ResamplerConfig

PATH = ResamplerConfig(
    dim=8, depth=1, head_dim=4, num_heads=2, num_queries=4, embed_dim=8, output_dim=6
)
PLACES = jnp.array([0.0, 0.25, 0.5, 1.0])


@pytest.fixture(scope="module")
def bent():
    path = TokenPath(PATH, rngs=nnx.Rngs(0))
    path.gain[...] = jnp.arange(6.0)
    return path


def test_a_line_lies_between_two_keyframes():
    got = tokens_between(TOKENS, PLACES)
    assert got.shape == (3, 4, 4, 6)
    for i, place in enumerate(np.asarray(PLACES)):
        want = (1 - place) * TOKENS[:, 0] + place * TOKENS[:, 1]
        np.testing.assert_allclose(got[:, i], want, atol=1e-6)
    each = tokens_between(TOKENS, jnp.array([[0.0], [0.5], [1.0]]))
    np.testing.assert_allclose(each[1, 0], TOKENS[1].mean(0), atol=1e-6)
    np.testing.assert_array_equal(each[2, 0], TOKENS[2, 1])


def test_a_path_begins_as_the_line_and_ends_at_the_keyframes(bent):
    fresh = TokenPath(PATH, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh(TOKENS, PLACES), tokens_between(TOKENS, PLACES))
    got = bent(TOKENS, PLACES)
    np.testing.assert_array_equal(got[:, [0, 3]], TOKENS)
    away = np.abs(got - tokens_between(TOKENS, PLACES))
    assert away[:, 1:3, :, 1:].max() > 0.1
    np.testing.assert_array_equal(away[..., 0], 0)  # whose gain is 0


def test_a_path_knows_its_direction_and_its_place(bent):
    forth, back = bent(TOKENS, PLACES), bent(TOKENS[:, ::-1], 1 - PLACES)
    assert np.abs(forth - back).max() > 1e-3
    bend = forth - tokens_between(TOKENS, PLACES)
    assert np.abs(bend[:, 1] - 0.75 * bend[:, 2]).max() > 1e-3  # more than the height of an arc
    alone = bent(TOKENS[1:2], PLACES[1:2])
    np.testing.assert_allclose(alone[0, 0], forth[1, 1], atol=1e-6)


def test_frames_see_what_lies_on_the_path():
    unet = dataclasses.replace(CONFIG.unet, in_channels=6)
    given = {"unet": unet, "latent_view": "between", "token_path": PATH}
    decoder = build(dataclasses.replace(CONFIG, **given))
    decoder.token_path.gain[...] = jnp.ones(6)
    _, concat = decoder.condition(TOKENS, 4)
    on_path = decoder.token_path(TOKENS, jnp.linspace(0, 1, 4))
    images = jax.vmap(lambda x: decoder.latent_images(x[None])[0])(on_path)
    np.testing.assert_allclose(concat[..., :3], images, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_view": "nearest"}, 'token_path needs a latent_head and latent_view "between"'),
        ({"token_path": dataclasses.replace(PATH, embed_dim=6)}, "are 8, 4, 6, None, None, got 6"),
        ({"token_path": dataclasses.replace(PATH, num_queries=5)}, "got 8, 5, 6, None, None"),
    ],
)
def test_a_path_that_does_not_fit_is_refused(changes, message):
    unet = dataclasses.replace(CONFIG.unet, in_channels=6)
    given = {"unet": unet, "latent_view": "between", "token_path": PATH} | changes
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **given)

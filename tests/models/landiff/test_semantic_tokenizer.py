"""LanDiff's semantic tokenizer: who sees whom, and that frames can be decoded as they come.

Numbers of the release's own code are in tests/golden/landiff/tokenizer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.semantic_tokenizer import (
    SemanticTokenizer,
    SemanticTokenizerConfig,
    labels,
    places,
    sees_in_decoder,
    sees_in_encoder,
)
from dicode_jax.nn.masks import LabelMask
from dicode_jax.nn.rngs import ShapeRngs, blank

TINY = SemanticTokenizerConfig(
    frames=FrameTokens(iframe=3, pframe=2, segment=3),
    grid=(2, 3),
    feature_dim=5,
    embed_dim=16,
    num_layers=1,
    num_heads=1,
    token_dim=6,
    codebook_size=9,
    code_dim=4,
)
FEATURES = jax.random.normal(jax.random.key(0), (2, 3, 2, 3, 5))
CODES = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [8, 7, 6, 5, 4, 3, 2]])


@pytest.fixture(scope="module")
def tokenizer():
    return random_module(lambda: SemanticTokenizer(TINY, rngs=ShapeRngs()))


def test_rules_of_sight_are_those_of_the_paper_by_hand():
    names = labels(TINY, 3)
    frame = [0] * 6 + [1] * 6 + [2] * 6 + [0] * 3 + [1] * 2 + [2] * 2
    assert names[:, 0].tolist() == frame
    is_token = np.arange(25) >= 18
    seen = {
        side: np.asarray(LabelMask(names, names, sees).dense())
        for side, sees in (("encoder", sees_in_encoder), ("decoder", sees_in_decoder))
    }
    for i, j in np.ndindex(25, 25):
        earlier = frame[j] <= frame[i]
        assert seen["decoder"][i, j] == earlier
        if is_token[j]:
            assert seen["encoder"][i, j] == (is_token[i] and j <= i)
        else:
            assert seen["encoder"][i, j] == earlier


def test_features_stand_at_time_row_and_column_and_tokens_at_their_number_thrice():
    at = places(TINY, 2).tolist()
    assert at[:7] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [1, 0, 0]]
    assert at[12:] == [[n, n, n] for n in range(5)]


def test_codes_of_a_frame_know_nothing_of_later_frames(tokenizer):
    encode = nnx.jit(lambda m, x: m.encoder(x))
    whole = encode(tokenizer, FEATURES)
    moved = encode(tokenizer, FEATURES.at[:, 2].add(1.0))
    np.testing.assert_array_equal(moved[:, :5], whole[:, :5])
    assert np.abs(moved - whole)[:, 5:].max() > 1e-4
    short = encode(tokenizer, FEATURES[:, :2])
    np.testing.assert_allclose(short, whole[:, :5], atol=1e-5)


def test_frames_decoded_one_by_one_are_those_of_all_at_once(tokenizer):
    at_once = nnx.jit(lambda m, ids: m.decoder(m.quantizer.decode(ids)))(tokenizer, CODES)
    one_by_one = nnx.jit(lambda m, ids: m.decode(ids))
    got = one_by_one(tokenizer, CODES)
    assert got.shape == (2, 3, 2, 3, 5)
    assert np.std(got) > 1e-3
    np.testing.assert_allclose(got, at_once, atol=1e-5)
    moved = one_by_one(tokenizer, CODES.at[:, 5:].set(0))
    np.testing.assert_array_equal(moved[:, :2], got[:, :2])
    assert np.abs(moved - got)[:, 2].max() > 1e-5


def test_the_release_builds_and_what_is_quantized_stays_in_float32():
    full = blank(SemanticTokenizer, SemanticTokenizerConfig(), dtype=jnp.bfloat16)
    codes = jax.ShapeDtypeStruct((1, 1218), jnp.int32)
    out = nnx.eval_shape(lambda m, ids: m.decode(ids), full, codes)
    assert (out.shape, out.dtype) == ((1, 13, 30, 45, 768), jnp.bfloat16)
    assert full.quantizer.project_in.dtype == jnp.float32


def test_what_is_no_segment_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a grid of 2 x 3, got 3 x 2"):
        tokenizer.encode(FEATURES.swapaxes(2, 3))
    with pytest.raises(ValueError, match="1 to 3 semantic frames, a segment; got 4"):
        tokenizer.encode(jnp.zeros((1, 4, 2, 3, 5)))
    with pytest.raises(ValueError, match="6 tokens make no video"):
        tokenizer.decode(CODES[:, :6])
    with pytest.raises(ValueError, match="a segment; got 4"):
        tokenizer.decode(jnp.zeros((1, 10), jnp.int32))
    with pytest.raises(ValueError, match=r"codes from 0 to 8, got 9 \(14 such\)"):
        tokenizer.decode(jnp.full((2, 7), 9))
    with pytest.raises(ValueError, match="multiple of 16 wide"):
        SemanticTokenizerConfig(embed_dim=24, num_heads=1)

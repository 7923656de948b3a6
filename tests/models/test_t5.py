import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from flax import nnx
from tiny import random_module

import convert
from convert.engine.plan import plan
from convert.engine.rules import ConversionError
from convert.parts import t5
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig, relative_buckets
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.nn.rngs import ShapeRngs, blank

TINY = T5EncoderConfig(
    num_layers=2, num_heads=3, embed_dim=10, head_dim=4, mlp_dim=14, vocab_size=17, num_buckets=8,
    max_distance=12,
)  # fmt: skip
IDS = np.random.default_rng(1).integers(0, 17, (2, 7))


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: T5Encoder(TINY, rngs=ShapeRngs()))


def encode(model, ids, valid=None):
    return np.asarray(_encode(*nnx.split(model), jnp.asarray(ids), valid))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph, state, ids, valid):
    model = nnx.merge(graph, state)
    return model(model.embed_tokens(ids), valid)


def test_near_keys_have_buckets_of_their_own_and_far_ones_share():
    offsets = np.arange(-130, 131)
    buckets = dict(zip(offsets.tolist(), relative_buckets(offsets, 32, 128).tolist(), strict=True))
    assert [buckets[-i] for i in range(8)] == list(range(8))  # behind the query
    assert [buckets[i] for i in range(1, 8)] == list(range(17, 24))  # before it
    assert [buckets[-i] for i in (8, 11, 12, 16, 23, 32, 64, 91, 128)] == [
        8, 8, 9, 10, 11, 12, 14, 15, 15,
    ]  # fmt: skip
    assert all(buckets[i] == buckets[-i] + 16 for i in range(1, 131))


def test_both_sides_are_seen_and_padding_is_not(model):
    want = encode(model, IDS)
    changed = IDS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 17
    assert np.abs(encode(model, changed)[:, 0] - want[:, 0]).max() > 1e-4
    valid = jnp.arange(10)[None] < jnp.asarray([[7], [7]])
    padded = np.concatenate([IDS, np.full((2, 3), 5)], axis=1)
    np.testing.assert_allclose(encode(model, padded, valid)[:, :7], want, atol=5e-6)


def test_scan_over_layers_equals_the_loop(model):
    scanned = with_scan_layers(model)
    assert scanned.blocks.attn.q.kernel.shape == (2, 10, 12)
    np.testing.assert_allclose(encode(scanned, IDS), encode(model, IDS), atol=5e-6)


OPTIONS = {
    "num_layers": 2,
    "num_heads": 3,
    "d_model": 10,
    "d_kv": 4,
    "d_ff": 14,
    "vocab_size": 17,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}


def test_weights_come_back_through_their_original_names(model):
    source = state_dict(model, t5.RULES)
    extra = {"decoder.final_layer_norm.weight": np.ones(10, np.float32)}
    extra["encoder.embed_tokens.weight"] = source["shared.weight"]
    got = convert.from_torch("t5", source | extra, OPTIONS)
    assert got.cfg == TINY
    np.testing.assert_array_equal(encode(got, IDS), encode(model, IDS))
    extra["encoder.embed_tokens.weight"] = source["shared.weight"] + 1
    with pytest.raises(ConversionError, match="not tied"):
        convert.from_torch("t5", source | extra, OPTIONS)


@pytest.mark.parametrize("name", ["hf_t5-v1_1-xxl-encoder", "hf_flan-t5-xxl-encoder"])
def test_published_encoders_convert_by_shapes_alone(name):
    target = blank(T5Encoder, T5EncoderConfig())
    done = plan(shapes_only(read_manifest(name)), t5.RULES, target)
    assert done.problems == []
    assert done.report()["parameters"] == 4_762_310_656


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"experts": 4}, "unknown option.*experts"),
        ({"relative_attention_num_buckets": 6}, r"num_buckets \(6\) must be a multiple of 4"),
        ({"num_heads": 0}, "num_heads must be positive"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        t5.config_from_original(OPTIONS | option)


def test_options_of_the_decoder_alone_pass():
    own = {"is_decoder": False, "scale_decoder_outputs": False}
    assert t5.config_from_original(OPTIONS | own) == t5.config_from_original(OPTIONS)
    with pytest.raises(ValueError, match="is_decoder=True"):
        t5.config_from_original(OPTIONS | {"is_decoder": True})

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import from_torch
from convert.engine.plan import flat_shapes, flatten
from convert.engine.rules import ConversionError
from convert.parts.gpt2 import config_from_original
from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.nn.masks import causal_mask, key_mask, positions_from_valid
from dicode_jax.nn.rngs import ShapeRngs

TINY = GPT2Config(
    num_layers=3, num_heads=2, embed_dim=12, max_seq_len=20, vocab_size=17, mlp_dim=10
)
IDS = jax.random.randint(jax.random.key(1), (2, 9), 0, 17)


@pytest.fixture(scope="module")
def model():
    return alive(GPT2(TINY, rngs=nnx.Rngs(0)))


def alive(model):
    """Moves every parameter away from its initial value, so that nothing is zero or one."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def hidden(model, embeds, *args, **kwargs):
    return np.asarray(model(embeds, *args, **kwargs)[0])


def close(a, b):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_later_tokens_do_not_reach_earlier_ones(model):
    x = model.embed_tokens(IDS)
    close(hidden(model, x)[:, :5], hidden(model, x.at[:, 5:].set(1.0))[:, :5])
    assert (
        np.abs(hidden(model, x)[:, 6:] - hidden(model, x.at[:, 5].multiply(-1))[:, 6:]).max() > 1e-3
    )


def test_scan_over_layers_equals_the_loop_with_and_without_cache(model):
    scanned = with_scan_layers(model)
    x = model.embed_tokens(IDS)
    close(hidden(scanned, x), hidden(model, x))
    cache = scanned.init_cache(batch=2, size=9)
    _, cache = scanned(x[:, :4], cache=cache)
    close(hidden(scanned, x[:, 4:], cache=cache), hidden(model, x)[:, 4:])
    back = with_scan_layers(scanned, False)
    for path, leaf in flatten(nnx.state(model)).items():
        np.testing.assert_array_equal(flatten(nnx.state(back))[path][...], leaf[...])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.long
def test_remat_changes_no_gradient(model, scan_layers):
    x = model.embed_tokens(IDS)
    model = with_scan_layers(model, scan_layers)
    grads = []
    for remat in (False, True):
        graph, state = nnx.split(model)
        other = nnx.merge(graph, state)
        other.cfg = dataclasses.replace(model.cfg, remat=remat)
        graph, state = nnx.split(other)
        loss = lambda s, g=graph: jnp.square(nnx.merge(g, s)(x)[0]).sum()  # noqa: E731
        grads.append(jax.tree.leaves(jax.grad(loss)(state)))
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-6)


def test_cached_steps_under_jit_and_scan_equal_one_call(model):
    x = model.embed_tokens(IDS)
    want = hidden(model, x)
    cache = model.init_cache(batch=2, size=12)  # more slots than positions
    first, cache = jax.jit(lambda x, c: model(x, cache=c))(x[:, :3], cache)

    def step(cache, x):
        out, cache = model(x[:, None], cache=cache)
        return cache, out[:, 0]

    cache, rest = jax.lax.scan(step, cache, jnp.moveaxis(x[:, 3:], 1, 0))
    close(jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1), want)
    assert cache.length == 9


def test_left_and_right_padding_leave_valid_tokens_as_they_were(model):
    x = model.embed_tokens(IDS[:, :5])
    want = hidden(model, x)
    pad = jnp.full((2, 3, 12), 5.0)
    for padded, valid in (
        (jnp.concatenate([pad, x], axis=1), jnp.asarray([[False] * 3 + [True] * 5] * 2)),
        (jnp.concatenate([x, pad], axis=1), jnp.asarray([[True] * 5 + [False] * 3] * 2)),
    ):
        mask = causal_mask(8) & key_mask(valid)
        got = hidden(model, padded, positions_from_valid(valid), mask)
        assert np.isfinite(got).all()  # rows before the first valid token see nothing
        close(got[np.asarray(valid)].reshape(want.shape), want)


def test_half_precision_compute_keeps_parameters_and_residual_stream_in_float32(model):
    x = model.embed_tokens(IDS)
    half = GPT2(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(model))
    assert half.embed_tokens(IDS).dtype == jnp.float32
    seen = []
    block = type(half.blocks[0])
    original = block.__call__
    try:
        block.__call__ = lambda self, x, *a, **k: seen.append(x.dtype) or original(self, x, *a, **k)
        got, cache = half(x, cache=half.init_cache(batch=2, size=9))
    finally:
        block.__call__ = original
    assert seen == [jnp.float32] * 3
    assert got.dtype == cache.k[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), hidden(model, x), atol=0.1)  # 8 bits


def test_dropout_acts_only_when_asked_and_needs_a_key(model):
    x = model.embed_tokens(IDS)
    dropped = nnx.merge(*nnx.split(model))
    dropped.cfg = dataclasses.replace(TINY, dropout=0.3)
    for block in dropped.blocks:
        block.attn.dropout = block.attn.weights_dropout = block.mlp.dropout = 0.3
    close(hidden(dropped, x), hidden(model, x))
    one, two = (
        hidden(dropped, x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 2)
    )
    again = hidden(dropped, x, deterministic=False, rngs=nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-2
    with pytest.raises(ValueError, match="rngs"):
        dropped(x, deterministic=False)


def test_rate_on_attention_weights_is_one_of_its_own():
    x = jax.random.normal(jax.random.key(0), (1, 6, 12))
    outputs = {}
    for rates in ((0.0, None), (0.0, 0.5), (0.3, 0.0), (0.3, None)):
        cfg = dataclasses.replace(TINY, dropout=rates[0], attention_dropout=rates[1])
        model = alive(GPT2(cfg, rngs=nnx.Rngs(0)))
        assert model.blocks[0].attn.weights_dropout == rates[rates[1] is not None]
        outputs[rates] = hidden(model, x, deterministic=False, rngs=nnx.Rngs(dropout=1))
    close(outputs[0.0, None], hidden(model, x))
    assert np.abs(outputs[0.0, 0.5] - outputs[0.0, None]).max() > 1e-2
    assert np.abs(outputs[0.3, 0.0] - outputs[0.3, None]).max() > 1e-2


def test_dropout_keeps_the_mean_of_attention():
    cfg = GPT2Config(num_layers=1, num_heads=1, embed_dim=4, max_seq_len=8, vocab_size=3)
    attn = alive(GPT2(cfg, rngs=nnx.Rngs(0))).blocks[0].attn
    x, zero = jax.random.normal(jax.random.key(0), (1, 8, 4)), jnp.zeros((), jnp.int32)
    want, _ = attn(x, causal_mask(8), None, zero)
    attn.dropout = attn.weights_dropout = 0.2
    keys = jax.random.split(jax.random.key(3), 4000)
    many = jax.vmap(lambda key: attn(x, causal_mask(8), None, zero, key=key)[0])(keys)
    np.testing.assert_allclose(many.mean(0), want, atol=0.05)  # 4000 draws


def test_residual_projections_start_smaller_and_biases_at_zero():
    model = GPT2(
        GPT2Config(num_layers=8, num_heads=2, embed_dim=64, vocab_size=9), rngs=nnx.Rngs(0)
    )
    block = model.blocks[3]
    assert np.std(block.attn.qkv.kernel[...]) == pytest.approx(0.02, rel=0.03)  # 12,288 draws
    assert np.std(block.mlp.down.kernel[...]) == pytest.approx(0.005, rel=0.03)
    assert not block.mlp.up.bias[...].any()


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(ValueError, match="21 positions, but the model has 20"):
        model(jnp.zeros((1, 21, 12)))
    with pytest.raises(ValueError, match="do not fit"):
        model(jnp.zeros((1, 4, 12)), cache=model.init_cache(batch=1, size=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"num_heads \(5\) must divide embed_dim \(768\)"),
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**options)


def test_parameters_only():
    _, state, rest = nnx.split(GPT2(TINY, rngs=nnx.Rngs(0)), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert jax.tree.leaves(state)


def test_large_model_with_special_tokens_has_the_published_number_of_parameters():
    cfg = GPT2Config(num_layers=36, num_heads=20, embed_dim=1280, vocab_size=50257 + 66)
    shapes = flat_shapes(nnx.state(nnx.eval_shape(lambda: GPT2(cfg, rngs=ShapeRngs()))))
    assert sum(math.prod(shape) for shape in shapes.values()) == 774_114_560


def original_state(model, prefix):
    """The original's state dict of a model, written without the converter."""
    out = {"wte.weight": model.token_embed.embedding, "wpe.weight": model.position_embed.embedding}
    norms = {"ln_f": model.final_norm}
    linears = {}
    for i, block in enumerate(model.blocks):
        norms |= {f"h.{i}.ln_1": block.attn_norm, f"h.{i}.ln_2": block.mlp_norm}
        linears |= {f"h.{i}.attn.c_attn": block.attn.qkv, f"h.{i}.attn.c_proj": block.attn.out}
        linears |= {f"h.{i}.mlp.c_fc": block.mlp.up, f"h.{i}.mlp.c_proj": block.mlp.down}
    out |= {f"{k}.weight": norm.scale for k, norm in norms.items()}
    out |= {f"{k}.bias": norm.bias for k, norm in norms.items()}
    out |= {f"{k}.weight": linear.kernel for k, linear in linears.items()}
    out |= {f"{k}.bias": linear.bias for k, linear in linears.items()}
    return {prefix + k: np.asarray(v[...]) for k, v in out.items()}


ORIGINAL = {
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 12,
    "n_positions": 20,
    "vocab_size": 17,
    "n_inner": 10,
    "activation_function": "gelu_new",
}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_both_original_layouts_convert(model, prefix):
    source = original_state(model, prefix)
    source[f"{prefix}h.0.attn.bias"] = np.tril(np.ones((1, 1, 20, 20), np.float32))
    source["lm_head.weight"] = source[f"{prefix}wte.weight"].copy()
    got = from_torch("gpt2", source, ORIGINAL)
    assert got.cfg == TINY
    close(hidden(got, got.embed_tokens(IDS)), hidden(model, model.embed_tokens(IDS)))


def test_converted_weights_fill_a_stacked_model(model):
    cfg = dataclasses.replace(TINY, scan_layers=True)
    got = from_torch("gpt2", original_state(model, ""), cfg)
    assert got.blocks.attn.qkv.kernel.shape == (3, 12, 36)
    close(hidden(got, got.embed_tokens(IDS)), hidden(model, model.embed_tokens(IDS)))


def test_an_untied_head_or_a_missing_key_is_refused(model):
    source = original_state(model, "transformer.")
    with pytest.raises(ConversionError, match="not tied"):
        from_torch("gpt2", source | {"lm_head.weight": np.zeros((17, 12), np.float32)}, ORIGINAL)
    del source["transformer.h.1.ln_2.bias"]
    with pytest.raises(ConversionError, match=r"blocks\.1\.mlp_norm\.bias"):
        from_torch("gpt2", source, ORIGINAL)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"activation_function": "gelu"}, "activation 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"attn_pdrop": 0.1, "embd_pdrop": 0.2}, "dropout"),
        ({"rotary": True}, "unknown option.*rotary"),
    ],
)
def test_options_that_would_change_the_result_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        config_from_original(ORIGINAL | option)

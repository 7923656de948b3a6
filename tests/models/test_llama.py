import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.generate import generate
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.nn.masks import causal_mask, key_mask, positions_from_valid
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.nn.rotary import RotaryScaling, apply_rotary, rotary_frequencies, rotary_tables

TINY = LlamaConfig(
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    embed_dim=20,
    head_dim=4,
    mlp_dim=14,
    max_seq_len=40,
    vocab_size=17,
)
IDS = np.random.default_rng(1).integers(0, 17, (2, 9))


def random_llama(cfg=TINY, **options):
    return random_module(lambda: Llama(cfg, rngs=ShapeRngs(), **options))


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def embeds():
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, 20)), jnp.float32)


def hidden(model, embeds, positions=None, mask=None):
    return np.asarray(_run(*nnx.split(model), embeds, positions, mask))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, embeds, positions, mask):
    return nnx.merge(graph, state)(embeds, positions, mask)[0]


def close(a, b, atol=5e-6):
    np.testing.assert_allclose(a, b, atol=atol)


def by_hand(model, x):
    """The same network, one head and one position after another, in float64."""
    cfg, half = model.cfg, model.cfg.width_of_head // 2
    freqs = [
        rotary_frequencies(4, theta=cfg.rope_theta, scaling=cfg.rope_scaling)[i] for i in (0, 1)
    ]
    get = lambda leaf: np.asarray(leaf[...], np.float64)  # noqa: E731
    norm = lambda m, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * get(m.scale)  # noqa: E731

    def turn(vector, position):
        out = vector.copy()
        for i in range(half):
            turned = (vector[i] + 1j * vector[i + half]) * np.exp(1j * position * freqs[i])
            out[i], out[i + half] = turned.real, turned.imag
        return out

    x = np.asarray(x, np.float64)
    for block in model.blocks:
        y = norm(block.attn_norm, x)
        q, k, v = (y @ get(getattr(block.attn, name).kernel) for name in "qkv")
        out = np.zeros((*x.shape[:2], 24))
        for b, t, h in np.ndindex(*x.shape[:2], 6):
            g = h // 3
            query = turn(q[b, t, 4 * h : 4 * h + 4], t)
            keys = [turn(k[b, s, 4 * g : 4 * g + 4], s) for s in range(t + 1)]
            weights = np.exp([query @ key / 2 for key in keys])
            values = v[b, : t + 1, 4 * g : 4 * g + 4]
            out[b, t, 4 * h : 4 * h + 4] = weights @ values / weights.sum()
        x = x + out @ get(block.attn.out.kernel)
        y = norm(block.mlp_norm, x)
        gate = y @ get(block.mlp.gate.kernel)
        inner = gate / (1 + np.exp(-gate)) * (y @ get(block.mlp.up.kernel))
        x = x + inner @ get(block.mlp.down.kernel)
    return norm(model.final_norm, x)


def test_equals_a_calculation_by_hand(model, embeds):
    close(hidden(model, embeds), by_hand(model, embeds))


def test_later_tokens_do_not_reach_earlier_ones(model, embeds):
    changed = hidden(model, embeds.at[:, 5].multiply(-1))
    close(changed[:, :5], hidden(model, embeds)[:, :5])
    assert np.abs(changed[:, 6:] - hidden(model, embeds)[:, 6:]).max() > 1e-3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_steps_equal_one_call(model, embeds, scan_layers):
    model = with_scan_layers(model, scan_layers)
    cache = model.init_cache(batch=2, size=12)  # more slots than positions
    assert cache.k[0].shape == (2, 12, 2, 4)  # two heads of keys, not six

    @jax.jit
    def run(embeds, cache):
        first, cache = model(embeds[:, :3], cache=cache)

        def step(cache, x):
            out, cache = model(x[:, None], cache=cache)
            return cache, out[:, 0]

        cache, rest = jax.lax.scan(step, cache, jnp.moveaxis(embeds[:, 3:], 1, 0))
        return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1), cache.length

    got, length = run(embeds, cache)
    close(got, hidden(model, embeds))
    assert length == 9


def test_scan_over_layers_equals_the_loop_and_comes_back(model, embeds):
    scanned = with_scan_layers(model)
    assert scanned.blocks.attn.q.kernel.shape == (2, 20, 24)
    close(hidden(scanned, embeds), hidden(model, embeds))
    back = nnx.to_flat_state(nnx.state(with_scan_layers(scanned, False)))
    for (path, leaf), (other, same) in zip(back, nnx.to_flat_state(nnx.state(model)), strict=True):
        assert path == other
        np.testing.assert_array_equal(leaf[...], same[...])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_changes_no_gradient(model, embeds, scan_layers):
    graph, state = nnx.split(with_scan_layers(model, scan_layers))
    grads = []
    for remat in (False, True):
        other = nnx.merge(graph, state)
        other.cfg = dataclasses.replace(other.cfg, remat=remat)
        squares = lambda s, g: jnp.square(nnx.merge(g, s)(embeds)[0]).sum()  # noqa: E731
        grad = jax.jit(jax.grad(squares), static_argnums=1)(state, nnx.graphdef(other))
        grads.append(jax.tree.leaves(grad))
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-6)


def test_only_distances_of_positions_matter_and_padding_leaves_valid_tokens_alone(model, embeds):
    x, pad = embeds[:, :5], jnp.full((2, 3, 20), 5.0)
    want = hidden(model, x)
    close(hidden(model, x, jnp.arange(5)[None] + 11), want)
    assert np.abs(hidden(model, x, jnp.arange(5)[None] * 2) - want).max() > 1e-3
    valid = jnp.asarray([[False] * 3 + [True] * 5] * 2)
    mask = causal_mask(8) & key_mask(valid)
    got = hidden(model, jnp.concatenate([pad, x], 1), positions_from_valid(valid), mask)
    assert np.isfinite(got).all()
    close(got[:, 3:], want)


def test_half_precision_keeps_parameters_and_residual_stream_in_float32(model, embeds):
    half = random_llama(dtype=jnp.bfloat16)
    assert half.embed_tokens(IDS).dtype == jnp.float32
    seen = []
    norm = half.blocks[1].attn_norm
    half.blocks[1].attn_norm = lambda x: seen.append(x.dtype) or norm(x)
    got = jax.jit(lambda x: half(x)[0])(embeds)
    assert seen == [jnp.float32]
    assert got.dtype == half.init_cache(batch=2, size=9).k[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), hidden(model, embeds), atol=0.1)  # 8 bits


def test_logits_use_the_token_table_or_a_matrix_of_their_own(model, embeds):
    want = hidden(model, embeds) @ np.asarray(model.token_embed.embedding[...]).T
    close(model.logits(model(embeds)[0]), want)
    own = random_llama(dataclasses.replace(TINY, tie_embeddings=False))
    assert own.logits(embeds).shape == (2, 9, 17)
    close(own.logits(embeds), np.asarray(embeds) @ np.asarray(own.head.kernel[...]))


def test_slow_waves_are_stretched_fast_ones_kept_and_the_middle_goes_over():
    plain = rotary_frequencies(64, theta=500_000.0)
    scaled = rotary_frequencies(64, theta=500_000.0, scaling=RotaryScaling())
    waves, ratio = 2 * math.pi / plain, plain / scaled
    np.testing.assert_allclose(ratio[waves < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 8192], 32, rtol=1e-6)
    middle = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert len(middle) >= 2
    assert (np.diff([1, *middle, 32]) > 0).all()
    with pytest.raises(ValueError, match="high_freq_factor"):
        RotaryScaling(low_freq_factor=4.0)


def test_rotation_keeps_lengths_and_turns_pairs_half_a_head_apart():
    x = jnp.asarray([1.0, 0, 0, 0])[None, None, None]
    turned = apply_rotary(x, *rotary_tables(jnp.asarray([[3]]), np.asarray([0.5, 0.1], np.float32)))
    close(turned[0, 0, 0], [math.cos(1.5), 0, math.sin(1.5), 0], atol=1e-6)


LM = DiCoDeLMConfig(
    body=TINY,
    num_tokens=3,
    token_dim=5,
    max_keyframes=6,
    num_mixtures=2,
    image_token_id=14,
    pad_token_id=12,
)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_greedy_generation_with_a_cache_equals_whole_sequences(scan_layers):
    lm = random_module(lambda: DiCoDeLM(LM, rngs=ShapeRngs()))
    lm.body = with_scan_layers(lm.body, scan_layers)
    text = jnp.asarray(IDS[:, :4] % 12)
    tokens = generate(lm, text, num_keyframes=3, do_sample=False)

    @jax.jit
    def predict(tokens):  # every token anew from all of the sequence before it, without a cache
        sequence = lm.lay_out(text, lm.embed_deep_tokens(tokens) + lm.positions_of(3))
        hidden = lm.body(sequence)[0][:, 4:].reshape(2, 3, 4, -1)[:, :, :3]
        raw = lm.output_mlp(hidden).reshape(2, 9, -1)
        mean, logits = raw[..., :10].reshape(2, 9, 2, 5), raw[..., 20:]
        return (jax.nn.softmax(logits)[..., None] * mean).sum(-2).reshape(2, 3, 3, 5)

    want = jnp.zeros((2, 3, 3, 5))
    for i in range(9):
        at = np.arange(9).reshape(3, 3)[..., None] == i
        want = jnp.where(at, predict(want), want)
    close(tokens, want)
    assert np.std(tokens) > 1e-3


def test_gradients_reach_every_parameter_of_the_language_model():
    lm = random_module(lambda: DiCoDeLM(LM, rngs=ShapeRngs()))
    tokens = jnp.asarray(np.random.default_rng(3).normal(size=(2, 2, 3, 5)), jnp.float32)
    text = jnp.asarray(IDS[:, :4] % 12)
    graph, state = nnx.split(lm)
    grads = jax.jit(jax.grad(lambda s: nnx.merge(graph, s).loss(text, tokens).loss))(state)
    for path, leaf in nnx.to_flat_state(grads):
        assert np.abs(leaf[...]).max() > 0, path


def test_parameters_only(model):
    _, state, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert jax.tree.leaves(state)


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(ValueError, match="41 positions, but the model has 40"):
        model(jnp.zeros((1, 41, 20)))
    with pytest.raises(ValueError, match="do not fit"):
        model(jnp.zeros((1, 4, 20)), cache=model.init_cache(batch=1, size=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 5}, r"num_kv_heads \(5\) must divide num_heads \(32\)"),
        ({"num_heads": 24}, r"num_heads \(24\) must divide embed_dim \(2048\)"),
        ({"head_dim": 7}, "must be even, got 7"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**options)

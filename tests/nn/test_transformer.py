import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.masks import causal_mask
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.nn.rotary import apply_rotary, halves_of_pairs, rotary_frequencies, rotary_tables
from dicode_jax.nn.transformer import MLP, Attention


def attention(seed=0, **options):
    linear = functools.partial(Linear, use_bias=False, rngs=nnx.Rngs(seed))
    return Attention(10, num_heads=4, head_dim=3, linear=linear, **options)


X = jax.random.normal(jax.random.key(0), (2, 5, 10))


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_a_packed_layer_holds_queries_keys_and_values_in_this_order(num_kv_heads):
    apart = attention(num_kv_heads=num_kv_heads)
    packed = attention(seed=1, num_kv_heads=num_kv_heads, packed=True)
    kernels = [layer.kernel[...] for layer in (apart.q, apart.k, apart.v)]
    packed.qkv.kernel[...] = jnp.concatenate(kernels, axis=1)
    packed.out.kernel[...] = apart.out.kernel[...]
    mask = causal_mask(5)
    np.testing.assert_allclose(packed(X, mask)[0], apart(X, mask)[0], atol=1e-5)


def test_scores_are_scaled_as_told():
    one, other = attention(scale=1.0), attention()
    other.q.kernel[...] = one.q.kernel[...] * 3**0.5
    np.testing.assert_allclose(one(X)[0], other(X)[0], atol=1e-5)


def test_a_gate_multiplies_what_goes_up():
    linear = functools.partial(Linear, use_bias=False, rngs=nnx.Rngs(0))
    mlp = MLP(10, 7, activation=jnp.tanh, gated=True, linear=linear)
    gate, up, down = (layer.kernel[...] for layer in (mlp.gate, mlp.up, mlp.down))
    want = (jnp.tanh(X @ gate) * (X @ up)) @ down
    np.testing.assert_allclose(mlp(X), want, atol=1e-5)
    packed = MLP(10, 7, activation=jnp.tanh, packed=True, linear=linear)
    packed.up.kernel[...] = jnp.concatenate([up, gate], axis=1)
    packed.down.kernel[...] = down
    np.testing.assert_allclose(packed(X), want, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2(GPT2Config(num_layers=1), rngs=ShapeRngs()),
        lambda: Llama(LlamaConfig(num_layers=1), rngs=ShapeRngs()),
        lambda: T5Encoder(T5EncoderConfig(num_layers=1), rngs=ShapeRngs()),
        lambda: CLIPVision(CLIPVisionConfig(num_layers=1), rngs=ShapeRngs()),
    ],
    ids=["gpt2", "llama", "t5", "clip"],
)
def test_models_of_one_config_have_one_graph(make):
    """What is static is compared by value, so a second model of the same sizes compiles nothing."""
    one, two = (nnx.split(nnx.eval_shape(make))[0] for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


def test_neighbours_that_turn_together_have_the_products_of_complex_numbers():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 5, 2, 6)).astype(np.float32) for _ in range(2))
    freqs = rotary_frequencies(6, theta=100.0)
    tables = rotary_tables(jnp.arange(5)[None], freqs)
    got = jnp.einsum(
        "bthd,bshd->bhts", *(apply_rotary(halves_of_pairs(jnp.asarray(x)), *tables) for x in (q, k))
    )
    turn = np.exp(1j * np.arange(5)[:, None] * freqs)[None, :, None]
    pairs = [(x[..., ::2] + 1j * x[..., 1::2]) * turn for x in (q, k)]
    want = np.einsum("bthd,bshd->bhts", pairs[0], pairs[1].conj()).real
    np.testing.assert_allclose(got, want, atol=1e-5)

import ast
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from source_tree import ROOT, python_files

from benchmarks import aot_gpu
from dicode_jax.nn import attention
from dicode_jax.nn.attention import attend, dot_product_attention
from dicode_jax.nn.masks import causal_mask
from dicode_jax.runtime.platform import tracing_for

ALLOWED = {
    "distributions/categorical.py": {"softmax"},  # chances of tokens
    "distributions/gaussian_mixture.py": {"softmax"},  # weights of components
    "models/ar_diffusion/frame_vae.py": {"softmax"},  # weights of codes
}
NAMES = {"softmax", "dot_product_attention", "MultiHeadAttention"}


def draws(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def by_hand(query, key, value, mask=None, bias=None, scale=None):
    """One head and one query after another, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (b, t, h, d), (s, g) = query.shape, key.shape[1:3]
    mask = np.broadcast_to(True if mask is None else mask, (b, h, t, s))
    bias = np.broadcast_to(0.0 if bias is None else bias, (b, h, t, s))
    out = np.zeros_like(query)
    for i, j, k in np.ndindex(b, t, h):
        scores = key[i, :, k // (h // g)] @ query[i, j, k] * (scale or d**-0.5) + bias[i, k, j]
        weights = np.exp(scores) * mask[i, k, j] if mask[i, k, j].any() else np.ones(s)
        out[i, j, k] = weights @ value[i, :, k // (h // g)] / weights.sum()
    return out


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_a_calculation_by_hand(heads, masked, with_bias):
    query, key, value, bias = draws((2, 5, 4, 3), (2, 7, heads, 3), (2, 7, heads, 3), (1, 4, 5, 7))
    mask = causal_mask(5, 7).at[:, :, 2].set(False) if masked else None  # one row sees nothing
    options = {"mask": mask, "bias": bias if with_bias else None, "scale": 0.7}
    got = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, **options))(query, key, value)
    np.testing.assert_allclose(got, by_hand(query, key, value, **options), atol=1e-5)


@pytest.mark.parametrize("form", ["xla", "mapped"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_form_equals_a_calculation_by_hand(form, causal):
    query, key, value = draws(*((2, 5, 4, 3) for _ in range(3)))
    mask = causal_mask(5) if causal else None
    with tracing_for(attention=form):
        got, pull = jax.vjp(
            lambda *x: dot_product_attention(*x, causal=causal, scale=0.7), query, key, value
        )
        gradients = pull(jnp.ones_like(got))
    np.testing.assert_allclose(got, by_hand(query, key, value, mask, scale=0.7), atol=1e-5)
    _, pull = jax.vjp(
        lambda *x: jax.nn.dot_product_attention(*x, mask=mask, scale=0.7), query, key, value
    )
    for one, two in zip(gradients, pull(jnp.ones_like(got)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "on", "sizes", "dtype"),
    [
        ("cudnn", "gpu", (1024, 1024, 64), jnp.bfloat16),
        ("cudnn", "gpu", (505, 505, 64), jnp.float16),
        ("cudnn", "gpu", (1024, 77, 64), jnp.bfloat16),
        ("xla", "gpu", (1024, 1024, 64), jnp.float32),
        ("xla", "gpu", (1024, 1024, 512), jnp.bfloat16),
        ("xla", "gpu", (16, 16, 64), jnp.bfloat16),
        ("xla", "gpu", (1, 512, 64), jnp.bfloat16),
        ("mapped", "cpu", (1024, 1024, 64), jnp.float32),
        ("cudnn", "gpu", (20_000, 20_000, 64), jnp.bfloat16),
        ("mapped", "gpu", (20_000, 20_000, 64), jnp.float32),  # or 9.6 GB of scores
        ("mapped", "tpu", (20_000, 20_000, 64), jnp.bfloat16),
        ("xla", "cpu", (256, 256, 64), jnp.float32),
        ("xla", "tpu", (1024, 1024, 64), jnp.bfloat16),
    ],
)
def test_form_is_chosen_by_platform_type_and_shape(form, on, sizes, dtype):
    t, s, d = sizes
    query, key = (jax.ShapeDtypeStruct((2, n, 3, d), dtype) for n in (t, s))
    with tracing_for(platform=on):
        assert attention._form(query, key) == form


@pytest.mark.parametrize(
    ("capability", "form"), [("7.5", "xla"), ("8.0", "cudnn"), ("10.0", "cudnn")]
)
def test_a_gpu_that_has_no_fused_kernels_is_not_asked_for_them(monkeypatch, capability, form):
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    query = jax.ShapeDtypeStruct((2, 505, 3, 64), jnp.float16)
    for wanted in ("auto", "cudnn"):
        with tracing_for(platform="gpu", attention=wanted):
            assert attention._form(query, query) == form


@pytest.mark.parametrize(("t", "s", "in_parts"), [(1, 16, True), (1, 15, False), (2, 16, False)])
def test_one_query_meets_its_values_in_parts_on_gpus(t, s, in_parts):
    query, key, value = draws((2, t, 3, 8), (2, s, 3, 8), (2, s, 3, 8))
    mask = causal_mask(t, s, offset=s - 5)
    call = lambda *x: dot_product_attention(*x, mask=mask)  # noqa: E731
    with tracing_for(platform="gpu"):
        traced = jax.make_jaxpr(call)(query, key, value)
        got = call(query, key, value)
    assert ("optimization_barrier" in str(traced)) == in_parts
    np.testing.assert_allclose(got, by_hand(query, key, value, mask), atol=1e-6)


def test_without_cudnn_one_warning_and_the_same_numbers(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    query, key, value = (x.astype(jnp.bfloat16) for x in draws(*((2, 6, 4, 8) for _ in range(3))))
    want = by_hand(query, key, value, causal_mask(6))
    with (
        tracing_for(platform="gpu", attention="cudnn"),
        pytest.warns(UserWarning, match="without cuDNN") as caught,
    ):
        got = jax.jit(lambda *x: dot_product_attention(*x, causal=True))(query, key, value)
    assert len(caught) == 1
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03)  # 8 bits


@pytest.mark.parametrize(("t", "s", "causal"), [(6, 6, True), (7, 7, True), (5, 7, False)])
def test_fused_attention_is_in_the_program_of_a_gpu_alone(monkeypatch, t, s, causal):
    aot_gpu.pretend_cudnn(monkeypatch.setattr)
    shapes = [(2, n, 4, 8) for n in (t, s, s)]
    query, key, value = (x.astype(jnp.bfloat16) for x in draws(*shapes))

    def loss(*x):
        return (dot_product_attention(*x, causal=causal).astype(jnp.float32) ** 2).sum()

    with tracing_for(platform="gpu", attention="cudnn"):
        traced = jax.jit(jax.value_and_grad(loss)).trace(query, key, value)
        for platform, has in (("cuda", True), ("cpu", False)):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("__cudnn$fmhaSoftmaxBackward" in text) == has
        got = jax.jit(loss)(query, key, value)  # on this CPU
    want = np.square(by_hand(query, key, value, causal_mask(t) if causal else None)).sum()
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_a_mask_and_causal_together_are_refused():
    query, key = draws((2, 5, 4, 3), (2, 5, 4, 3))
    with pytest.raises(ValueError, match="not both"):
        dot_product_attention(query, key, key, mask=causal_mask(5), causal=True)


def test_an_unknown_form_is_refused():
    wrong = tracing_for(attention="flash")
    with pytest.raises(ValueError, match="one of auto, xla, mapped, cudnn, got 'flash'"), wrong:
        pass


def test_heads_side_by_side_are_split_and_joined():
    query, key, value = draws((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3))
    flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    got = attend(*flat, head_dim=3, mask=causal_mask(5, 7))
    want = by_hand(query, key, value, causal_mask(5, 7))
    np.testing.assert_allclose(got, want.reshape(2, 5, 12), atol=1e-5)


def test_no_keys_give_zeros():
    query, key = draws((2, 5, 4, 3), (2, 0, 4, 3))
    assert not dot_product_attention(query, key, key).any()


def test_dropout_acts_on_weights_and_not_where_it_is_not_implemented():
    query, key = draws((1, 3, 2, 4), (1, 6, 2, 4))
    one = jnp.ones_like(key)
    drop = {"dropout": 0.5, "dropout_key": jax.random.key(1)}
    got = dot_product_attention(query, key, one, **drop)
    assert np.abs(got - 1).max() > 0.05  # the weights that are left no longer sum to one
    np.testing.assert_array_equal(got[..., 0], got[..., 1])  # for all channels of a head
    with pytest.raises(ValueError, match="no bias and equal numbers of heads"):
        dot_product_attention(query, key[:, :, :1], one[:, :, :1], **drop)


def attention_in(tree):
    """Names and products by which a file attends on its own."""
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "name", None)
        if isinstance(node, ast.Attribute) and name in NAMES:
            yield name
        elif isinstance(node, ast.ImportFrom) and node.module != "dicode_jax.nn.attention":
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            inputs, arrow, output = node.value.partition("->")  # queries times keys: a sum over d
            parts = inputs.split(",")
            if arrow and len(parts) == 2 and {len(p.strip()) for p in (*parts, output)} == {4}:
                yield node.value


def test_nothing_else_attends():
    found = {
        str(path.relative_to(ROOT / "dicode_jax")): set(attention_in(ast.parse(path.read_text())))
        for path in python_files("dicode_jax")
    }
    assert found.pop("nn/attention.py")
    assert {path: names for path, names in found.items() if names} == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "jax.nn.softmax(scores)",
        "from jax.nn import softmax",
        "jax.nn.dot_product_attention(q, k, v)",
        "nnx.MultiHeadAttention(num_heads=2)",
        "jnp.einsum('bhtd,bhsd->bhts', q, k)",
    ],
)
def test_a_file_that_attends_is_found(line):
    assert list(attention_in(ast.parse(line)))
    assert not list(attention_in(ast.parse("from dicode_jax.nn.attention import attend")))

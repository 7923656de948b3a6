"""Layers of the video UNet: order of frames, shared contexts, resampling, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.nn import spatiotemporal
from dicode_jax.nn.conv import upsample_nearest
from dicode_jax.nn.resnet import average_pool, dropout
from dicode_jax.nn.spatiotemporal import ContextAttention, TemporalConv, TemporalTransformer
from dicode_jax.runtime.platform import tracing_for

HEADS = {"num_heads": 2, "head_dim": 3}


def randomized(module, seed=0):
    """The module with 0.3 standard normal added to every parameter."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def video(seed=1, shape=(2, 4, 3, 5, 8)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_temporal_attention_without_positions_ignores_the_order_of_frames():
    layer = randomized(TemporalTransformer(8, num_groups=4, rngs=nnx.Rngs(0), **HEADS))
    order, x = jnp.array([2, 0, 3, 1]), video()
    np.testing.assert_allclose(layer(x)[:, order], layer(x[:, order]), atol=1e-5)


def test_a_context_row_serves_consecutive_sequences():
    layer = randomized(ContextAttention(8, context_dim=6, rngs=nnx.Rngs(0), **HEADS))
    x = jax.random.normal(jax.random.key(0), (6, 5, 8))
    context = jax.random.normal(jax.random.key(1), (2, 4, 6))
    np.testing.assert_allclose(
        layer(x, context), layer(x, jnp.repeat(context, 3, axis=0)), atol=1e-6
    )


def test_the_image_branch_adds_its_own_softmax_scaled_by_alpha():
    options = {"context_dim": 6, "image_branch": True, "learnable_image_scale": True}
    layer = randomized(ContextAttention(8, rngs=nnx.Rngs(0), **HEADS, **options))
    layer.out.kernel[...] = jnp.eye(6, 8)
    layer.out.bias[...] = jnp.zeros(8)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    text, image = (jax.random.normal(jax.random.key(i), (2, 3 + i, 6)) for i in (1, 2))
    outputs = {}
    for alpha in (0.0, 0.7):
        layer.alpha[...] = jnp.asarray(alpha)
        outputs[alpha] = layer(x, text, image) - layer(x, text)
    np.testing.assert_allclose(outputs[0.7], outputs[0.0] * (1 + np.tanh(0.7)), atol=1e-6)


def test_no_image_tokens_contribute_exactly_nothing():
    layer = randomized(
        ContextAttention(8, context_dim=6, image_branch=True, rngs=nnx.Rngs(0), **HEADS)
    )
    x, text = jnp.ones((2, 5, 8)), jnp.ones((2, 3, 6))
    np.testing.assert_array_equal(layer(x, text, jnp.zeros((2, 0, 6))), layer(x, text))


def test_a_new_temporal_convolution_is_the_identity():
    layer = TemporalConv(8, dropout_rate=0.1, num_groups=4, rngs=nnx.Rngs(0))
    x = video()
    np.testing.assert_array_equal(layer(x), x)
    assert np.abs(randomized(layer)(x) - x).max() > 1e-2


def test_frames_outermost_attend_as_frames_innermost_do(monkeypatch):
    seen, across = [], spatiotemporal.attend_across

    def look(query, key, value, **options):
        seen.append(query.shape)
        return across(query, key, value, **options)

    monkeypatch.setattr(spatiotemporal, "attend_across", look)
    layer = randomized(TemporalTransformer(8, depth=2, num_groups=4, rngs=nnx.Rngs(0), **HEADS))
    graph, state = nnx.split(layer)

    def run(state, x):
        out = nnx.merge(graph, state)(x)
        return (out**2).sum(), out

    def with_gradient(on, form):
        with tracing_for(platform=on, attention=form):
            run_on = jax.jit(jax.value_and_grad(run, has_aux=True))
            return run_on.trace(state, video()).lower().compile()(state, video())

    (_, want), want_gradient = with_gradient("cpu", "auto")
    assert not seen
    (_, got), gradient = with_gradient("gpu", "xla")
    assert seen == [(4, 2 * 3 * 5, 6)] * 4  # two blocks of two, and 4 frames of all pixels
    np.testing.assert_allclose(got, want, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), gradient, want_gradient)


def test_pooling_undoes_nearest_upsampling():
    x = video()
    up = upsample_nearest(x)
    assert up.shape == (2, 4, 6, 10, 8)
    np.testing.assert_array_equal(
        up[:, :, 2:4, 4:6], jnp.broadcast_to(x[:, :, 1:2, 2:3], (2, 4, 2, 2, 8))
    )
    np.testing.assert_allclose(average_pool(up), x, rtol=1e-6)


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    x = jnp.ones((100, 1000))
    y = dropout(x, 0.3, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(0)))
    assert abs((y == 0).mean() - 0.3) < 0.005  # four standard errors of 100,000 draws
    assert abs(y.mean() - 1.0) < 0.008


def test_dropout_without_rngs_says_what_to_pass():
    with pytest.raises(ValueError, match=r"rngs=nnx\.Rngs\(dropout=key\)"):
        dropout(jnp.ones(3), 0.1, deterministic=False, rngs=None)

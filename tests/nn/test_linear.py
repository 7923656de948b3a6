import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.nn.linear import WIDE, Linear
from dicode_jax.runtime.platform import tracing_for


@pytest.mark.parametrize("on", ["cpu", "gpu"])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2,), (3, 1, 2)])
def test_any_number_of_axes_goes_through_one_product_of_two_rows_or_more_on_gpus(lead, on):
    layer = Linear(5, 4, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(4.0)
    x = jax.random.normal(jax.random.key(0), (*lead, 5))
    with tracing_for(platform=on):
        got, traced = layer(x), jax.make_jaxpr(layer)(x)
    kernel, bias = np.asarray(layer.kernel[...]), np.arange(4.0)
    np.testing.assert_allclose(got, np.asarray(x) @ kernel + bias, atol=1e-5)
    (product,) = (e for e in traced.eqns if e.primitive.name == "dot_general")
    least = 2 if on == "gpu" else 1
    assert product.outvars[0].aval.size == max(least, x.size // 5) * 4


@pytest.mark.parametrize("rows", [1, 24])
def test_no_gradient_of_a_wide_layer_is_a_sum_on_cpus(rows):
    layer = Linear(5, WIDE, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(float(WIDE))
    x = jax.random.normal(jax.random.key(0), (2, rows, 5))
    graph, params = nnx.split(layer)
    loss = jax.grad(lambda p: jnp.vdot(nnx.merge(graph, p)(x), weight))
    weight = jax.random.normal(jax.random.key(1), (2, rows, WIDE))
    got, traced = jax.jit(loss)(params), str(jax.make_jaxpr(loss)(params))
    np.testing.assert_allclose(layer(x), np.asarray(x @ layer.kernel[...]) + np.arange(WIDE), 1e-5)
    np.testing.assert_allclose(got.bias[...], np.asarray(weight).sum((0, 1)), atol=1e-5)
    assert "reduce_sum" not in traced

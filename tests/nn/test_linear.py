import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.nn.linear import Linear
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

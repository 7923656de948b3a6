"""Low-rank additions to linear layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.nn import lora
from dicode_jax.nn.linear import Linear

X = jax.random.normal(jax.random.key(1), (2, 3, 5))


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Linear(5, 4, rngs=nnx.Rngs(0)), Linear(4, 6, rngs=nnx.Rngs(1))])
        self.last = Linear(6, 7, use_bias=False, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.last(self.layers[1](self.layers[0](x)))


def paths(model):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}


def test_additions_start_at_nothing_and_fold_into_the_weights():
    plain, model = Model(), Model()
    select = lambda path: path in (("layers", 1), ("last",))  # noqa: E731
    lora.add(model, select, rank=2, alpha=3.0, rngs=nnx.Rngs(3))
    new = {f"{layer}.{name}" for layer in ("layers.1", "last") for name in lora.NAMES}
    assert paths(model) == paths(plain) | new
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-6)

    for layer in (model.layers[1], model.last):
        layer.lora_up[...] = jax.random.normal(jax.random.key(4), layer.lora_up.shape)
    trained = model(X)
    assert np.abs(trained - plain(X)).max() > 0.1
    down, up = (np.asarray(getattr(model.last, name)[...], np.float64) for name in lora.NAMES)
    wanted = np.asarray(plain.last.kernel[...], np.float64) + 3.0 / 2 * down @ up

    lora.fold(model)
    assert paths(model) == paths(plain)
    assert isinstance(model.last, Linear)
    np.testing.assert_allclose(model.last.kernel[...], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model(X), trained, rtol=1e-5, atol=1e-5)


def test_additions_compute_in_the_layers_type():
    layer = Linear(5, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    added = lora.LoRALinear(layer, 2, 1.0, rngs=nnx.Rngs(0))
    assert added(X).dtype == jnp.bfloat16
    assert added.lora_down.dtype == jnp.float32


def test_nothing_selected_is_an_error():
    with pytest.raises(ValueError, match="no linear layer was selected"):
        lora.add(Model(), lambda path: False, rank=2, alpha=1.0, rngs=nnx.Rngs(0))

"""PatchGAN's discriminator: sizes, and its batch norm against PyTorch's and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.patch_discriminator import (
    BatchNorm,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
)
from dicode_jax.nn.rngs import blank

X = 2.0 * jax.random.normal(jax.random.key(0), (4, 3, 5, 6)) + 1.0


def test_the_full_size_has_the_parameters_of_the_release():
    model = blank(PatchDiscriminator, PatchDiscriminatorConfig())
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 2_765_633


@pytest.mark.torch
def test_batch_norm_is_pytorch_s_in_training_and_after():
    torch = pytest.importorskip("torch")
    norm = BatchNorm(6, rngs=nnx.Rngs(0))
    other = torch.nn.BatchNorm2d(6)
    other.weight.data = torch.tensor(np.array(norm.scale[...]))
    turned = torch.tensor(np.array(jnp.moveaxis(X, -1, 1)))
    running = {"mean": jnp.zeros(6), "variance": jnp.ones(6)}
    for scale in (1.0, 3.0):
        got, running = norm(scale * X, running, True)
        want = np.moveaxis(other(scale * turned).detach().numpy(), 1, -1)
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(running["mean"], other.running_mean, rtol=1e-5)
    np.testing.assert_allclose(running["variance"], other.running_var, rtol=1e-5)
    got, same = norm(X, running, False)
    want = np.moveaxis(other.eval()(turned).detach().numpy(), 1, -1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert same is running


def test_running_statistics_go_in_and_out_and_carry_no_gradient():
    cfg = PatchDiscriminatorConfig(channels=4, num_layers=2)
    model = PatchDiscriminator(cfg, rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    logits, seen = jax.jit(lambda x, s: model(x, s, train=True))(images, model.statistics())
    assert logits.shape == (3, 2, 2)
    assert [x["mean"].shape for x in seen] == [(8,), (16,)]
    assert nnx.state(model) == nnx.state(model, nnx.Param)
    changed = jax.grad(lambda x: model(x, model.statistics(), train=True)[1][0]["mean"].sum())
    np.testing.assert_array_equal(changed(images), 0.0)

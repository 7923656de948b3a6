"""Norms: closed forms where epsilon counts, and the epsilon of every norm of every model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.norm import GroupNorm, layer_norm
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.runtime.platform import tracing_for

# Of a variance near epsilon, so that twice the epsilon is another result by a fifth.
X = 3e-3 * np.random.default_rng(0).normal(size=(2, 3, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-6])
def test_layer_norm_is_its_closed_form(eps):
    norm = layer_norm(6, eps=eps, rngs=ShapeRngs())
    norm.scale[...], norm.bias[...] = jnp.arange(6.0), jnp.arange(6.0) / 7
    centred = X - X.mean(-1, keepdims=True)
    want = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(norm(X), want * np.arange(6) + np.arange(6) / 7, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_group_norm_pools_all_but_batch_and_group(eps):
    norm = GroupNorm(6, eps=eps, num_groups=2)
    norm.scale[...], norm.bias[...] = jnp.arange(6.0), jnp.arange(6.0) / 7
    groups = X.reshape(2, 15, 2, 3)
    centred = groups - groups.mean((1, 3), keepdims=True)
    want = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + eps)
    want = want.reshape(X.shape) * np.arange(6) + np.arange(6) / 7
    np.testing.assert_allclose(norm(jnp.asarray(X)), want, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("distance", [0.0, 100.0])
def test_group_norm_is_exact_however_far_from_zero(platform, distance):
    rng = np.random.default_rng(1)
    x = (distance + rng.normal(size=(2, 16, 20, 6))).astype(np.float32)
    norm = GroupNorm(6, eps=1e-5, num_groups=2)
    with tracing_for(platform=platform):
        got = norm(jnp.asarray(x))
    groups = x.astype(np.float64).reshape(2, 320, 2, 3)
    centred = groups - groups.mean((1, 3), keepdims=True)
    want = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want.reshape(x.shape), atol=2e-5 * max(1.0, distance / 50))


@pytest.mark.parametrize("number", [0.0, 7.0])
def test_group_norm_of_equal_numbers_is_zero_on_every_platform(number):
    for platform in ("cpu", "gpu"):
        with tracing_for(platform=platform):
            y = GroupNorm(6, eps=1e-6, num_groups=2)(jnp.full((1, 4, 6), number))
        np.testing.assert_array_equal(y, jnp.zeros((1, 4, 6)))


def test_group_norm_has_the_same_gradient_on_every_platform():
    norm, x, gradients = GroupNorm(6, eps=1e-5, num_groups=2), jnp.asarray(X) + 1.0, []
    for platform in ("cpu", "gpu"):
        with tracing_for(platform=platform):
            gradients.append(jax.grad(lambda x: (norm(x) ** 3).sum())(x))
    np.testing.assert_allclose(*gradients, rtol=1e-3, atol=1e-2 * np.abs(gradients[0]).max())


def epsilons(build):
    """Kind of a norm and its epsilon, of all norms of a model, none of whose arrays are made."""
    model = nnx.eval_shape(lambda: build(rngs=ShapeRngs()))
    found = set()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, GroupNorm):
            found.add(("before attention" if path[-1] == "norm" else "group", module.eps))
        elif isinstance(module, nnx.LayerNorm | nnx.RMSNorm):
            found.add((type(module).__name__, module.epsilon))
    return found


SMALL = {"num_layers": 1, "num_heads": 2, "embed_dim": 8}


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (functools.partial(GPT2, GPT2Config(**SMALL, vocab_size=5)), {("LayerNorm", 1e-5)}),
        (functools.partial(Llama, LlamaConfig(num_layers=1)), {("RMSNorm", 1e-5)}),
        (functools.partial(T5Encoder, T5EncoderConfig(num_layers=1)), {("RMSNorm", 1e-6)}),
        (functools.partial(CLIPVision, CLIPVisionConfig(**SMALL)), {("LayerNorm", 1e-5)}),
        (functools.partial(CLIPText, CLIPTextConfig(**SMALL)), {("LayerNorm", 1e-5)}),
        (functools.partial(Resampler, ResamplerConfig(depth=1)), {("LayerNorm", 1e-5)}),
        (
            functools.partial(UNet3D, UNet3DConfig(model_channels=64, num_res_blocks=1)),
            {("LayerNorm", 1e-5), ("before attention", 1e-6), ("group", 1e-5)},
        ),
        (
            functools.partial(AutoencoderKL, AutoencoderKLConfig(channels=32)),
            {("before attention", 1e-6), ("group", 1e-6)},
        ),
    ],
    ids=lambda value: value.func.__name__ if isinstance(value, functools.partial) else "",
)
def test_every_norm_has_the_epsilon_of_its_original(build, wanted):
    assert epsilons(build) == wanted

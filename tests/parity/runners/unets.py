"""Runners of the autoencoder and the video UNet: every case, every activation."""

import contextlib
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from parity.harness import Check, runner

OUTPUT = {"atol": 5e-5, "rtol": 1e-4}
# Activations stored as float16 are rounded to 2**-11 of their size.
ACTIVATION = {np.dtype(np.float32): OUTPUT, np.dtype(np.float16): {"atol": 5e-5, "rtol": 2e-3}}


@contextlib.contextmanager
def captured(model: nnx.Module):
    """Yields a dictionary that collects the output of every submodule by its path, run eagerly."""
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    outputs, originals = {}, {}
    for cls in {type(module) for _, module in nnx.iter_modules(model)}:
        if "__call__" not in vars(cls):
            continue
        originals[cls] = call = vars(cls)["__call__"]

        def recording(self, *args, _call=call, **kwargs):
            output = _call(self, *args, **kwargs)
            outputs[paths.get(id(self))] = output
            return output

        cls.__call__ = recording
    try:
        yield outputs
    finally:
        for cls, call in originals.items():
            cls.__call__ = call


def last(image):
    """[n, c, ...] -> [n, ..., c]."""
    return np.moveaxis(image, 1, -1)


def autoencoder_path(path: str) -> str:
    """Original module path -> path in `AutoencoderKL`."""
    path = re.sub(r"\b(down|up)\.(\d+)", r"levels.\2", path)
    path = re.sub(r"\b(down|up)sample\b", "resample", path)
    path = path.replace(".block.", ".blocks.").replace(".attn.", ".attentions.")
    return path.replace("mid.block_", "middle.block").replace("mid.attn_1", "middle.attention")


@runner("autoencoder_kl")
def run_autoencoder(fixture):
    arrays = fixture.arrays
    model = convert.from_torch("autoencoder_kl", fixture.state_dict(), fixture.config["config"])
    for case in fixture.config["cases"]:
        x, z = (jnp.asarray(last(arrays[f"in/{case}/{name}"])) for name in ("x", "z"))
        with captured(model) as activations:
            moments = model.moments(x)
            decoded = model.decode(z)
        posterior = DiagonalGaussian.from_moments(moments)
        noise = jnp.asarray(last(arrays[f"in/{case}/noise"]))
        got = {
            "moments": moments,
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "sample": posterior.sample(noise=noise),
            "kl": posterior.kl(),
            "decoded": decoded,
        }
        for name in names(arrays, f"out/{case}/"):
            want = arrays[f"out/{case}/{name}"]
            yield Check(
                f"{case}/{name}", got[name], last(want) if want.ndim > 1 else want, **OUTPUT
            )
        for name in names(arrays, f"act/{case}/"):
            want = arrays[f"act/{case}/{name}"]
            value = activations[autoencoder_path(name)]
            yield Check(f"{case}/act/{name}", value, last(want), **ACTIVATION[want.dtype])


def names(arrays, prefix: str) -> list[str]:
    """The keys below a prefix, without it."""
    return [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]

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


def call(model: nnx.Module, method: str, wanted: dict[str, str], *args):
    """Runs a method under jit; returns its result and the activations `wanted` (name -> path)."""

    @nnx.jit
    def run(model, *args):
        with captured(model) as outputs:
            result = getattr(model, method)(*args)
        return result, {name: outputs[path] for name, path in wanted.items()}

    return run(model, *args)


@contextlib.contextmanager
def captured(model: nnx.Module):
    """Yields a dictionary that collects the output of every submodule by its path."""
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
        paths = {name: autoencoder_path(name) for name in names(arrays, f"act/{case}/")}
        encoder = {name: path for name, path in paths.items() if path.startswith("encoder")}
        decoder = {name: path for name, path in paths.items() if name not in encoder}
        moments, activations = call(model, "moments", encoder, x)
        decoded, more = call(model, "decode", decoder, z)
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
        for name, value in (activations | more).items():
            want = arrays[f"act/{case}/{name}"]
            yield Check(f"{case}/act/{name}", value, last(want), **ACTIVATION[want.dtype])


def names(arrays, prefix: str) -> list[str]:
    """The keys below a prefix, without it."""
    return [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]


def unet_path(path: str) -> str:
    """Original module path -> path in `UNet3D`."""
    path = re.sub(r"^init_attn(\.0)?", "init_attention", path)
    path = re.sub(r"^input_blocks", "down_stages", path)
    path = re.sub(r"^output_blocks", "up_stages", path)
    path = re.sub(r"^middle_block", "mid_stage", path)
    path = re.sub(r"^((?:down|up)_stages\.\d+|mid_stage)\.(\d+)", r"\1.layers.\2", path)
    path = path.replace("fps_embedding", "fs_embed").replace("transformer_blocks", "blocks")
    path = path.replace("temopral_conv", "temporal_conv").replace(".ff", ".mlp")
    return re.sub(r"\.attn([12])", r".attention\1", path)


def like_original(value, want):
    """An activation of the UNet in the axes of the original.

    Images there are [(b f), c, h, w] and temporal layers [b, c, f, h, w]; tokens and embeddings
    have the same axes in both.
    """
    value = np.asarray(value)
    if value.ndim == 5:
        value = value.transpose((0, 1, 4, 2, 3) if want.ndim == 4 else (0, 4, 1, 2, 3))
    return value.reshape(want.shape)


@runner("unet3d")
def run_unet(fixture):
    arrays = fixture.arrays
    model = convert.from_torch("unet3d", fixture.state_dict(), fixture.config["config"])
    for case in fixture.config["cases"]:
        inputs = {k: jnp.asarray(arrays[f"in/{case}/{k}"]) for k in names(arrays, f"in/{case}/")}
        paths = {name: unet_path(name) for name in names(arrays, f"act/{case}/")}
        x, fs = last(inputs["x"]), inputs.get("fs")
        y, activations = call(model, "__call__", paths, x, inputs["t"], inputs["context"], fs)
        for name in names(arrays, f"out/{case}/"):
            if name != "y":
                raise KeyError(f"no rule for out/{case}/{name}")
        yield Check(f"{case}/y", y, last(arrays[f"out/{case}/y"]), **OUTPUT)
        for name, value in activations.items():
            want = arrays[f"act/{case}/{name}"]
            yield Check(
                f"{case}/act/{name}", like_original(value, want), want, **ACTIVATION[want.dtype]
            )

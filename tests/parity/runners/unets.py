"""Runners of the autoencoder and the video UNet: every case, activation and gradient."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
from convert.engine.plan import flatten
from convert.parts.unet3d import rules as unet_rules
from convert.parts.unet3d import uses_linear
from dicode_jax.diffusion.losses import diffusion_loss
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from parity.harness import Check, runner
from parity.runners.diffusion import schedule_from

OUTPUT = {"atol": 5e-5, "rtol": 1e-4}
GRADIENT = {"atol": 1e-5, "rtol": 1e-3}
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


@runner("dynamicrafter/autoencoder_kl")
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


@runner("dynamicrafter/unet3d")
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


def gradients_of_loss(model: nnx.Module, arrays, case: str, options: dict):
    """(loss, gradient state) of a diffusion loss with dropout off."""
    inputs = {name: arrays[f"in/{case}/{name}"] for name in names(arrays, f"in/{case}/")}
    z, noise = (jnp.asarray(last(inputs[name])) for name in ("z", "noise"))
    concat = inputs.get("concat")
    t, context = jnp.asarray(inputs["t"]), jnp.asarray(inputs["context"])
    fs = jnp.asarray(inputs["fs"]) if "fs" in inputs else None
    graph, state = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss_and_grad(state):
        def denoise(x, t):
            if concat is not None:
                frames = jnp.broadcast_to(last(concat), (*x.shape[:-1], concat.shape[1]))
                x = jnp.concatenate([x, frames], axis=-1)
            return nnx.merge(graph, state)(x, t, context, fs)

        loss, _ = diffusion_loss(
            denoise,
            schedule_from(options),
            z,
            t,
            noise,
            simple_weight=options.get("l_simple_weight", 1.0),
            elbo_weight=options.get("original_elbo_weight", 0.0),
        )
        return loss

    return loss_and_grad(state)


def with_original_names(state: nnx.State, state_dict, table) -> dict[str, np.ndarray]:
    """The arrays of a state under the keys and in the layouts of the original state dict."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in flatten(state).items()}
    out = {}
    for key in state_dict:
        match, rule = next(
            (match, rule) for rule in table if (match := re.fullmatch(rule.pattern, key))
        )
        out[key] = rule.layout.inverse(flat[rule.target.format(*match.groups())])
    return out


@runner("dynamicrafter/grads")
def run_gradients(fixture):
    config, weights = fixture.config, fixture.state_dict()
    source = fixture.sibling_fixture(config["inputs_from"])
    unet_config = source.config["unet_config"]
    model = convert.from_torch("unet3d", weights, unet_config)
    table = unet_rules(use_linear=uses_linear(weights))
    for case, facts in config["cases"].items():
        options = source.config["cases"][case]["model"]
        loss, state = gradients_of_loss(model, source.arrays, case, options)
        gradients = with_original_names(state, weights, table)
        ordered = [gradients[name].astype(np.float64) for name in config["param_names"]]
        norms = np.array([np.linalg.norm(gradient) for gradient in ordered])
        got = {
            "loss": np.reshape(loss, (1,)),
            "norm": norms,
            "dot": np.array(
                [np.sum(g * weights[n]) for g, n in zip(ordered, config["param_names"])]
            ),
        }
        for name in names(fixture.arrays, f"out/{case}/"):
            want = fixture.arrays[f"out/{case}/{name}"]
            yield Check(f"{case}/{name}", got[name], want, **GRADIENT)
        for name in names(fixture.arrays, f"full/{case}/"):
            want = fixture.arrays[f"full/{case}/{name}"]
            yield Check(f"{case}/full/{name}", gradients[name], want, **GRADIENT)
        total = np.sqrt(np.sum(norms**2))
        yield Check(f"{case}/grad_norm_total", total, facts["grad_norm_total"], **GRADIENT)
        yield Check(f"{case}/loss of the case", loss, facts["loss"], **GRADIENT)
        zeros = facts["n_params_with_norm_below_1e_6"]
        yield Check(f"{case}/zero gradients", np.sum(norms < 1e-6), zeros, exact=True)

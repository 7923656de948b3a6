"""Regression training of a small tokenizer: deep tokens that give keyframes back (ours)."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.data.sources.shapes import FRAME_LABELS
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float, to_uint8
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.nn.rngs import row_keys
from dicode_jax.stages import parts
from dicode_jax.stages.dicode import reading
from dicode_jax.stages.dicode.configs import RepresentationTrainConfig
from dicode_jax.stages.dicode.representation_model import (
    RepresentationConfig,
    RepresentationModel,
)
from dicode_jax.stages.probes import check_labels, probe_loss
from dicode_jax.storage import weights
from dicode_jax.training.stage import Stage
from dicode_jax.typing import Array, UInt8


class Regression(nnx.Module):
    """The trained representation beside the frozen autoencoder that gives its targets."""

    def __init__(
        self, config: RepresentationTrainConfig, autoencoder: AutoencoderKLConfig, *, rngs: nnx.Rngs
    ):
        dtype = parts.compute_dtype(config)
        self.model = RepresentationModel(config.model, dtype=dtype, rngs=rngs)
        self.autoencoder = AutoencoderKL(autoencoder, dtype=dtype, rngs=rngs)


def make_stage(config: RepresentationTrainConfig) -> Stage:
    """Trains the representation; batches are `image` uint8 [b, h, w, 3] and `labels` int32 [b, p].

    With `between_weight` they are `image` uint8 [b, 3, h, w, 3], two keyframes and a frame between
    them, and `place` float32 [b], where from 0 to 1 that one lies.

    Raises:
      UserError: Probes are asked for on data without labels; no autoencoder is where it should be.
    """
    if config.has_labels:
        check_labels(config.data)
    autoencoder = parts.stored_config(config.autoencoder, AutoencoderKLConfig)

    def load():
        arrays = parts.leaves(parts.load_autoencoder(config.autoencoder), "autoencoder")
        if config.init is not None:
            arrays |= parts.leaves(load_start(config, config.init), "model")
        return arrays

    def batch_shapes(b: int):
        lead = (b, 3) if config.has_between else (b,)
        shapes = {"image": jax.ShapeDtypeStruct(parts.image_shape(config, *lead), jnp.uint8)}
        if config.has_between:
            shapes["place"] = jax.ShapeDtypeStruct((b,), jnp.float32)
        if config.has_labels:
            shapes["labels"] = jax.ShapeDtypeStruct((b, len(FRAME_LABELS)), jnp.int32)
        return shapes

    return Stage(
        name="representation",
        config=config,
        create=lambda rngs: Regression(config, autoencoder, rngs=rngs),
        load=load,
        is_trained=lambda path, _: (
            path[0] == "model" and (config.trained == "all" or path[1] == config.trained)
        ),
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=batch_shapes,
        export=functools.partial(export, config),
    )


def loss_fn(
    config: RepresentationTrainConfig, model: Regression, batch, keys: Array
) -> tuple[Array, dict[str, Array]]:
    """Squared (and a little absolute) error of the head's images, plus the probes."""
    images, weight = to_float(batch["image"]), jnp.ones(())
    keys, scale = row_keys(keys, len(images)), model.autoencoder.cfg.scale_factor
    if config.has_between:
        keyframes, places = images[:, ::2], batch["place"][:, None]
        weight = jnp.array([config.between_weight])
        if config.trained == "path":  # which changes nothing of the keyframes
            images = images[:, 1:2]
        else:
            places = jnp.pad(places, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
            weight = jnp.array([1, config.between_weight, 1])
            weight = weight / weight.mean()
        weight = jnp.tile(weight, len(images))[:, None, None, None]
        predicted, logits = model.model.between(keyframes, places, keys)
        images, predicted = (x.reshape(-1, *x.shape[2:]) for x in (images, predicted))
    else:
        predicted, logits = model.model(images, keys)
    target = scale * model.autoencoder.encode(images).mode().astype(jnp.float32)
    error = predicted.astype(jnp.float32) - target
    mse = jnp.mean(weight * jnp.square(error))
    loss = mse + 0.1 * jnp.mean(weight * jnp.abs(error))
    metrics = {"mse": mse, "target_std": jnp.std(target)}
    if config.has_between:
        of_span = len(error) // len(batch["place"])
        metrics["between_mse"] = jnp.mean(jnp.square(error[of_span // 2 :: of_span]))
    if config.has_labels:
        probes, right = probe_loss(logits, batch["labels"])
        loss += config.probe_weight * probes
        metrics |= right
    if config.pixel_weight:
        pixels = model.autoencoder.decode(predicted / scale).astype(jnp.float32)
        squares = jnp.mean(jnp.square(pixels - images), axis=(1, 2, 3))
        loss += config.pixel_weight * jnp.mean(squares)
        metrics["psnr"] = jnp.mean(10 * jnp.log10(4.0 / squares))
    return loss, metrics


def reconstruct(model: Regression, images: UInt8[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """What the head reads back from the deep tokens of keyframes."""
    predicted, _ = model.model(to_float(images))
    return to_uint8(model.autoencoder.decode(predicted / model.autoencoder.cfg.scale_factor))


def export(config: RepresentationTrainConfig, model: Regression, folder: pathlib.Path) -> None:
    """Writes tokenizer, head and probes; the autoencoder stays where it came from."""
    tokenizer = reading.as_read(config, config.model.tokenizer)
    weights.save_module(folder, model.model, dataclasses.replace(config.model, tokenizer=tokenizer))


def load_start(config: RepresentationTrainConfig, folder: str) -> RepresentationModel:
    """The model of an earlier run.

    Raises:
      UserError: It has other settings than the config's, besides how its frames were read, and a
        path that may be new.
    """
    model, stored = weights.load_module(
        folder, RepresentationModel, RepresentationConfig, on_host=True
    )
    wanted = config.model
    if stored.path is None:
        wanted = dataclasses.replace(wanted, path=None)
    settings = (
        dataclasses.replace(cfg, tokenizer=reading.as_read(config, cfg.tokenizer))
        for cfg in (stored, wanted)
    )
    if len(set(settings)) > 1:
        raise UserError(f"{folder} holds a model of other sizes than --config's")
    return model


def load_representation(folder: str | pathlib.Path) -> RepresentationModel:
    """The representation that an earlier run exported."""
    return weights.load_module(folder, RepresentationModel, RepresentationConfig, on_host=True)[0]

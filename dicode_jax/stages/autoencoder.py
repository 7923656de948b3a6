"""Training of the KL-VAE on frames: squared and absolute error, and the KL term."""

import functools
import pathlib

import jax
import jax.numpy as jnp

from dicode_jax.data.examples import FrameReader
from dicode_jax.media.transforms import to_float
from dicode_jax.models.autoencoder_kl import AutoencoderKL
from dicode_jax.nn.rngs import row_keys
from dicode_jax.stages import parts
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.latents import means, scaled
from dicode_jax.storage import weights
from dicode_jax.training.evaluate import jit_local
from dicode_jax.training.stage import Stage
from dicode_jax.typing import Array


def make_stage(config: AutoencoderTrainConfig) -> Stage:
    """Trains every parameter; batches are `image` uint8 [b, h, w, 3]."""
    dtype = parts.compute_dtype(config)

    def load():
        return {} if config.init is None else parts.leaves(parts.load_autoencoder(config.init))

    return Stage(
        name="autoencoder",
        config=config,
        create=lambda rngs: AutoencoderKL(config.model, dtype=dtype, rngs=rngs),
        load=load,
        is_trained=lambda path, _: True,
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=lambda b: {
            "image": jax.ShapeDtypeStruct(parts.image_shape(config, b), jnp.uint8)
        },
        export=functools.partial(export, config),
    )


def loss_fn(
    config: AutoencoderTrainConfig, model: AutoencoderKL, batch, keys: Array
) -> tuple[Array, dict[str, Array]]:
    """Reconstruction of sampled latents plus the KL term; pixels in [-1, 1].

    `psnr` is the mean over images, in dB.
    """
    images = to_float(batch["image"])
    posterior = model.encode(images)
    error = model.decode(posterior.sample(row_keys(keys, len(images)))).astype(jnp.float32) - images
    mse, l1 = jnp.mean(jnp.square(error)), jnp.mean(jnp.abs(error))
    kl = jnp.mean(posterior.kl()) / posterior.mean[0].size
    loss = mse + config.l1_weight * l1 + config.kl_weight * kl
    of_images = jnp.maximum(jnp.mean(jnp.square(error), axis=(1, 2, 3)), 1e-10)
    psnr = jnp.mean(10 * jnp.log10(4.0 / of_images))
    return loss, {"mse": mse, "psnr": psnr, "kl": kl, "std": jnp.exp(0.5 * posterior.logvar).mean()}


def export(config: AutoencoderTrainConfig, model: AutoencoderKL, folder: pathlib.Path) -> None:
    """Writes the model; its config holds the scale that gives latents of held-out data variance 1.

    Raises:
      UserError: The data set is not there any more, or all its latents are the same number.
    """
    read, run = FrameReader(data=config.data, frame_size=config.frame_size), jit_local(means)
    encode = lambda batch: run(model, batch["image"])  # noqa: E731
    cfg = scaled(config, read, encode, count=64, what="frames")
    weights.save_module(folder, model, cfg)

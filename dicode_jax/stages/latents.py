"""What trainings of autoencoders share: what one gives back, and the scale of its latents."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dicode_jax.data.sources.open import open_source
from dicode_jax.data.stream import RecordExamples, first_batches
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float, to_uint8
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D
from dicode_jax.models.autoencoder_kl import AutoencoderKL
from dicode_jax.typing import Array, Float, UInt8

Autoencoder = AutoencoderKL | AutoencoderCausal3D


def means(model: Autoencoder, pixels: UInt8[Array, "b ... 3"]) -> Float[Array, "b ... z"]:
    """Means of the unscaled latents of images or clips."""
    return model.encode(to_float(pixels)).mode()


def reconstruct(model: Autoencoder, pixels: UInt8[Array, "b ... 3"]) -> UInt8[Array, "b ... 3"]:
    """What images or clips come back as, through the means of their latents."""
    return to_uint8(model.decode(means(model, pixels)))


def scaled(
    config: Any, read: Any, encode: Callable[[Any], np.ndarray], *, count: int, what: str
) -> Any:
    """The model's config with the scale that gives latents of held-out data variance 1.

    Args:
      config: Of the training; of its data without any held out those of training are taken.
      read: Reads an example, as in training.
      encode: Means of the unscaled latents of a batch.
      count: Examples of the batch.
      what: They are called so.

    Raises:
      UserError: The data set is not there any more, or all its latents are the same number.
    """
    data = config.data
    sources = (open_source(data, split=s, seed=config.seed) for s in ("validation", "train"))
    source = next((source for source in sources if len(source)), None)
    if source is None:
        raise UserError(f"{data.path} is empty now, so that latents of it have no scale")
    examples = RecordExamples(source, read)
    (batch,) = first_batches(examples, data, 1, batch_size=count, seed=config.seed)
    latents = encode(batch)
    if not (spread := float(np.std(latents))) > 0:
        raise UserError(
            f"all latents of {len(latents)} {what} of {data.path} are the same number: the "
            "autoencoder has learned nothing; look at its frames, or train it longer"
        )
    return dataclasses.replace(config.model, scale_factor=1 / spread)

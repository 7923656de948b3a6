"""What the stages share: stored parts as arrays by path, and the type of the computation."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.storage import weights
from dicode_jax.training.stage import Path
from dicode_jax.typing import Array


def compute_dtype(config: Any) -> Any:
    """The `dtype` of modules; None computes in the type of the parameters."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else None


def leaves(module: nnx.Module, *prefix: Any) -> dict[Path, Array]:
    """Path -> array of every variable, with `prefix` in front of the path."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {(*prefix, *path): leaf.get_value() for path, leaf in flat}


def on_device(module: weights.Module) -> weights.Module:
    """The module with its arrays on the default device."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.device_put(state))


def stored_config(folder: str | pathlib.Path, config_type: type) -> Any:
    """The config of a stored module.

    Raises:
      UserError: There is none, or it is another kind's.
    """
    return config_lib.from_json(config_type, pathlib.Path(folder) / weights.CONFIG_FILE)


def load_autoencoder(folder: str | pathlib.Path) -> AutoencoderKL:
    """The autoencoder that its training exported."""
    return weights.load_module(folder, AutoencoderKL, AutoencoderKLConfig, on_host=True)[0]


def image_shape(config: Any, *lead: int) -> tuple[int, ...]:
    """Shape of uint8 images of the run's frame size."""
    return (*lead, config.frame_size, config.frame_size, 3)

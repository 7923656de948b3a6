"""Rotary position embeddings, with the frequency scaling of Llama 3.

Su et al., "RoFormer" (arXiv 2104.09864), in the layout where channel `i` turns together with
channel `i + d/2` (Meta's files interleave the pairs; Hugging Face's do not). Angles are float32.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dicode_jax.typing import Array, Float, Int, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Llama 3's stretch of the low frequencies; the defaults are those of Llama 3.2.

    Waves shorter than `original_seq_len / high_freq_factor` stay, those longer than
    `original_seq_len / low_freq_factor` are slowed by `factor`, and between the two it goes over
    smoothly. It acts at every sequence length.

    Attributes:
      factor: How much the slow waves are stretched.
      low_freq_factor: Sets the wavelength above which the whole factor applies.
      high_freq_factor: Sets the wavelength below which nothing changes.
      original_seq_len: Length that the model was first trained on.

    Raises:
      ValueError: A value is not positive, or `high_freq_factor` is not above `low_freq_factor`.
    """

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_seq_len: int = 8192

    def __post_init__(self):
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_seq_len"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                f"({self.low_freq_factor})"
            )


def rotary_frequencies(
    head_dim: int, *, theta: float, scaling: RotaryScaling | None = None
) -> np.ndarray:
    """Radians per position of each pair of channels, float32 `[head_dim / 2]`."""
    freqs = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        waves = scaling.original_seq_len * freqs / (2 * math.pi)  # in the original length
        kept = np.clip((waves - low) / (high - low), 0, 1)
        freqs = kept * freqs + (1 - kept) * freqs / scaling.factor
    return freqs.astype(np.float32)


@typechecked
def rotary_tables(
    positions: Int[Array, "b t"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Cosines and sines of every position's angles, float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


@typechecked
def axial_tables(
    positions: Int[Array, "t axes"], frequencies: Sequence[np.ndarray]
) -> tuple[Float[Array, "1 t half"], Float[Array, "1 t half"]]:
    """The same for positions on several axes, each of which turns channels of its own.

    Args:
      positions: One number for each axis.
      frequencies: Of each axis, see `rotary_frequencies`; their channels stand side by side.
    """
    parts = [rotary_tables(positions[None, :, i], freqs) for i, freqs in enumerate(frequencies)]
    cos, sin = (jnp.concatenate(tables, axis=-1) for tables in zip(*parts, strict=True))
    return cos, sin


@typechecked
def apply_rotary(
    x: Float[Array, "b t h d"], cos: Float[Array, "#b t half"], sin: Float[Array, "#b t half"]
) -> Float[Array, "b t h d"]:
    """Turns the channels of queries or keys by the angles of their positions."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def halves_of_pairs(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Channels (2i, 2i + 1) as (i, i + d/2): what was trained with turned neighbours fits here.

    Queries and keys in this order have the products that they had, so nothing is put back.
    """
    return rearrange(x, "... (half two) -> ... (two half)", two=2)

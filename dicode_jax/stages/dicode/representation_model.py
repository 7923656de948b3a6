"""Learns deep tokens from scratch by regression, for systems without a pretrained image tower.

A released system reads keyframes with a frozen CLIP. A small system has none, so its image tower
and resampler are trained here: deep tokens, disturbed by noise, must give back the keyframe through
the latent head that the clip decoder will use (the original's `hybrid_concat` conditioning). Two
things make the tokens good to predict for a language model: the noise, which asks for tokens that
decode although they are imprecise, and linear probes of what the keyframe shows, which keep the
meaning a strong direction of the tokens as CLIP's training does. A third makes them good to paint
from: tokens halfway between those of two keyframes are asked to show what is seen halfway. None of
the three exists in the original.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.models.dicode.token_path import TokenPath, check_path
from dicode_jax.models.dicode.tokenizer import (
    DeepTokenizer,
    DeepTokenizerConfig,
    tokens_between,
)
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import draw
from dicode_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationConfig:
    """Parts of a `RepresentationModel`.

    Attributes:
      tokenizer: Image tower and resampler.
      head: Tokens of a keyframe to the image that is regressed (latents or pixels); has an
        `output_shape`.
      probe_classes: Number of classes of each linear probe on the mean token.
      path: Bends the way between the tokens of two keyframes; None for a line.
      token_noise: Standard deviation of the noise on the tokens of a keyframe, relative to theirs.
    """

    tokenizer: DeepTokenizerConfig
    head: ResamplerConfig
    probe_classes: tuple[int, ...] = ()
    path: ResamplerConfig | None = None
    token_noise: float = 0.15

    def __post_init__(self):
        if self.path is not None:
            check_path(self.path, self.tokenizer.num_tokens, self.tokenizer.token_dim)
        if self.head.output_shape is None:
            raise ValueError("the head of a representation needs an output_shape (h, w, c)")
        if self.head.embed_dim != self.tokenizer.token_dim:
            raise ValueError(
                f"the head reads tokens of width {self.tokenizer.token_dim}, "
                f"its embed_dim is {self.head.embed_dim}"
            )


class RepresentationModel(nnx.Module):
    """Deep tokenizer, the head that reads its tokens back, and linear probes."""

    def __init__(
        self, cfg: RepresentationConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg, held = cfg, {"param_dtype": param_dtype, "rngs": rngs}
        self.tokenizer = DeepTokenizer(cfg.tokenizer, dtype=dtype, **held)
        self.head = Resampler(cfg.head, dtype=dtype, **held)
        self.path = None if cfg.path is None else TokenPath(cfg.path, dtype=dtype, **held)
        self.probes = nnx.List(
            [Linear(cfg.tokenizer.token_dim, count, **held) for count in cfg.probe_classes]
        )

    def __call__(
        self, images: Float[Array, "b h w 3"], key: Array | None = None
    ) -> tuple[Float[Array, "b y x c"], list[Float[Array, "b v"]]]:
        """The regressed image and the logits of every probe.

        Args:
          images: Keyframes in [-1, 1].
          key: Draws the noise on the tokens, one or `[b]`; None for none.
        """
        tokens = self._tokens(images[:, None], key)[:, 0]  # [b, n, z]
        return self.head(tokens), self._probed(tokens)

    def between(
        self,
        keyframes: Float[Array, "b 2 h w 3"],
        places: Float[Array, "b k"],
        key: Array | None = None,
    ) -> tuple[Float[Array, "b k y x c"], list[Float[Array, "b v"]]]:
        """Images on the way between two keyframes, and what the probes read in the first.

        Args:
          keyframes: In [-1, 1].
          places: Where the images lie, from 0 (the first keyframe) to 1.
          key: As for a call.
        """
        tokens = self._tokens(keyframes, key)
        places = places.astype(tokens.dtype)
        way = tokens_between if self.path is None else self.path
        read = way(tokens, places)  # [b, k, n, z]
        images = self.head(rearrange(read, "b k n z -> (b k) n z"))
        images = rearrange(images, "(b k) y x c -> b k y x c", b=len(tokens))
        return images, self._probed(tokens[:, 0])

    def _tokens(self, images: Float[Array, "b k h w 3"], key: Array | None) -> Array:
        """Deep tokens [b, k, n, z], with noise that `key` draws."""
        tokens = self.tokenizer(images)
        if key is None:
            return tokens
        std = jnp.std(tokens, axis=(2, 3), keepdims=True)
        scale = self.cfg.token_noise * jax.lax.stop_gradient(std)
        noise = functools.partial(jax.random.normal, dtype=tokens.dtype)
        return tokens + scale * draw(noise, key, tokens.shape)

    def _probed(self, tokens: Float[Array, "b n z"]) -> list[Float[Array, "b v"]]:
        pooled = tokens.mean(axis=1)
        return [probe(pooled) for probe in self.probes]

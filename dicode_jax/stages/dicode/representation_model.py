"""Learns deep tokens from scratch by regression, for systems without a pretrained image tower.

A released system reads keyframes with a frozen CLIP. A small system has none, so its image tower
and resampler are trained here: deep tokens, disturbed by noise, must give back the keyframe through
the latent head that the clip decoder will use (the original's `hybrid_concat` conditioning). Two
things make the tokens good to predict for a language model: the noise, which asks for tokens that
decode although they are imprecise, and linear probes of what the keyframe shows, which keep the
meaning a strong direction of the tokens as CLIP's training does. Neither the noise nor the probes
exist in the original.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
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
      token_noise: Standard deviation of the noise on the tokens of a keyframe, relative to theirs.
    """

    tokenizer: DeepTokenizerConfig
    head: ResamplerConfig
    probe_classes: tuple[int, ...] = ()
    token_noise: float = 0.15

    def __post_init__(self):
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
        tokens = self.tokenizer(images[:, None])[:, 0]  # [b, n, z]
        if key is not None:
            std = jnp.std(tokens, axis=(1, 2), keepdims=True)
            scale = self.cfg.token_noise * jax.lax.stop_gradient(std)
            noise = functools.partial(jax.random.normal, dtype=tokens.dtype)
            tokens = tokens + scale * draw(noise, key, tokens.shape)
        pooled = tokens.mean(axis=1)
        return self.head(tokens), [probe(pooled) for probe in self.probes]

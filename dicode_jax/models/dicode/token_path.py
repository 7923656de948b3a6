"""Deep tokens on the way from one keyframe to the next (ours)."""

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from dicode_jax.models.dicode.tokenizer import tokens_between
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.typing import Array, Float


def check_path(cfg: ResamplerConfig, num_tokens: int, token_dim: int) -> None:
    """Refuses a resampler that cannot bend tokens.

    Raises:
        ValueError: It reads or makes something else.
    """
    found = cfg.embed_dim, cfg.num_queries, cfg.output_dim, cfg.video_length, cfg.output_shape
    if found != (wanted := (token_dim + 2, num_tokens, token_dim, None, None)):
        raise ValueError(
            "a path of tokens reads their width and two more and makes as many of the same width: "
            "embed_dim, num_queries, output_dim, video_length and output_shape are "
            f"{', '.join(map(str, wanted))}, got {', '.join(map(str, found))}"
        )


class TokenPath(nnx.Module):
    """A line between the tokens of two keyframes, bent by what a resampler makes of both.

    At the keyframes it is their tokens, and it starts as the line.
    """

    def __init__(self, cfg: ResamplerConfig, *, dtype=None, param_dtype=jnp.float32, rngs):
        self.resampler = Resampler(cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gain = nnx.Param(jnp.zeros(cfg.output_dim, param_dtype))

    def __call__(
        self, tokens: Float[Array, "b 2 n z"], place: Float[Array, "*b k"]
    ) -> Float[Array, "b k n z"]:
        """Tokens at `place`, 0 for the first keyframe to 1 for the second."""
        b, _, n, _ = tokens.shape
        place = jnp.broadcast_to(place, (b, place.shape[-1]))
        seen = repeat(tokens, "b e n z -> (b k) (e n) z", k=place.shape[1])
        which = jnp.broadcast_to(jnp.repeat(jnp.array([0.0, 1.0], seen.dtype), n), seen.shape[:2])
        where = jnp.broadcast_to(place.reshape(-1, 1).astype(seen.dtype), seen.shape[:2])
        bend = self.resampler(jnp.concatenate([seen, which[..., None], where[..., None]], axis=-1))
        bend = self.gain[...].astype(bend.dtype) * rearrange(bend, "(b k) n z -> b k n z", b=b)
        height = (4 * place * (1 - place))[..., None, None].astype(bend.dtype)
        return tokens_between(tokens, place) + height * bend

"""Transformers that turn an image into a few tokens and back (TiTok, Yu et al., 2024).

Learned queries stand behind the patches and leave as the image's tokens; the decoder reads those
behind as many copies of one mask token as the image has patches. Blocks are pre-norm, with exact
GELU. Shape letters: n images, h w pixels, y x patches, l tokens, c their channels, t positions, d
width.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.models.clip import PatchEmbed
from dicode_jax.nn.activations import gelu
from dicode_jax.nn.layer_stack import run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.transformer import MLP, Attention, Block
from dicode_jax.typing import Array, Float, typechecked

# The original draws at 0.02 whatever the width. At width 128 tokens then hardly move the patches
# that read them: 18.2 dB after 400 steps on small frames, 20.1 dB so (pixels read off patches).
INIT = nnx.initializers.lecun_normal()

# (number of the layer, positions) -> positions, before the layer of that number
Mix = Callable[[int, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryTransformerConfig:
    """One side of a tokenizer; the defaults are TiTok's size `large`.

    Attributes:
        patch_size: pixels per patch along height and width.
        embed_dim, num_layers, num_heads: the transformer, with a feed-forward width of four times
            `embed_dim`.
        remat: what the backward pass computes again, see `nn.remat`.
    """

    patch_size: int = 16
    embed_dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    remat: Remat = False

    def __post_init__(self):
        check_counts(self, num_layers=1000)
        for name in ("patch_size", "embed_dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and "
                f"{self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads


def make_block(cfg: QueryTransformerConfig, **options) -> Block:
    """A block that sees all positions."""
    linear = functools.partial(Linear, kernel_init=INIT, **options)
    dim = cfg.embed_dim
    return Block(
        norm=lambda: layer_norm(dim, **options),
        attention=lambda: Attention(
            dim, num_heads=cfg.num_heads, head_dim=cfg.head_dim, packed=True, linear=linear
        ),
        mlp=lambda: MLP(dim, 4 * dim, activation=gelu, linear=linear),
    )


def _free(cfg: QueryTransformerConfig, count: int, param_dtype, rngs: nnx.Rngs) -> nnx.Param:
    """Learned vectors `[count, d]` of about unit length."""
    values = jax.random.normal(rngs.params(), (count, cfg.embed_dim), param_dtype)
    return nnx.Param(values * cfg.embed_dim**-0.5)


class _Stack(nnx.Module):
    """Norm, blocks; what both sides have."""

    def __init__(self, cfg: QueryTransformerConfig, **options):
        self.cfg = cfg
        self.norm_pre = layer_norm(cfg.embed_dim, **options)
        self.blocks = nnx.List([make_block(cfg, **options) for _ in range(cfg.num_layers)])
        self.norm_post = layer_norm(cfg.embed_dim, **options)

    def __call__(self, x: Float[Array, "n t d"], mix: Mix | None = None) -> Float[Array, "n t d"]:
        x = self.norm_pre(x)
        for i, block in enumerate(self.blocks):

            def call(block, x, past, key, i=i):
                return block(x if mix is None else mix(i, x))

            x, _ = run_blocks(nnx.List([block]), call, x, remat=self.cfg.remat)
        return x


class QueryEncoder(nnx.Module):
    """Images to `num_tokens` vectors each."""

    def __init__(
        self,
        cfg: QueryTransformerConfig,
        *,
        image_size: int,
        num_tokens: int,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.image_size, self.dtype = image_size, dtype
        free = functools.partial(_free, cfg, param_dtype=param_dtype, rngs=rngs)
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.embed_dim, use_bias=True, **options)
        self.class_embed = free(1)
        self.position_embed = free(1 + (image_size // cfg.patch_size) ** 2)
        self.queries, self.query_position_embed = free(num_tokens), free(num_tokens)
        self.transformer = _Stack(cfg, **options)

    @typechecked
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n l d"]:
        """The queries behind the last layer and its norm.

        Raises:
            ValueError: the images are not of the size that there are positions for.
        """
        n, *size, _ = images.shape
        if size != [self.image_size, self.image_size]:
            raise ValueError(
                f"images must be {self.image_size}x{self.image_size} pixels, "
                f"got {size[0]}x{size[1]}: resize or crop first"
            )
        patches = self.patch_embed(images)
        lead = self.class_embed[...], self.queries[...] + self.query_position_embed[...]
        first, last = (_repeat(x, n, patches.dtype) for x in lead)
        x = jnp.concatenate([first, patches], axis=1)
        x = jnp.concatenate([x + self.position_embed[...].astype(x.dtype), last], axis=1)
        return self.transformer.norm_post(self.transformer(x)[:, -last.shape[1] :])


class QueryDecoder(nnx.Module):
    """Tokens to one vector for each patch of the image."""

    def __init__(
        self,
        cfg: QueryTransformerConfig,
        *,
        image_size: int,
        num_tokens: int,
        token_dim: int,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.side = image_size // cfg.patch_size
        free = functools.partial(_free, cfg, param_dtype=param_dtype, rngs=rngs)
        self.token_embed = Linear(token_dim, cfg.embed_dim, kernel_init=INIT, **options)
        self.class_embed, self.mask_token = free(1), free(1)
        self.position_embed = free(1 + self.side**2)
        self.token_position_embed = free(num_tokens)
        self.transformer = _Stack(cfg, **options)

    @typechecked
    def __call__(
        self, tokens: Float[Array, "n l c"], mix: Mix | None = None
    ) -> Float[Array, "n y x d"]:
        """Patches behind the last layer and its norm.

        Args:
            tokens: of `num_tokens` places.
            mix: changes the positions before a layer: class, patches row by row, tokens.
        """
        n, count = len(tokens), self.side**2
        x = self.token_embed(tokens)
        x = x + self.token_position_embed[...].astype(x.dtype)
        lead = jnp.concatenate([self.class_embed[...], jnp.repeat(self.mask_token[...], count, 0)])
        lead = _repeat(lead + self.position_embed[...], n, x.dtype)
        x = self.transformer(jnp.concatenate([lead, x], axis=1), mix)[:, 1 : 1 + count]
        return rearrange(self.transformer.norm_post(x), "n (y x) d -> n y x d", y=self.side)


def _repeat(x: Float[Array, "t d"], n: int, dtype) -> Float[Array, "n t d"]:
    return jnp.broadcast_to(x.astype(dtype), (n, *x.shape))

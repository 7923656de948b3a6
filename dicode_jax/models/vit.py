"""A vision transformer: images to one vector for each patch and one for the whole.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), as transformers' `ViTModel`
without its pooler; DeiT and Theia are such. For images of another size the table of positions is
resampled as PyTorch does (bicubic, a = -0.75).
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.models.clip import PatchEmbed
from dicode_jax.nn.activations import gelu
from dicode_jax.nn.layer_stack import make_blocks, run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.transformer import MLP, Attention, Block
from dicode_jax.typing import Array, Float, typechecked

INIT = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a vision transformer; the defaults are ViT-B/16.

    Attributes:
      image_size: Side of the square images that there are positions for.
      patch_size: Side of a patch.
      embed_dim, num_layers, num_heads: The transformer.
      mlp_dim: Width inside the feed-forward part.
      norm_eps: Epsilon of every norm.
      scan_layers: Keep the blocks' parameters stacked on a leading axis and `lax.scan` over them.
      remat: What of each block the backward pass computes again, see `nn.remat`.

    Raises:
      ValueError: A size is not positive, or sizes do not divide each other.
    """

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    norm_eps: float = 1e-12
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim")
        for name in (*sizes, "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_counts(self, num_layers=1000)
        for whole, part in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part} ({getattr(self, part)}) must divide {whole} ({getattr(self, whole)})"
                )

    @property
    def grid(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size


def make_block(cfg: ViTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs) -> Block:
    """A block that sees all positions."""
    options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    linear, d = functools.partial(Linear, kernel_init=INIT, **options), cfg.embed_dim
    return Block(
        lambda: layer_norm(d, eps=cfg.norm_eps, **options),
        lambda: Attention(d, num_heads=cfg.num_heads, head_dim=d // cfg.num_heads, linear=linear),
        lambda: MLP(d, cfg.mlp_dim, activation=gelu, linear=linear),
    )


class ViT(nnx.Module):
    """Patches and a class token, positions, blocks and the last norm."""

    def __init__(self, cfg: ViTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        self.cfg, self.dtype = cfg, dtype
        draw = lambda *shape: nnx.Param(INIT(rngs.params(), shape, param_dtype))  # noqa: E731
        self.patch_embed = PatchEmbed(
            cfg.patch_size, cfg.embed_dim, use_bias=True, rngs=rngs, **options
        )
        self.class_embed = draw(cfg.embed_dim)
        self.position_embed = draw(1 + cfg.grid**2, cfg.embed_dim)
        self.blocks = make_blocks(make_block, cfg, rngs=rngs, **options)
        self.final_norm = layer_norm(cfg.embed_dim, eps=cfg.norm_eps, rngs=rngs, **options)

    @typechecked
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """Vectors behind the last norm: of the class token, then of the patches row by row.

        Args:
          images: Normalised as the weights want it, sides a multiple of `patch_size`.

        Raises:
          ValueError: The sides are none.
        """
        cfg, (b, *size, _) = self.cfg, images.shape
        if size[0] % cfg.patch_size or size[1] % cfg.patch_size:
            raise ValueError(
                f"images must have sides that are a multiple of {cfg.patch_size}, got "
                f"{size[0]}x{size[1]}: pad or resize first"
            )
        x = self.patch_embed(images)
        first = jnp.broadcast_to(self.class_embed[...].astype(x.dtype), (b, 1, cfg.embed_dim))
        table = self.positions(size[0] // cfg.patch_size, size[1] // cfg.patch_size)
        x = jnp.concatenate([first, x], axis=1) + table[None].astype(x.dtype)
        x, _ = run_blocks(self.blocks, lambda block, x, past, key: block(x), x, remat=cfg.remat)
        return self.final_norm(x)

    def positions(self, rows: int, columns: int) -> Float[Array, "t d"]:
        """What is added to class token and patches of an image of so many patches, float32."""
        first, rest = jnp.split(self.position_embed[...].astype(jnp.float32), (1,))
        side = self.cfg.grid
        if (rows, columns) != (side, side):
            down, across = bicubic(side, rows), bicubic(side, columns)
            rest = rearrange(rest, "(y x) d -> y x d", y=side)
            rest = jnp.einsum("ay,bx,yxd->abd", down, across, rest)
            rest = rearrange(rest, "y x d -> (y x) d")
        return jnp.concatenate([first, rest])


def bicubic(size: int, new: int) -> np.ndarray:
    """Weights `[new, size]` of a resampling: cubic convolution, edges repeated, not smoothed."""
    a, at = -0.75, (np.arange(new) + 0.5) * size / new - 0.5
    out = np.zeros((new, size))
    for shift in range(-1, 3):
        place = np.floor(at) + shift
        x = np.abs(at - place)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = np.clip(place, 0, size - 1).astype(int)
        np.add.at(out, (np.arange(new), index), np.where(x <= 1, near, far))
    return out.astype(np.float32)

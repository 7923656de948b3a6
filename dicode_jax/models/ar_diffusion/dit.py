"""The denoiser of AR-Diffusion: a transformer in which every frame has its own noise level.

Sun et al., "AR-Diffusion: Asynchronous Video Generation with Auto-Regressive Diffusion" (arXiv
2503.07418). Context tokens stand in front of the tokens of the frames in one sequence; the timestep
of a frame modulates its tokens alone. Two things are as in the released model and nowhere else:
the norm in front of attention and of the feed-forward part replaces the residual, and with
"video_temporal_causal" the context sees all frames, so that through it, from the second layer on,
earlier frames learn of later ones.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.nn.activations import tanh_gelu
from dicode_jax.nn.layer_stack import make_blocks, run_blocks
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.modulation import Modulation, TimestepEmbedder, modulate
from dicode_jax.nn.norm import layer_norm
from dicode_jax.nn.remat import Remat
from dicode_jax.nn.rotary import rotary_frequencies, rotary_tables
from dicode_jax.nn.transformer import MLP, Attention
from dicode_jax.typing import Array, Float, Int, typechecked

Mask = Literal["video_temporal_causal", "temporal_causal", "none"]
MASKS = ("video_temporal_causal", "temporal_causal", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the transformer; the defaults are those of all released models.

    Attributes:
      num_frames: Most frames of a window.
      num_tokens: Tokens of a frame.
      channels: Width of a token.
      embed_dim: Model width.
      num_layers: Number of blocks.
      num_heads: Attention heads; must divide `embed_dim`.
      mlp_dim: Width inside the feed-forward part, `4 * embed_dim` when None.
      context_len: Context tokens.
      context_dim: Width of a context token.
      mask: Who sees whom, see `attention_mask`.
      rotary: Rotary positions, of context and frames together, instead of fixed sinusoids that are
        added to the tokens of the frames.
      qk_norm: A layer norm on queries and keys.
      rope_theta: Base of the rotary frequencies.
      scan_layers: Keep the blocks' parameters stacked and `lax.scan` over them.
      remat: What of each block the backward pass computes again, see `nn.remat`.

    Raises:
      ValueError: A size is not positive, does not divide another, or the mask has no such name.
    """

    num_frames: int = 16
    num_tokens: int = 32
    channels: int = 4
    embed_dim: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    mlp_dim: int | None = None
    context_len: int = 77
    context_dim: int = 768
    mask: Mask = "video_temporal_causal"
    rotary: bool = False
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    scan_layers: bool = False
    remat: Remat = False

    def __post_init__(self):
        sizes = ("num_frames", "num_tokens", "channels", "embed_dim", "num_layers", "num_heads")
        for name in (*sizes, "context_len", "context_dim", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        check_counts(self, num_layers=1000, num_frames=4096, num_tokens=2**16, context_len=2**16)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide embed_dim ({self.embed_dim})"
            )
        if self.embed_dim % 2 or (self.rotary and self.head_dim % 2):
            raise ValueError(
                f"positions need an even embed_dim and, rotary ones, heads of even width, got "
                f"{self.embed_dim} and {self.head_dim}"
            )
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads


def attention_mask(cfg: DiTConfig, num_frames: int) -> np.ndarray | None:
    """Who sees whom, bool `[context + frames, context + frames]`; None where all see all.

    Tokens of a frame see the context, their own frame and those before. The context sees itself
    ("temporal_causal"), or everything ("video_temporal_causal").
    """
    if cfg.mask == "none":
        return None
    frames = np.repeat(np.arange(num_frames), cfg.num_tokens)
    order = np.concatenate([np.full(cfg.context_len, -1), frames])
    mask = order[None, :] <= order[:, None]
    if cfg.mask == "video_temporal_causal":
        mask[: cfg.context_len] = True
    return mask


def position_table(dim: int, count: int) -> np.ndarray:
    """Fixed sinusoids of positions 0 .. count - 1, sines first, float32 `[count, dim]`."""
    angles = np.outer(np.arange(count), 10_000.0 ** (-np.arange(dim // 2) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Block(nnx.Module):
    """Attention and feed-forward part, on a residual that their norms replace."""

    def __init__(self, cfg: DiTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        d, linear = cfg.embed_dim, _linear(**kwargs)
        self.context_len = cfg.context_len
        self.norm = layer_norm(d, eps=1e-6, use_bias=False, use_scale=False, **kwargs)
        self.modulation = Modulation(d, 6, **kwargs)
        head_norm = functools.partial(layer_norm, cfg.head_dim, **kwargs)
        self.attn = Attention(
            d,
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            packed=True,
            head_norm=head_norm if cfg.qk_norm else None,
            rotates_pairs=True,
            linear=linear,
        )
        self.mlp = MLP(d, cfg.mlp_dim or 4 * d, activation=tanh_gelu, linear=linear)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        times: Float[Array, "b f d"],
        mask: Array | None,
        rotary: tuple[Array, Array] | None,
    ) -> Float[Array, "b t d"]:
        """Context and frames, `t = context + f n`; `times` are the embedded timesteps."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(times)
        x = self.norm(x)
        y = self.attn(self._on_frames(modulate, x, shift1, scale1), mask, rotary=rotary)[0]
        x = self.norm(x + self._on_frames(_gated, y, gate1))
        y = self.mlp(self._on_frames(modulate, x, shift2, scale2))
        return x + self._on_frames(_gated, y, gate2)

    def _on_frames(self, change, x, *factors):
        """The sequence with the tokens of the frames changed, and the context as it is."""
        context, frames = jnp.split(x, (self.context_len,), axis=1)
        f = factors[0].shape[1]
        frames = change(rearrange(frames, "b (f n) d -> b f n d", f=f), *factors)
        return jnp.concatenate([context, rearrange(frames, "b f n d -> b (f n) d")], axis=1)


class DiT(nnx.Module):
    """Tokens of noisy frames, a timestep for each, and a context, to what the noise hides."""

    def __init__(self, cfg: DiTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        self.cfg, self.dtype = cfg, dtype
        d, linear = cfg.embed_dim, _linear(**kwargs, rngs=rngs)
        self.token_embed = linear(cfg.channels, d)
        self.context_embed = linear(cfg.context_dim, d)
        normal = nnx.initializers.normal(0.02)
        of_time = functools.partial(Linear, kernel_init=normal, **kwargs, rngs=rngs)
        self.time_embed = TimestepEmbedder(d, linear=of_time)
        self.blocks = make_blocks(Block, cfg, rngs=rngs, **kwargs)
        self.final_norm = layer_norm(
            d, eps=1e-6, use_bias=False, use_scale=False, rngs=rngs, **kwargs
        )
        zeros = nnx.initializers.zeros_init()
        self.head = Linear(d, cfg.channels, kernel_init=zeros, rngs=rngs, **kwargs)

    @typechecked
    def __call__(
        self,
        x: Float[Array, "b f n c"],
        timesteps: Int[Array, "b f"],
        context: Float[Array, "b l e"],
    ) -> Float[Array, "b f n c"]:
        """Predicts for every frame of a window; positions start at 0 in each.

        Args:
          x: Noisy tokens; at most `num_frames` frames.
          timesteps: Of the noise in each frame, from 0.
          context: `context_len` tokens of width `context_dim`.

        Raises:
          ValueError: There are more frames than the model has positions for.
        """
        cfg, (b, f) = self.cfg, x.shape[:2]
        if f > cfg.num_frames:
            raise ValueError(f"a window has at most {cfg.num_frames} frames, got {f}")
        tokens, context, times = self.embed(x, timesteps, context)
        if not cfg.rotary:
            table = position_table(cfg.embed_dim, f * cfg.num_tokens)
            tokens = tokens + jnp.asarray(table, tokens.dtype)[None]
        mask, rotary = attention_mask(cfg, f), self._rotary(f)
        mask = None if mask is None else jnp.asarray(mask)[None, None]

        def call(block, x, past, key):
            return block(x, times, mask, rotary), None

        y = jnp.concatenate([context, tokens], axis=1)
        y, _ = run_blocks(self.blocks, call, y, remat=cfg.remat)
        y = self.head(self.final_norm(y[:, cfg.context_len :]))
        return rearrange(y, "b (f n) c -> b f n c", b=b, f=f)

    def embed(self, x: Array, timesteps: Array, context: Array) -> tuple[Array, Array, Array]:
        """Tokens `[b, f n, d]` without positions, context `[b, l, d]` and times `[b, f, d]`."""
        tokens = self.token_embed(rearrange(x, "b f n c -> b (f n) c"))
        return tokens, self.context_embed(context), self.time_embed(timesteps)

    def _rotary(self, num_frames: int) -> tuple[Array, Array] | None:
        if not self.cfg.rotary:
            return None
        length = self.cfg.context_len + num_frames * self.cfg.num_tokens
        frequencies = rotary_frequencies(self.cfg.head_dim, theta=self.cfg.rope_theta)
        return rotary_tables(jnp.arange(length)[None], frequencies)


Null = Literal["zero", "first", "own"]
NULLS = ("zero", "first", "own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """A transformer with its contexts and its noise.

    Attributes:
      dit: The transformer.
      num_classes: Classes, each with a context; 0 for one context that all videos share.
      class_parts: How many values each part of what a class says has (colours, shapes), whose
        product is `num_classes`; the last part counts fastest. Each value has context tokens of
        its own, and a class those of its values, so that it need not be seen to be known. Empty
        where classes have nothing in common.
      null: What guidance moves away from: "zero", a context of zeros; "first", that of class 0;
        or "own", a context that stands for no class. The first two are those of the released
        models without and with classes, of which the first was never trained.
      schedule: Noise, and what is predicted.

    Raises:
      ValueError: The null context is another class's where there are none, or has no such name.
    """

    dit: DiTConfig = DiTConfig()
    num_classes: int = 0
    class_parts: tuple[int, ...] = ()
    null: Null = "own"
    schedule: NoiseSchedule = NoiseSchedule(
        linear_start=1e-4, linear_end=2e-2, parameterization="x0"
    )

    def __post_init__(self):
        if not 0 <= self.num_classes <= 2**20:
            raise ValueError(f"num_classes must be from 0 to {2**20}, got {self.num_classes}")
        if self.null not in NULLS:
            raise ValueError(f"null must be one of {', '.join(NULLS)}, got {self.null!r}")
        if self.null == "first" and not self.num_classes:
            raise ValueError("null='first' is the context of class 0, and there are no classes")
        if parts := self.class_parts:
            if min(parts) < 1 or math.prod(parts) != self.num_classes:
                raise ValueError(
                    f"class_parts must multiply to num_classes {self.num_classes}, got {parts}"
                )
            if self.dit.context_len % len(parts):
                raise ValueError(
                    f"context_len {self.dit.context_len} must be a multiple of the number of "
                    f"class_parts, {len(parts)}"
                )


class Denoiser(nnx.Module):
    """The transformer and the contexts that it was trained with.

    `context` is `[l, e]` without classes; with them `[num_classes + 1, l, e]`, of which the last is
    the own null context. Without classes that is a parameter `null`, `[l, e]`, and with
    `class_parts` too, where `context` is `[sum(class_parts), l / len(class_parts), e]`.
    """

    def __init__(self, cfg: DenoiserConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        shape = (cfg.dit.context_len, cfg.dit.context_dim)
        rows, parts = (cfg.num_classes + 1,) if cfg.num_classes else (), cfg.class_parts
        of_each = (sum(parts), shape[0] // len(parts), shape[1]) if parts else (*rows, *shape)
        draw = nnx.initializers.normal(0.1)
        self.context = nnx.Param(draw(rngs.params(), of_each, param_dtype))
        if cfg.null == "own" and (parts or not cfg.num_classes):
            self.null = nnx.Param(draw(rngs.params(), shape, param_dtype))
        self.dit = DiT(cfg.dit, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, timesteps: Array, context: Array) -> Array:
        """See `DiT.__call__`."""
        return self.dit(x, timesteps, context)

    def contexts(self, classes: Int[Array, " b"]) -> Float[Array, "b l e"]:
        """Contexts of classes 0 .. num_classes - 1 (all the same without classes), -1 for null."""
        if not self.cfg.num_classes:
            context = jnp.broadcast_to(self.context[...], (len(classes), *self.context.shape))
            null = jnp.broadcast_to(self.null_context(), context.shape)
        else:
            context, null = self._of_classes(classes), self.null_context()[None]
        return jnp.where((classes < 0)[:, None, None], null, context)

    def null_context(self) -> Float[Array, "l e"]:
        """What guidance moves away from."""
        cfg = self.cfg
        if cfg.null == "zero":
            return jnp.zeros((cfg.dit.context_len, cfg.dit.context_dim), self.context.dtype)
        if cfg.null == "first":
            return self._of_classes(jnp.zeros(1, jnp.int32))[0]
        return self.null[...] if hasattr(self, "null") else self.context[cfg.num_classes]

    def _of_classes(self, classes: Int[Array, " b"]) -> Float[Array, "b l e"]:
        parts = self.cfg.class_parts
        if not parts:
            return self.context[...][classes]
        values = jnp.stack(jnp.unravel_index(jnp.maximum(classes, 0), parts), axis=1)
        first = np.cumsum((0, *parts[:-1]))
        return rearrange(self.context[...][values + first], "b p l e -> b (p l) e")


def _gated(x, gate):
    return x * gate[:, :, None]


def _linear(**kwargs):
    return functools.partial(Linear, kernel_init=nnx.initializers.xavier_uniform(), **kwargs)

"""Layers of the video UNet: temporal convolution, spatial and temporal transformers.

Source: DynamiCrafter (Xing et al., 2023), which extends the blocks of latent diffusion over frames.
Video is [b, f, h, w, c] throughout. Spatial layers see every frame alone, temporal layers every
pixel alone. Shape letters: n sequences, t tokens of a sequence, l context tokens, d widths.
"""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.nn.activations import gelu
from dicode_jax.nn.attention import attend, attend_across, runs_across
from dicode_jax.nn.conv import Conv
from dicode_jax.nn.dropout import dropout
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.norm import GroupNorm, layer_norm
from dicode_jax.nn.resnet import ResnetBlock, fan_in_uniform, group_norm_per_image
from dicode_jax.nn.transformer import MLP
from dicode_jax.typing import Array, Float

TRANSFORMER_NORM_EPS = 1e-6
CONV_NORM_EPS = 1e-5
ZEROS = nnx.initializers.zeros_init()


class TemporalConv(nnx.Module):
    """Four normalized convolutions over frames beside a skip connection; starts as the identity.

    Args:
        channels: channels of input and output.
        dropout_rate: dropout before all convolutions but the first.
    """

    def __init__(
        self,
        channels: int,
        *,
        dropout_rate: float,
        num_groups: int = 32,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dropout_rate = dropout_rate
        norms, convs = [], []
        for i in range(4):
            init = ZEROS if i == 3 else fan_in_uniform
            norms.append(GroupNorm(channels, eps=CONV_NORM_EPS, num_groups=num_groups, **options))
            # A 2-D convolution over (frames, pixels) is 3.6 times faster on the CPU than a 3-D one.
            padding = ((1, 1), (0, 0))
            convs.append(
                Conv(channels, channels, (3, 1), padding=padding, kernel_init=init, **options)
            )
        self.norms, self.convs = nnx.List(norms), nnx.List(convs)

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b f h w c"]:
        shape, x = x.shape, rearrange(x, "b f h w c -> b f (h w) c")
        y = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            y = nnx.silu(norm(y))
            if i > 0:
                y = dropout(y, self.dropout_rate, deterministic=deterministic, rngs=rngs)
            y = conv(y)
        return (x + y).reshape(shape)


class VideoResnetBlock(nnx.Module):
    """A residual block on every frame, then an optional temporal convolution on its sum."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embed_dim: int,
        dropout_rate: float,
        temporal_dropout_rate: float | None,
        num_groups: int = 32,
        **options,
    ):
        self.resnet = ResnetBlock(
            in_channels,
            out_channels,
            embed_dim=embed_dim,
            eps=CONV_NORM_EPS,
            dropout_rate=dropout_rate,
            zero_init=True,
            num_groups=num_groups,
            **options,
        )
        make_conv = functools.partial(TemporalConv, num_groups=num_groups, **options)
        self.temporal_conv = (
            None
            if temporal_dropout_rate is None
            else make_conv(out_channels, dropout_rate=temporal_dropout_rate)
        )

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        embed: Float[Array, "b g e"],
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b f h w o"]:
        """`embed` has one row per frame (g = f), or one for all frames (g = 1)."""
        x = self.resnet(x, embed, deterministic=deterministic, rngs=rngs)
        if self.temporal_conv is None:
            return x
        return self.temporal_conv(x, deterministic=deterministic, rngs=rngs)


class ContextAttention(nnx.Module):
    """Multi-head attention to the sequence itself, to a context, or to text and image contexts.

    With an image branch the same queries attend to the image tokens through a second pair of key
    and value projections, in a softmax of their own; the result is added before the output layer.

    Args:
        dim: width of the sequence.
        num_heads: heads; their number times `head_dim` may differ from `dim`.
        head_dim: width of one head.
        context_dim: width of the context; None for that of the sequence.
        image_branch: has the second pair of projections.
        learnable_image_scale: scales the image term by 1 + tanh(alpha) instead of 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        context_dim: int | None = None,
        image_branch: bool = False,
        learnable_image_scale: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            Linear,
            kernel_init=fan_in_uniform,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        context_dim = context_dim or dim
        inner = num_heads * head_dim
        self.head_dim = head_dim
        self.q = linear(dim, inner, use_bias=False)
        self.k = linear(context_dim, inner, use_bias=False)
        self.v = linear(context_dim, inner, use_bias=False)
        self.k_image = linear(context_dim, inner, use_bias=False) if image_branch else None
        self.v_image = linear(context_dim, inner, use_bias=False) if image_branch else None
        learnable = image_branch and learnable_image_scale
        self.alpha = nnx.Param(jnp.zeros((), param_dtype)) if learnable else None
        self.out = linear(inner, dim)

    def __call__(
        self,
        x: Float[Array, "n t d"],
        context: Float[Array, "m l e"] | None = None,
        image_context: Float[Array, "i k e"] | None = None,
        *,
        across: bool = False,
    ) -> Float[Array, "n t d"]:
        """A context may have fewer rows than `x`: each then serves as many consecutive sequences.

        Args:
            x: the sequences.
            context: what they attend to; None for themselves.
            image_context: tokens of the image branch; None or no tokens contribute exactly zero.
            across: `x` is [t, n, d], of sequences that attend to themselves.
        """
        query = self.q(x)
        if across:
            return self.out(attend_across(query, self.k(x), self.v(x), head_dim=self.head_dim))
        source = x if context is None else context
        y = self._attend(query, self.k(source), self.v(source))
        if (
            self.k_image is not None
            and self.v_image is not None
            and image_context is not None
            and image_context.shape[1]
        ):
            image = self._attend(query, self.k_image(image_context), self.v_image(image_context))
            y = y + (image if self.alpha is None else image * (1 + jnp.tanh(self.alpha[...])))
        return self.out(y)

    def _attend(self, query: Array, key: Array, value: Array) -> Array:
        """Attention of [n, t, d] to [m, s, d], each row serving n / m consecutive sequences."""
        rows = rearrange(query, "(m r) t d -> m (r t) d", m=len(key))
        y = attend(rows, key, value, head_dim=self.head_dim)
        return rearrange(y, "m (r t) d -> (m r) t d", t=query.shape[1])


def repeat_rows(x: Float[Array, "b ..."], times: int) -> Float[Array, "m ..."]:
    """All rows `times` times, one row of each after another: 0, 1, 0, 1."""
    return x if times == 1 else jnp.concatenate([x] * times)


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention, attention to the context (or again to itself), feed-forward."""

    def __init__(self, dim: int, attention, context_attention, **options):
        linear = functools.partial(Linear, kernel_init=fan_in_uniform, **options)
        self.norm1, self.norm2, self.norm3 = (layer_norm(dim, **options) for _ in range(3))
        self.attention1, self.attention2 = attention(), context_attention()
        self.mlp = MLP(dim, 4 * dim, activation=gelu, packed=True, linear=linear)

    def __call__(
        self, x: Array, context=None, image_context=None, *, across: bool = False, times: int = 1
    ) -> Array:
        """See `ContextAttention`; the context is of rows of `x` that are repeated `times` times."""
        x = repeat_rows(x + self.attention1(self.norm1(x), across=across), times)
        x = x + self.attention2(self.norm2(x), context, image_context, across=across)
        return x + self.mlp(self.norm3(x))


class _Transformer(nnx.Module):
    """What the transformers over pixels and over frames have in common: all but the order of axes.

    Args:
        context_dim: width of a context for the second attention; None for that of the sequence.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        context_dim: int | None = None,
        image_branch: bool = False,
        learnable_image_scale: bool = False,
        num_groups: int = 32,
        **options,
    ):
        linear = functools.partial(Linear, kernel_init=fan_in_uniform, **options)
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.has_context = context_dim is not None
        self.norm = GroupNorm(channels, eps=TRANSFORMER_NORM_EPS, num_groups=num_groups, **options)
        self.proj_in = linear(channels, inner)
        attention = functools.partial(
            ContextAttention, inner, num_heads=num_heads, head_dim=head_dim, **options
        )
        context_attention = functools.partial(
            attention,
            context_dim=context_dim,
            image_branch=image_branch,
            learnable_image_scale=learnable_image_scale,
        )
        self.blocks = nnx.List(
            [TransformerBlock(inner, attention, context_attention, **options) for _ in range(depth)]
        )
        self.proj_out = linear(inner, channels, kernel_init=ZEROS)


class SpatialTransformer(_Transformer):
    """Transformer over the pixels of every frame, with attention to text and image tokens."""

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        context: Float[Array, "m l d"],
        image_context: Float[Array, "i k d"] | None = None,
    ) -> Float[Array, "m f h w c"]:
        """Every row of the context looks at a row of `x`, of which there may be fewer.

        `image_context` has a row per frame (i = m f, f fastest) or per video (i = m).
        """
        times = len(context) // len(x)  # what comes before the context is read is done once
        y = group_norm_per_image(self.norm, x)
        tokens = self.proj_in(rearrange(y, "b f h w c -> (b f) (h w) c"))
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, context, image_context, times=1 if i else times)
        x = repeat_rows(x, times)
        return x + self.proj_out(tokens).reshape(x.shape)


class TemporalTransformer(_Transformer):
    """Transformer over the frames of every pixel; without a `context_dim` it sees itself only."""

    def __call__(
        self, x: Float[Array, "b f h w c"], context: Float[Array, "b l d"] | None = None
    ) -> Float[Array, "b f h w c"]:
        """`context` is only looked at when the layer was built with a `context_dim`."""
        b, f, h, w, _ = x.shape
        y, context = self.norm(x), context if self.has_context else None
        of_heads = b * h * w, f, self.num_heads, self.head_dim
        across = context is None and runs_across(of_heads, y.dtype)
        order = "f (b h w) c" if across else "(b h w) f c"
        tokens = self.proj_in(rearrange(y, f"b f h w c -> {order}"))
        for block in self.blocks:
            tokens = block(tokens, context, across=across)
        return x + rearrange(self.proj_out(tokens), f"{order} -> b f h w c", b=b, h=h, w=w)

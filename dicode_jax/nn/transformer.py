"""The parts of a pre-norm transformer: attention, feed-forward, and a block of both.

Linear layers come from the caller, `linear(in_dim, out_dim)`: it settles biases, types and initial
values. Where attention has weights of other names on disk (CLIP, the resampler) or a second context
(the UNet), it is a class of its own around `nn.attention.attend`.

Letters: b batch, t positions computed now, s keys (or cache slots), h heads, g heads of keys and
values, d model width.
"""

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.nn import kv_cache
from dicode_jax.nn.attention import dot_product_attention
from dicode_jax.nn.dropout import drop
from dicode_jax.nn.masks import LabelMask
from dicode_jax.nn.rngs import split
from dicode_jax.nn.rotary import apply_rotary, halves_of_pairs
from dicode_jax.typing import Array, Float

MakeLinear = Callable[[int, int], nnx.Module]
Past = tuple[Array, Array]


class Attention(nnx.Module):
    """Multi-head self-attention; positions enter by `rotary`, by `bias`, or not here.

    Args:
      dim: Width of the sequence.
      num_heads: Heads of queries.
      head_dim: Width of a head; all together may be wider or narrower than `dim`.
      num_kv_heads: Heads of keys and values, a divisor of `num_heads`; `num_heads` when None.
      packed: One layer `qkv` gives queries, keys and values, side by side in this order.
      scale: Of the scores; `head_dim ** -0.5` when None.
      dropout: Rate on the result, in calls with a key.
      weights_dropout: Rate on the attention weights; `dropout` when None.
      head_norm: Makes a norm over `head_dim`, one for queries and one for keys; None for neither.
      rotates_pairs: Rotary positions turn neighbouring channels together, see `nn.rotary`.
      linear: Makes the layers.
      last: Makes the output layer; `linear` when None.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        packed: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        weights_dropout: float | None = None,
        head_norm: Callable[[], nnx.Module] | None = None,
        rotates_pairs: bool = False,
        linear: MakeLinear,
        last: MakeLinear | None = None,
    ):
        self.weights_dropout = dropout if weights_dropout is None else weights_dropout
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim, self.scale, self.dropout = head_dim, scale, dropout
        inner, inner_kv = num_heads * head_dim, self.num_kv_heads * head_dim
        self.packed = packed
        if packed:
            self.qkv = linear(dim, inner + 2 * inner_kv)
        else:
            self.q, self.k, self.v = (linear(dim, n) for n in (inner, inner_kv, inner_kv))
        self.out = (last or linear)(inner, dim)
        self.has_head_norm, self.rotates_pairs = head_norm is not None, rotates_pairs
        if head_norm is not None:
            self.q_norm, self.k_norm = head_norm(), head_norm()

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | LabelMask | None = None,
        past: Past | None = None,
        length: Array | int = 0,
        *,
        causal: bool = False,
        bias: Array | None = None,
        rotary: tuple[Array, Array] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Past | None]:
        """Attends; `past` holds this layer's slots, into which new keys and values are written.

        Args:
          mask: `[b|1, 1, t, s]`, where `s` is `t` without a past and the number of slots with one;
            or one of labels.
          past: `(k, v)`, each `[b, s, g, head_dim]`, or None. Keys are stored turned.
          length: Slots already in use.
          causal: Every position sees itself and those before it; without a mask and a past.
          bias: Added to the scores, `[b|1, h, t, s]`.
          rotary: Cosines and sines of the positions of `x`, see `nn.rotary.rotary_tables`.
          key: For dropout; None switches it off.

        Returns:
          The result, and `past` with the new keys and values (None without one).
        """
        if self.packed:
            heads = rearrange(self.qkv(x), "b t (h d) -> b t h d", d=self.head_dim)
            h, g = self.num_heads, self.num_kv_heads
            q, k, v = jnp.split(heads, (h, h + g), axis=2)
        else:
            q, k, v = (
                rearrange(f(x), "b t (h d) -> b t h d", d=self.head_dim)
                for f in (self.q, self.k, self.v)
            )
        if self.has_head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            if self.rotates_pairs:
                q, k = halves_of_pairs(q), halves_of_pairs(k)
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if past is not None:
            past = kv_cache.write(past[0], k, length), kv_cache.write(past[1], v, length)
            k, v = (slots.astype(q.dtype) for slots in past)
        weights_key, key = (None, None) if key is None else split(key, 2)
        y = dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            causal=causal,
            bias=bias,
            scale=self.scale,
            dropout=self.weights_dropout,
            dropout_key=weights_key,
        )
        return drop(self.out(rearrange(y, "b t h d -> b t (h d)")), self.dropout, key), past


class MLP(nnx.Module):
    """`down(activation(up(x)))`, or gated: `down(activation(gate(x)) * up(x))`.

    Args:
      dim: Width of the sequence.
      mlp_dim: Width inside.
      activation: Acts on each number alone.
      gated: Has a second layer into the inner width.
      packed: Gated, but `up` gives the value and then the gate, side by side.
      dropout: Rate on the result, in calls with a key.
      linear: Makes the layers.
      last: Makes the output layer; `linear` when None.
    """

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        *,
        activation: Callable[[Array], Array],
        gated: bool = False,
        packed: bool = False,
        dropout: float = 0.0,
        linear: MakeLinear,
        last: MakeLinear | None = None,
    ):
        self.activation, self.dropout = activation, dropout
        self.gated, self.packed = gated, packed
        if gated:
            self.gate = linear(dim, mlp_dim)
        self.up = linear(dim, 2 * mlp_dim if packed else mlp_dim)
        self.down = (last or linear)(mlp_dim, dim)

    def __call__(
        self, x: Float[Array, "b t d"], *, key: Array | None = None
    ) -> Float[Array, "b t d"]:
        """Maps every position alone; `key` is for dropout, None switches it off."""
        if self.gated:
            y = self.activation(self.gate(x)) * self.up(x)
        elif self.packed:
            value, gate = jnp.split(self.up(x), 2, axis=-1)
            y = value * self.activation(gate)
        else:
            y = self.activation(self.up(x))
        return drop(self.down(y), self.dropout, key)


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the parts are made in this order."""

    def __init__(
        self,
        norm: Callable[[], nnx.Module],
        attention: Callable[[], Attention],
        mlp: Callable[[], MLP],
    ):
        self.attn_norm, self.attn = norm(), attention()
        self.mlp_norm, self.mlp = norm(), mlp()

    def __call__(
        self, x: Float[Array, "b t d"], *args, key: Array | None = None, **options
    ) -> tuple[Float[Array, "b t d"], Past | None]:
        """See `Attention.__call__`."""
        attn_key, mlp_key = (None, None) if key is None else split(key, 2)
        y, past = self.attn(self.attn_norm(x), *args, key=attn_key, **options)
        x = x + y
        return x + self.mlp(self.mlp_norm(x), key=mlp_key), past

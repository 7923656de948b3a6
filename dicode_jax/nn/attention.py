"""The one door to attention: scaled dot products with the softmax in float32.

Which implementation runs is chosen here and nowhere else, by what a program is traced for, by types
and by sizes; `runtime.platform` can say otherwise. Masks are built by the caller, but for the
causal one, which fused kernels know by name.
"""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from dicode_jax.nn.dropout import drop
from dicode_jax.nn.masks import LabelMask, causal_mask
from dicode_jax.runtime import platform
from dicode_jax.typing import Array, Bool, Float, typechecked

# From where a form pays: cuDNN's by what the scores would move (many keys, or many queries and few
# keys), a loop over heads on CPUs by what of them no cache holds (queries times keys).
CUDNN_MIN_KEYS = 256
CUDNN_MIN_SCORES = 256 * 16
CUDNN_MAX_HEAD_DIM = 128
MAPPED_MIN_SCORES = 2**17
# From so many scores of all heads on they are held of one head at a time: 8 GB in float32.
HELD_MAX_SCORES = 2**31
BLOCKED_SCORES = 2**25  # at once with a mask of labels: 128 MiB
KEYS_IN_PARTS = 8  # on GPUs, for one query and a number of keys that these divide


@typechecked
def dot_product_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g d"],
    *,
    mask: Bool[Array, "#b #h #t s"] | LabelMask | None = None,
    causal: bool = False,
    bias: Float[Array, "#b h t s"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: Array | None = None,
) -> Float[Array, "b t h d"]:
    """Attends `query` to `key`/`value`, which may have fewer heads.

    With `g < h` heads each of them serves `h / g` query heads in a row.

    Args:
      mask: True where a query may look at a key. A row without any True is a uniform average over
        the keys (a finite mask value, no NaN). One of labels is made for a block of queries at a
        time, and so are the scores.
      causal: Query `i` looks at the keys `0 .. i`; instead of a mask.
      bias: Added to the scores after they were scaled.
      scale: Multiplies the scores; `d ** -0.5` by default.
      dropout: Rate of dropout on the weights, in [0, 1).
      dropout_key: As in `nn.rngs.draw`; None for no dropout.

    Returns:
      The weighted values; zeros when there are no keys at all (`s == 0`).

    Raises:
      ValueError: Dropout together with a bias or with fewer heads of keys than of queries, both a
        mask and `causal`, or a mask of labels with any of the others.
    """
    if key.shape[1] == 0:
        return jnp.zeros_like(query)
    if causal and mask is not None:
        raise ValueError("attention takes a mask or causal=True, not both")
    has_dropout = dropout_key is not None and dropout > 0
    has_groups = query.shape[2] != key.shape[2]
    if has_dropout and (bias is not None or has_groups):
        raise ValueError("attention with dropout takes no bias and equal numbers of heads")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, LabelMask):
        if has_dropout or has_groups or bias is not None:
            raise ValueError("attention by labels takes no dropout, bias or groups of heads")
        return _blocked(query, key, value, mask, scale)
    if not has_dropout and mask is None and bias is None:
        form = _form(query, key)
        if form == "cudnn":
            return _cudnn(query, key, value, scale, causal)
        if form == "mapped" and not has_groups:
            return _mapped(query, key, value, scale, causal)
    if causal:
        mask = causal_mask(query.shape[1], key.shape[1])
    if bias is not None or has_groups:
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)
    return _deferred(query, key, value, mask, scale, dropout, dropout_key)


def attend(
    query: Float[Array, "b t hd"],
    key: Float[Array, "b s gd"],
    value: Float[Array, "b s gd"],
    *,
    head_dim: int,
    **options,
) -> Float[Array, "b t hd"]:
    """`dot_product_attention` of what linear layers give: all heads side by side on one axis."""
    heads = (rearrange(x, "b t (h d) -> b t h d", d=head_dim) for x in (query, key, value))
    return rearrange(dot_product_attention(*heads, **options), "b t h d -> b t (h d)")


def runs_across(shape: tuple[int, int, int, int], dtype: DTypeLike) -> bool:
    """Whether `attend_across` is for heads `[n, t, h, d]` of sequences that attend to themselves.

    Where XLA computes scores on GPUs: with tokens outermost its products read heads where they
    lie; with sequences outermost four copies put the heads of each side by side and back again.
    """
    heads = jax.ShapeDtypeStruct(shape, dtype)
    return platform.platform() == "gpu" and _form(heads, heads) == "xla"


@typechecked
def attend_across(
    query: Float[Array, "t n hd"],
    key: Float[Array, "s n gd"],
    value: Float[Array, "s n gd"],
    *,
    head_dim: int,
) -> Float[Array, "t n hd"]:
    """`attend` of sequences that lie side by side, their tokens on the outermost axis."""
    heads = (rearrange(x, "t n (h d) -> t n h d", d=head_dim) for x in (query, key, value))
    query, key, value = heads
    scores = jnp.einsum("tnhd,snhd->nhts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * head_dim**-0.5, axis=-1).astype(value.dtype)
    return rearrange(jnp.einsum("nhts,snhd->tnhd", weights, value), "t n h d -> t n (h d)")


def _form(query: Array | jax.ShapeDtypeStruct, key: Array | jax.ShapeDtypeStruct) -> str:
    """The form for a call without mask, bias and dropout."""
    wanted, on = platform.attention(), platform.platform()
    (t, d), s = query.shape[1::2], key.shape[1]
    is_half = query.dtype == key.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    fits = d <= CUDNN_MAX_HEAD_DIM and d % 8 == 0 and not platform.is_before_ampere()
    pays = on == "gpu" and ((s >= CUDNN_MIN_KEYS and t > 1) or t * s >= CUDNN_MIN_SCORES)
    pays = pays or wanted == "cudnn"
    if wanted in ("auto", "cudnn") and is_half and fits and pays:
        return "cudnn"
    is_long = (on == "cpu" and t * s >= MAPPED_MIN_SCORES) or (
        math.prod(query.shape[:3]) * s >= HELD_MAX_SCORES
    )
    if wanted == "mapped" or (wanted == "auto" and is_long):
        return "mapped"
    return "xla"


def _cudnn(query, key, value, scale, causal):
    """NVIDIA's fused kernels where the program runs on their GPUs, else and failing that XLA's."""
    (t, s), even = (query.shape[1], key.shape[1]), map(_pad_to_even, (query, key, value))
    try:
        return _fused(*even, scale=scale, causal=causal, keys=s)[:, :t]
    except (NotImplementedError, RuntimeError, ValueError) as error:
        warnings.warn(f"attention without cuDNN, slower: {error}", stacklevel=4)
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, scale=scale)


def _pad_to_even(x):
    """For the gradient, which jax has of even lengths alone."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


@functools.partial(jax.jit, static_argnames=("scale", "causal", "keys"))
def _fused(query, key, value, *, scale, causal, keys):
    """Of keys, the first `keys` count; a causal mask hides the one behind them by itself."""
    options = {"is_causal": causal, "scale": scale}
    if not causal and keys < key.shape[1]:
        options["key_value_seq_lengths"] = jnp.full((len(key),), keys, jnp.int32)
    fused, other = (
        functools.partial(jax.nn.dot_product_attention, implementation=name, **options)
        for name in ("cudnn", "xla")
    )
    return jax.lax.platform_dependent(query, key, value, cuda=fused, default=other)


def _mapped(query, key, value, scale, causal):
    """One head after another: on CPUs its scores stay in the cache.

    2 x 1024 positions, 8 heads of 40, one core: 68 ms against 167 ms, with the gradient 319 against
    446 ms; equal at 256 positions.
    """
    mask = causal_mask(query.shape[1], key.shape[1]) if causal else None

    @jax.checkpoint  # or the scores of all heads are kept for the gradient
    def attend_one(heads):
        q, k, v = (x[None, :, None] for x in heads)
        return _deferred(q, k, v, mask, scale, 0.0, None)[0, :, 0]

    heads = tuple(rearrange(x, "b t h d -> (b h) t d") for x in (query, key, value))
    return rearrange(jax.lax.map(attend_one, heads), "(b h) t d -> b t h d", b=len(query))


def _blocked(query, key, value, mask: LabelMask, scale):
    """One block of queries after another, each with its own part of the mask and all keys."""
    b, t, h, _ = query.shape
    size = max(1, min(t, BLOCKED_SCORES // (b * h * key.shape[1])))

    @jax.checkpoint  # or the scores of all blocks are kept for the gradient
    def attend_some(part):
        q, labels = part
        seen = LabelMask(labels, mask.keys, mask.sees).dense()[None, None]
        return _deferred(q, key, value, seen, scale, 0.0, None)

    if size == t:
        return attend_some((query, mask.queries))
    left = -t % size
    labels = jnp.pad(mask.queries, ((0, left), (0, 0)))
    query = jnp.pad(query, ((0, 0), (0, left), (0, 0), (0, 0)))
    parts = rearrange(query, "b (n t) h d -> n b t h d", t=size)
    out = jax.lax.map(attend_some, (parts, rearrange(labels, "(n t) l -> n t l", t=size)))
    return rearrange(out, "n b t h d -> b (n t) h d")[:, :t]


def _deferred(query, key, value, mask, scale, rate, rng):
    """Weights are normalised after they met the values, with heads next to the batch.

    On CPU it takes half the time of `jax.nn.dot_product_attention`: 26 against 56 ms at 16 x 256
    positions and 4 heads of 64, with the gradient 109 against 184 ms.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [b, h, t|s, d]
    query = query * jnp.asarray(scale, query.dtype)
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = drop(weights, rate, rng).astype(value.dtype)
    out = _weighted(weights, value)
    return (out / total).astype(value.dtype).swapaxes(1, 2)


def _weighted(weights, value):
    """Values `[b, h, s, d]` summed with weights `[b, h, t, s]`, in float32.

    For one query on a GPU in parts: XLA, which there makes a sum of products of it, would write all
    products to memory in float32 and read them again.
    """
    total = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if weights.shape[2] > 1 or weights.shape[3] % KEYS_IN_PARTS or platform.platform() != "gpu":
        return total("bhts,bhsd->bhtd", weights, value)
    weights = rearrange(weights, "b h t (p s) -> b p h t s", p=KEYS_IN_PARTS)
    value = rearrange(value, "b h (p s) d -> b p h s d", p=KEYS_IN_PARTS)
    out = total("bphts,bphsd->bphtd", weights, value)
    return jax.lax.optimization_barrier(out).sum(1)  # or XLA makes one sum of both

"""LanDiff's language model writing semantic tokens, segment by segment, of any length.

The prompt fills a cache; a `lax.scan` for each segment feeds one position after another. Where a
mark must stand it is put, whatever is likely there. Between the marks any token may be drawn, a
mark too, as in the release; it is seen as drawn, and given back as the last code.

Deviations from the release: each draw has its own key, so that marks take none; a batch of captions
may be of several lengths.

Letters: b batch, r rows (b, or 2b with guidance: captions, then null texts), l text tokens, e their
width, n semantic tokens, t positions, d model width, v vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.guidance import guide
from dicode_jax.distributions import MIN_TEMPERATURE
from dicode_jax.distributions.categorical import keep_top_k, keep_top_p
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.frames import check_codes
from dicode_jax.models.landiff.language_model import (
    CODE,
    NUM_PREFIX,
    LanguageModel,
    fill,
    validity,
)
from dicode_jax.nn.kv_cache import KVCache
from dicode_jax.nn.masks import causal_mask, key_mask, positions_from_valid
from dicode_jax.runtime import kept_programs
from dicode_jax.typing import Array, Bool, Float, Int, typechecked

MOTION_SCORE, GUIDANCE_SCALE = 0.1, 7.5  # of the release's command line


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a call decides the programs, beside the shapes: everything else is traced."""

    size: int  # slots of the cache
    do_sample: bool
    is_guided: bool
    cut: str  # "k", "p" or "": which tokens are left out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
    keys: Any
    guidance_scale: Array
    temperature: Array
    limit: Array  # top_k or top_p


class Draft(NamedTuple):
    """Between two segments.

    Attributes:
      cache: What the model has seen.
      last: The position `[r, 1, d]` that it has yet to see.
      valid: Bool `[r, s]`: slots of the cache that are no padding.
    """

    cache: KVCache
    last: Array
    valid: Array


@typechecked
def generate(
    lm: LanguageModel, text: Float[Array, "b l e"], *, num_frames: int, **options
) -> Int[Array, "b n"]:
    """Semantic tokens of videos of `num_frames` semantic frames, from 0 to `codebook_size - 1`.

    Arguments and errors are those of `stream_tokens`.
    """
    runs = stream_segments(lm, text, num_frames=num_frames, **options)
    return jnp.concatenate(list(runs), axis=1)


def stream_segments(
    lm: LanguageModel, text: Float[Array, "b l e"], *, num_frames: int, **options
) -> Iterator[Int[Array, "b n"]]:
    """The tokens of `generate` as they are written; arguments and errors are of `stream_tokens`."""
    most = lm.cfg.codebook_size - 1
    runs = stream_tokens(lm, text, num_frames=num_frames, **options)
    return (jnp.minimum(x[:, np.flatnonzero(layout == CODE)], most) for layout, x in runs)


def stream_tokens(
    lm: LanguageModel,
    text: Float[Array, "b l e"],
    *,
    num_frames: int,
    keys: Array | None = None,
    text_valid: Bool[Array, "b l"] | None = None,
    motion_score: float = MOTION_SCORE,
    guidance_scale: float | Array = GUIDANCE_SCALE,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = True,
    given: Int[Array, "b m"] | None = None,
) -> Iterator[tuple[np.ndarray, Int[Array, "b t"]]]:
    """Everything that the model writes behind a caption, marks too, one segment after the other.

    A segment is one call of a compiled program, the same for all segments of one length. The cache
    is allocated once, for the whole video: with guidance two rows for each caption, and one slot
    for each position.

    Args:
      lm: The language model.
      text: Captions of the text encoder, padded on the left where `text_valid` is False.
      num_frames: Semantic frames to write.
      keys: One key per caption `[b]`; token `i` of a video draws from `fold_in(key, i)`.
      motion_score: How much moves.
      guidance_scale: Moves scores away from those without a caption; 0 and 1 switch it off. A
        traced value switches it on.
      temperature: Divides the scores.
      top_k, top_p: Draw from the likeliest tokens alone, see `distributions.categorical`; at most
        one of the two.
      do_sample: False takes the likeliest token.
      given: Semantic tokens of the first frames, as the tokenizer makes them; one frame at least
        is left to write.

    Returns:
      For each segment its layout and its tokens as the model saw them; what is given comes back.

    Raises:
      ValueError: Something does not fit; the message says what to change.
      UserError: While it writes: scores are not finite.
    """
    cfg, (b, length) = lm.cfg, text.shape[:2]
    _check(lm, b, keys, do_sample, temperature, guidance_scale, motion_score, top_k, top_p)
    size = NUM_PREFIX + length + cfg.frames.count(num_frames) + 2 * num_frames
    if size > lm.body.max_seq_len:
        raise ValueError(
            f"{num_frames} semantic frames behind {length} text tokens are {size} positions, but "
            f"the model has {lm.body.max_seq_len}; ask for fewer frames"
        )
    if not _ends_in_words(text_valid):
        raise ValueError("captions must be padded on the left: text_valid ends in False")
    segments = cfg.frames.segments(num_frames)
    known = 0 if given is None else cfg.frames.num_frames(given.shape[1])
    if known >= num_frames:
        raise ValueError(f"{known} frames are given, and the video has {num_frames}: give fewer")
    if given is not None:
        check_codes(given, cfg.codebook_size)
    is_traced = isinstance(guidance_scale, jax.Array)
    plan = _Plan(
        size=size,
        do_sample=do_sample,
        is_guided=is_traced or guidance_scale not in (0, 1),
        cut="k" if top_k is not None else "p" if top_p is not None else "",
    )
    inputs = _Inputs(
        keys=keys,
        guidance_scale=jnp.asarray(guidance_scale, jnp.float32),
        temperature=jnp.asarray(temperature, jnp.float32),
        limit=jnp.asarray(top_k if top_k is not None else top_p or 0, jnp.float32),
    )
    start = None if given is None else fill(cfg.layout(known), given)
    numbers = jnp.asarray([num_frames, motion_score], jnp.float32)
    graph, state = nnx.split(lm)
    draft = _begin(graph, state, text, text_valid, numbers, start, size, plan.is_guided)
    layouts = [cfg.layout(frames) for frames in segments]
    return _write((graph, state, inputs, plan), draft, layouts, start)


def _write(call, draft, layouts, start) -> Iterator[tuple[np.ndarray, Array]]:
    graph, state, inputs, plan = call
    known = jnp.zeros((len(draft.last), 0), jnp.int32) if start is None else start
    index = 0
    for layout in layouts:
        tokens, known = known[:, : len(layout)], known[:, len(layout) :]
        if (rest := layout[tokens.shape[1] :]).size:
            at = index + tokens.shape[1]
            drawn, is_finite, draft = _go_on(graph, state, inputs, draft, rest, at, plan)
            if not isinstance(is_finite, jax.core.Tracer) and not is_finite:
                raise UserError(
                    "the language model gave NaN or infinite scores, of which nothing can be "
                    "drawn: look at its weights and at dtype"
                )
            tokens = jnp.concatenate([tokens, drawn], axis=1) if tokens.size else drawn
        index += len(layout)
        yield layout, tokens


def _ends_in_words(text_valid: Array | None) -> bool:
    if text_valid is None or isinstance(text_valid, jax.core.Tracer):
        return True
    return bool(np.asarray(text_valid)[:, -1].all())


def _check(lm, b, keys, do_sample, temperature, guidance_scale, motion_score, top_k, top_p) -> None:
    if do_sample and keys is None:
        raise ValueError("sampling needs keys, one per caption; or pass do_sample=False")
    if keys is not None and keys.shape[0] != b:
        raise ValueError(f"{keys.shape[0]} keys for {b} captions; pass one key per caption")
    for name, value, least in (
        ("temperature", temperature, MIN_TEMPERATURE),
        ("guidance_scale", guidance_scale, 0),
        ("motion_score", motion_score, 0),
    ):
        if not isinstance(value, jax.Array) and not least <= value < float("inf"):
            raise ValueError(f"{name} must be at least {least:g} and finite, got {value:g}")
    if top_k is not None and top_p is not None:
        raise ValueError("top_k and top_p exclude each other: pass one of them")
    if top_k is not None and not 1 <= top_k <= lm.cfg.body.vocab_size:
        raise ValueError(f"top_k must be from 1 to {lm.cfg.body.vocab_size}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


@functools.partial(kept_programs.jit, static_argnames=("graph", "size", "is_guided"))
def _begin(graph, state, text, text_valid, numbers, start, size, is_guided) -> Draft:
    """Fills a cache with the prompt, but for its last position."""
    lm: LanguageModel = nnx.merge(graph, state)
    b, length = text.shape[:2]
    count, motion = (jnp.broadcast_to(x, (b,)) for x in numbers)
    prompt = lm.embed_prompt(text, count, motion)
    if is_guided:
        null = lm.embed_prompt(text, count, motion, jnp.ones((b,), bool))
        prompt = jnp.concatenate([prompt, null])
    if start is not None:
        tokens = lm.body.embed_tokens(start)
        tokens = jnp.concatenate([tokens] * (2 if is_guided else 1))
        prompt = jnp.concatenate([prompt, tokens], axis=1)
    valid = validity(text_valid, b, length, size - NUM_PREFIX - length)
    valid = jnp.concatenate([valid] * (2 if is_guided else 1))
    cache = lm.body.init_cache(batch=len(prompt), size=size)
    t = prompt.shape[1] - 1
    mask = causal_mask(t, size) & key_mask(valid)
    positions = positions_from_valid(valid)[:, :t]
    _, filled = lm.body(prompt[:, :t], positions, mask, cache)
    assert filled is not None
    return Draft(filled, prompt[:, t:], valid)


@functools.partial(kept_programs.jit, static_argnames=("graph", "plan"), donate_argnames=("draft",))
def _go_on(
    graph, state, inputs: _Inputs, draft: Draft, layout, index, plan: _Plan
) -> tuple[Int[Array, "b t"], Bool[Array, ""], Draft]:
    """Writes one position after the other, and says whether all scores were finite.

    `index` counts the positions of earlier segments.
    """
    lm: LanguageModel = nnx.merge(graph, state)
    positions = positions_from_valid(draft.valid)

    def step(draft: Draft, item):
        wanted, index = item
        at = draft.cache.length
        here = jax.lax.dynamic_slice_in_dim(positions, at, 1, axis=1)
        mask = causal_mask(1, plan.size, offset=at) & key_mask(draft.valid)
        hidden, cache = lm.body(draft.last, here, mask, draft.cache)
        assert cache is not None
        logits = lm.body.logits(hidden)[:, 0]
        drawn = _draw(next_logits(logits, inputs, plan), inputs, plan, index)
        token = jnp.where(wanted == CODE, drawn, wanted)
        rows = jnp.concatenate([token] * (2 if plan.is_guided else 1))
        last = lm.body.embed_tokens(rows[:, None]).astype(draft.last.dtype)
        return Draft(cache, last, draft.valid), (token, jnp.isfinite(logits).all())

    indices = index + jnp.arange(len(layout))
    draft, (tokens, is_finite) = jax.lax.scan(step, draft, (jnp.asarray(layout), indices))
    return tokens.T, is_finite.all(), draft


def next_logits(logits: Float[Array, "r v"], inputs: _Inputs, plan: _Plan) -> Float[Array, "b v"]:
    """What a token is drawn by: guided, divided by the temperature, the unlikely ones left out."""
    if plan.is_guided:
        cond, uncond = jnp.split(logits, 2)
        logits = guide(cond, uncond, inputs.guidance_scale)
    logits = logits / inputs.temperature
    if plan.cut == "k":
        return keep_top_k(logits, inputs.limit)
    return keep_top_p(logits, inputs.limit) if plan.cut == "p" else logits


def _draw(logits, inputs: _Inputs, plan: _Plan, index) -> Int[Array, " b"]:
    if not plan.do_sample:
        return logits.argmax(axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(inputs.keys, index)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

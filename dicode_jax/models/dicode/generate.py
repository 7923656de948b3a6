"""Autoregressive generation of deep tokens: text in, keyframes of deep tokens out, of any length.

The prompt (text, `<img>`, keyframes that are already there) fills a cache; a `lax.scan` for each
keyframe then feeds one position after another. Videos longer than the model's tables slide a
window: the text plus the last keyframes are the prompt of the next window.

Deviations from the reference, whose behaviour `parity=True` brings back: keyframes given as a
prefix are numbered 0 .. f-1 and what follows goes on at f, place 0 (the reference counts separators
as well and so marks new tokens wrongly); `cosine` models read and embed vectors as they were
trained. Guidance works with a prefix, and there is no largest length.

Letters: b batch, r rows (b, or 2b with guidance: prompts, then empty prompts), l text tokens, k
keyframes, n deep tokens per keyframe, z their width, d model width.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dicode_jax.distributions import MIN_TEMPERATURE
from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.models.dicode import ar_losses
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.nn.attention import KEYS_IN_PARTS
from dicode_jax.nn.kv_cache import KVCache
from dicode_jax.runtime import kept_programs
from dicode_jax.runtime.platform import platform
from dicode_jax.runtime.sharding import BATCH, ROWS, WHOLE, by_rows
from dicode_jax.typing import Array, Float, Int, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What of a call decides the programs: everything else is traced.

    Attributes:
      size: Slots of the cache, for a full window whatever is asked for: a video of any length runs
        through the same two programs, or three where the window slides.
      num_new: Keyframes that the first program of a window writes; all of them with `parity`.
    """

    size: int
    num_new: int
    do_sample: bool
    is_guided: bool
    share_draws: bool
    parity: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
    text_ids: Any  # arrays all, or how they lie on a mesh
    uncond_ids: Any
    keys: Any
    first_index: Any  # number, in the whole video, of the first token drawn in this call
    var_scale: Any
    logits_temperature: Any
    guidance_scale: Any


class _Draft(NamedTuple):
    """Between two keyframes: what the model has seen, and the token `[r, z]` it has yet to see."""

    cache: Any
    last: Any


@typechecked
def generate(
    lm: DiCoDeLM, text_ids: Int[Array, "b l"], *, num_keyframes: int, **options
) -> Float[Array, "b k n z"]:
    """Generates keyframes of deep tokens for prompts, or continues given keyframes.

    `stream_keyframes` gathered: arguments and errors are its own.

    Returns:
      The new keyframes.
    """
    runs = stream_keyframes(lm, text_ids, num_keyframes=num_keyframes, **options)
    return jnp.concatenate(list(runs), axis=1)


def stream_keyframes(
    lm: DiCoDeLM,
    text_ids: Int[Array, "b l"],
    *,
    num_keyframes: int,
    keys: Array | None = None,
    do_sample: bool = True,
    var_scale: float | int | Array = 0.01,
    logits_temperature: float | int | Array = 1.0,
    guidance_scale: float | int | Array = 1.0,
    share_guidance_draws: bool = False,
    uncond_ids: Int[Array, " l"] | None = None,
    prefix: Float[Array, "b f n z"] | None = None,
    window: int | None = None,
    overlap: int | None = None,
    parity: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[Float[Array, "b 1 n z"]]:
    """The keyframes of `generate` as they are written, one after the other.

    What is kept in between is the cache and the last keyframes, whatever the length. A keyframe is
    one call of a compiled program, which is dispatched and not waited for. Calls with the same
    shapes and switches share the programs: lengths and scales may change without compiling again.
    All of it can be traced by an outer `jit`, keyframe after keyframe.

    Args:
      lm: The language model.
      text_ids: Prompts, padded on the right with `pad_token_id`, without `<img>`.
      num_keyframes: How many keyframes to generate, besides those of `prefix`.
      keys: One key per sample `[b]`. Token `i` of the video draws from `fold_in(key, i)`, counted
        from the prefix on: a sample depends neither on the batch around it nor on where a run was
        cut.
      do_sample: Draw from the mixture; False takes the expected value.
      var_scale: Multiplies the variances; 0 leaves the choice of a component only.
      logits_temperature: Divides the mixture's logits; below 1 prefers the heavier components.
      guidance_scale: Above 1, tokens are moved away from those of an empty prompt by this factor.
        A traced value switches guidance on, whatever it is.
      share_guidance_draws: Draw the same noise for a prompt and its empty prompt (the reference
        draws independently).
      uncond_ids: The empty prompt, all `pad_token_id` by default.
      prefix: Keyframes to go on from, as the tokenizer makes them.
      window: Most keyframes in sight at once, the prefix included; by default as many as the
        model's tables of keyframes and positions hold.
      overlap: Keyframes that the next window sees of the last one; half a window by default.
      parity: Reproduce the reference's numbering after a prefix and its treatment of `cosine`; all
        keyframes come at once.
      mesh: Prompts are split over its devices, each of which computes as if it were alone; None for
        one device.

    Raises:
      ValueError: Something does not fit; the message says what to change.
    """
    cfg, b = lm.cfg, text_ids.shape[0]
    num_prefix = 0 if prefix is None else prefix.shape[1]
    _check_call(lm, num_keyframes, keys, do_sample, prefix, b)
    _check_scales(var_scale, logits_temperature, guidance_scale)
    text_length = text_ids.shape[1]
    if parity:
        size = _check_parity(lm, text_length, num_prefix, num_keyframes)
        window, overlap = num_prefix + num_keyframes, 1
    else:
        window, overlap = _window(lm, text_length, num_prefix, num_keyframes, window, overlap)
        # The last token of a window and the separator behind it are never fed.
        size = text_length + 1 + window * (cfg.num_tokens + 1) - 2
        size += -size % KEYS_IN_PARTS if platform() == "gpu" else 0
    is_guided = isinstance(guidance_scale, jax.Array) or guidance_scale > 1
    if is_guided and uncond_ids is None:
        uncond_ids = jnp.full((text_length,), cfg.pad_token_id, text_ids.dtype)
    plan = _Plan(
        size=size,
        num_new=num_keyframes if parity else 1,
        do_sample=do_sample and cfg.loss == "gmm",
        is_guided=is_guided,
        share_draws=share_guidance_draws,
        parity=parity,
    )
    inputs = _Inputs(
        text_ids=text_ids,
        uncond_ids=uncond_ids if is_guided else None,
        keys=keys,
        first_index=jnp.asarray(num_prefix * cfg.num_tokens, jnp.int32),
        var_scale=jnp.asarray(var_scale, jnp.float32),
        logits_temperature=jnp.asarray(logits_temperature, jnp.float32),
        guidance_scale=jnp.asarray(guidance_scale, jnp.float32),
    )
    return _write(lm, inputs, plan, prefix, num_keyframes, window, overlap, mesh)


def _write(lm, inputs, plan, prefix, num_keyframes, window, overlap, mesh) -> Iterator[Array]:
    graph, state = nnx.split(lm)
    n, draft, written = lm.cfg.num_tokens, None, 0
    recent = collections.deque(maxlen=overlap)  # what the next window starts from
    if prefix is not None:
        recent.extend(jnp.split(prefix.astype(jnp.float32), prefix.shape[1], axis=1))
    seen = 0 if prefix is None else prefix.shape[1]
    while written < num_keyframes:
        if seen >= window:
            prefix, seen, draft = jnp.concatenate(list(recent), axis=1), overlap, None
        if draft is None:
            tokens, draft = _begin(graph, state, inputs, prefix, written * n, plan, mesh)
        else:
            tokens, draft = _go_on(graph, state, inputs, draft, seen, written * n, plan, mesh)
        recent.append(tokens)
        written, seen = written + tokens.shape[1], seen + tokens.shape[1]
        yield tokens


def keyframes_in_sight(lm: DiCoDeLM, text_length: int) -> int:
    """Most keyframes that fit in the model's tables behind a text of this length.

    Raises:
      ValueError: Not even one fits.
    """
    n = lm.cfg.num_tokens
    # Text and `<img>`; then keyframes, of which the very last token and separator are never fed.
    count = min(lm.cfg.max_keyframes, (lm.body.max_seq_len - text_length + 1) // (n + 1))
    if count < 1:
        raise ValueError(
            f"a text of {text_length} tokens leaves no room for a keyframe of {n} in "
            f"{lm.body.max_seq_len} positions; shorten the text"
        )
    return count


def _check_call(lm, num_keyframes, keys, do_sample, prefix, b) -> None:
    cfg = lm.cfg
    if num_keyframes < 1:
        raise ValueError(f"num_keyframes must be positive, got {num_keyframes}")
    if prefix is not None:
        want = (b, cfg.num_tokens, cfg.token_dim)
        if (prefix.shape[0], *prefix.shape[2:]) != want or prefix.shape[1] < 1:
            raise ValueError(
                f"prefix has shape {prefix.shape}, but [{b}, f, {cfg.num_tokens}, {cfg.token_dim}] "
                "is needed: one row per prompt, deep tokens of this model"
            )
    if do_sample and cfg.loss == "gmm" and keys is None:
        raise ValueError("sampling needs keys, one per prompt; or pass do_sample=False")
    if keys is not None and keys.shape[0] != b:
        raise ValueError(f"{keys.shape[0]} keys for {b} prompts; pass one key per prompt")


def _check_scales(var_scale, logits_temperature, guidance_scale) -> None:
    """Checks those that are plain numbers; arrays may be traced."""
    for name, value, least in (
        ("var_scale", var_scale, 0.0),
        ("logits_temperature", logits_temperature, MIN_TEMPERATURE),
        ("guidance_scale", guidance_scale, 1.0),
    ):
        if not isinstance(value, jax.Array) and not least <= value < float("inf"):
            raise ValueError(f"{name} must be at least {least:g} and finite, got {value:g}")


def _check_parity(lm, text_length, num_prefix, num_new) -> int:
    """Positions up to where the reference's wrong numbers reach; it knows no window."""
    places = _places(lm.cfg.num_tokens, num_prefix, num_new, parity=True)
    positions = text_length + 1 + num_prefix * (lm.cfg.num_tokens + 1) + len(places.feeds)
    last = max(places.frame, default=0)
    if last >= lm.cfg.max_keyframes or positions > lm.body.max_seq_len:
        raise ValueError(
            f"with parity=True {num_prefix} + {num_new} keyframes reach keyframe number {last} "
            f"and {positions} positions; the model has {lm.cfg.max_keyframes} and "
            f"{lm.body.max_seq_len}"
        )
    return positions


def _window(lm, text_length, num_prefix, num_new, window, overlap) -> tuple[int, int]:
    """Keyframes in sight at once, and those that the next window sees of the last one."""
    most = keyframes_in_sight(lm, text_length)
    window = most if window is None else window
    if not 1 <= window <= most:
        raise ValueError(
            f"a window of {window} keyframes is impossible: 1 to {most} fit behind a text of "
            f"{text_length} tokens"
        )
    overlap = max(1, window // 2) if overlap is None else overlap
    if num_prefix + num_new > window and not 1 <= overlap < window:
        raise ValueError(
            f"{num_prefix + num_new} keyframes do not fit in a window of {window}, so an overlap "
            f"of 1 to {window - 1} is needed, got {overlap}"
        )
    return window, overlap


@dataclasses.dataclass(frozen=True)
class _Places:
    """The positions that are fed after the prompt, in order.

    Attributes:
      feeds: Token that is fed, -1 for a separator.
      frame: Keyframe number that marks it.
      place: Place in the keyframe that marks it.
      predicts: Token predicted after it, -1 where a separator follows.
    """

    feeds: np.ndarray
    frame: np.ndarray
    place: np.ndarray
    predicts: np.ndarray

    def behind(self, count: int) -> "_Places":
        """Those behind the first `count`."""
        return _Places(*(x[count:] for x in dataclasses.astuple(self)))


def _places(n: int, num_prefix: int, num_new: int, parity: bool) -> _Places:
    start = num_prefix * (n + 1 if parity else n)
    items: list[tuple[int, int, int]] = []
    for i in range(num_new * n):
        items.append((i, (start + i) // n, (start + i) % n))
        if (start + i + 1) % n == 0:
            items.append((-1, 0, 0))
    last = max(j for j, item in enumerate(items) if item[0] == num_new * n - 1)
    feeds, frame, place = np.asarray(items[: last + 1], np.int32).T
    return _Places(feeds[:-1], frame[:-1], place[:-1], feeds[1:])


_SPECS = _Inputs(
    text_ids=ROWS,
    uncond_ids=WHOLE,
    keys=ROWS,
    first_index=WHOLE,
    var_scale=WHOLE,
    logits_temperature=WHOLE,
    guidance_scale=WHOLE,
)


def _draft_specs(cache: KVCache) -> _Draft:
    layers = ROWS if isinstance(cache.k, tuple) else PartitionSpec(None, BATCH)
    return _Draft(dataclasses.replace(cache, k=layers, v=layers, length=WHOLE), ROWS)


@functools.partial(kept_programs.jit, static_argnames=("graph", "plan", "mesh"))
def _begin(graph, state, inputs: _Inputs, known, drawn, plan: _Plan, mesh):
    """Fills a cache with the prompt and the known keyframes, and writes the first one behind them.

    `drawn` counts the tokens that this call has given so far.
    """
    lm: DiCoDeLM = nnx.merge(graph, state)
    rows = inputs.text_ids.shape[0] * (2 if plan.is_guided else 1)
    cache = lm.body.init_cache(batch=rows, size=plan.size)
    specs = _draft_specs(cache)

    def run(state, inputs, known, cache, drawn):
        lm: DiCoDeLM = nnx.merge(graph, state)
        num_prefix = 0 if known is None else known.shape[1]
        places = _places(lm.cfg.num_tokens, num_prefix, plan.num_new, plan.parity)
        prompt = _prompt(lm, inputs, known, plan)
        hidden, cache = lm.body(prompt, cache=cache)
        first = _predict(lm, inputs, plan, hidden[:, -1], drawn)
        rest, draft = _feed(lm, inputs, plan, _Draft(cache, first), places, 0, drawn)
        return _finish(lm, plan, jnp.concatenate([first[None], rest])), draft

    run = by_rows(run, mesh, (WHOLE, _SPECS, ROWS, specs.cache, WHOLE), (ROWS, specs))
    return run(state, inputs, known, cache, drawn)


@functools.partial(
    kept_programs.jit, static_argnames=("graph", "plan", "mesh"), donate_argnames=("draft",)
)
def _go_on(graph, state, inputs: _Inputs, draft: _Draft, seen, drawn, plan: _Plan, mesh):
    """Writes the next keyframe, number `seen` of its window."""

    def run(state, inputs, draft, seen, drawn):
        lm: DiCoDeLM = nnx.merge(graph, state)
        n = lm.cfg.num_tokens
        places = _places(n, 0, 2, parity=False).behind(n - 1)
        tokens, draft = _feed(lm, inputs, plan, draft, places, seen - 1, drawn - n)
        return _finish(lm, plan, tokens), draft

    specs = _draft_specs(draft.cache)
    run = by_rows(run, mesh, (WHOLE, _SPECS, specs, WHOLE, WHOLE), (ROWS, specs))
    return run(state, inputs, draft, seen, drawn)


def _feed(lm, inputs, plan, draft, places, first_frame, drawn) -> tuple[Array, _Draft]:
    """Feeds places one after another; the tokens `[t, r, z]` that are predicted on the way."""
    image = lm.image_embed(lm.body.embed_tokens(inputs.text_ids[:1, :1]).dtype)

    def step(draft, item):
        feeds, frame, place, predicts = item
        embed = lm.input_mlp(draft.last) if plan.parity else lm.embed_deep_tokens(draft.last)
        embed = embed + lm.frame_embed[...][first_frame + frame] + lm.place_embed[...][place]
        embed = jnp.where(feeds < 0, image, embed[:, None].astype(image.dtype))
        hidden, cache = lm.body(embed, cache=draft.cache)
        token = _predict(lm, inputs, plan, hidden[:, -1], drawn + jnp.maximum(predicts, 0))
        return _Draft(cache, token), token

    items = tuple(map(jnp.asarray, dataclasses.astuple(places)))
    draft, tokens = jax.lax.scan(step, draft, items)
    return tokens[np.flatnonzero(places.predicts >= 0)], draft


def _finish(lm, plan, tokens: Array) -> Array:
    """Tokens `[k n, r, z]` as keyframes `[b, k, n, z]`."""
    keyframes = rearrange(tokens, "(k n) r z -> r k n z", n=lm.cfg.num_tokens)
    rows = keyframes.shape[0] // 2 if plan.is_guided else keyframes.shape[0]
    return lm.denormalize(keyframes[:rows])


def _prompt(lm: DiCoDeLM, inputs: _Inputs, known: Array | None, plan: _Plan) -> Array:
    """Embeddings of text and `<img>` and the known keyframes behind them."""
    text_ids = inputs.text_ids
    if plan.is_guided:
        text_ids = jnp.concatenate([text_ids, jnp.broadcast_to(inputs.uncond_ids, text_ids.shape)])
    text = lm.body.embed_tokens(text_ids)
    r, _, d = text.shape
    image = lm.image_embed(text.dtype)
    text = jnp.concatenate([text, jnp.broadcast_to(image, (r, 1, d))], axis=1)
    if known is None:
        return text
    frames = lm.embed_deep_tokens(lm.normalize(known)) + lm.positions_of(known.shape[1])
    separators = jnp.broadcast_to(image, (*frames.shape[:2], 1, d))
    frames = jnp.concatenate([frames.astype(text.dtype), separators], axis=2)
    if plan.is_guided:
        frames = jnp.concatenate([frames, frames])
    return jnp.concatenate([text, rearrange(frames, "b k n d -> b (k n) d")], axis=1)


def _predict(lm: DiCoDeLM, inputs: _Inputs, plan: _Plan, hidden: Array, index) -> Array:
    """Token number `index` of this call from the hidden state before it, `[r, d]` to `[r, z]`."""
    if lm.cfg.loss == "cosine" and plan.parity:
        hidden = ar_losses.normalize(hidden)
    tokens = _draw(lm, inputs, plan, lm.output_mlp(hidden), index).astype(jnp.float32)
    if plan.is_guided:
        cond, uncond = jnp.split(tokens, 2)
        tokens = jnp.tile(uncond + inputs.guidance_scale * (cond - uncond), (2, 1))
    return tokens


def _draw(lm: DiCoDeLM, inputs: _Inputs, plan: _Plan, raw: Array, index) -> Array:
    """Tokens `[r, z]` from head outputs `[r, p]`."""
    if lm.cfg.loss != "gmm":
        return raw
    mixture = GaussianMixture.from_params(
        raw,
        lm.cfg.num_mixtures,
        var_scale=inputs.var_scale,
        logits_temperature=inputs.logits_temperature,
    )
    if not plan.do_sample:
        return mixture.expected_value()
    return jax.vmap(GaussianMixture.sample)(mixture, _row_keys(inputs, plan, index))


def _row_keys(inputs: _Inputs, plan: _Plan, index) -> Array:
    """One key per row for this token; the prompt's own do not change when guidance comes in."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    assert inputs.keys is not None  # drawing needs them, as `generate` checks
    keys = fold(inputs.keys, inputs.first_index + index)
    if not plan.is_guided:
        return fold(keys, 0)
    return jnp.concatenate([fold(keys, 0), fold(keys, 0 if plan.share_draws else 1)])

"""Autoregressive generation of deep tokens: text in, keyframes of deep tokens out, of any length.

The prompt (text, `<img>`, keyframes that are already there) fills a cache in one call; one
`lax.scan` then feeds one position after another. Videos longer than the model's tables slide a
window: the text plus the last keyframes are the prompt of the next window.

Deviations from the reference, whose behaviour `parity=True` brings back: keyframes given as a
prefix are numbered 0 .. f-1 and what follows goes on at f, place 0 (the reference counts separators
as well and so marks new tokens wrongly); `cosine` models read and embed vectors as they were
trained. Guidance works with a prefix, and there is no largest length.

Letters: b batch, r rows (b, or 2b with guidance: prompts, then empty prompts), l text tokens, k
keyframes, n deep tokens per keyframe, z their width, d model width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.models.dicode import ar_losses
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.runtime.platform import platform
from dicode_jax.typing import Array, Float, Int, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What of a call decides the program: everything else is traced."""

    num_prefix: int
    num_new: int
    do_sample: bool
    is_guided: bool
    share_draws: bool
    parity: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
    text_ids: Array
    prefix: Array | None
    keys: Array | None
    first_index: Array  # number, in the whole video, of the first token drawn here
    var_scale: Array
    logits_temperature: Array
    guidance_scale: Array


@typechecked
def generate(
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
) -> Float[Array, "b k n z"]:
    """Generates keyframes of deep tokens for prompts, or continues given keyframes.

    A call is one compiled program; calls with the same shapes and switches share it, and the scales
    may change without compiling again. The call itself can be traced by an outer `jit`.

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
      parity: Reproduce the reference's numbering after a prefix and its treatment of `cosine`.

    Returns:
      The new keyframes.

    Raises:
      ValueError: Something does not fit; the message says what to change.
    """
    cfg, b = lm.cfg, text_ids.shape[0]
    num_prefix = 0 if prefix is None else prefix.shape[1]
    _check_call(lm, num_keyframes, keys, do_sample, prefix, b)
    _check_scales(var_scale, logits_temperature, guidance_scale)
    spans = _windows(lm, text_ids.shape[1], num_prefix, num_keyframes, window, overlap, parity)
    is_guided = isinstance(guidance_scale, jax.Array) or guidance_scale > 1
    if is_guided:
        if uncond_ids is None:
            uncond_ids = jnp.full((text_ids.shape[1],), cfg.pad_token_id, text_ids.dtype)
        text_ids = jnp.concatenate([text_ids, jnp.broadcast_to(uncond_ids, text_ids.shape)])
    elif b == 1 and platform() == "gpu":
        # XLA multiplies one row by a matrix without cuBLAS and with more bytes: two are cheaper.
        text_ids = jnp.repeat(text_ids, 2, axis=0)
        keys = None if keys is None else jnp.repeat(keys, 2, axis=0)
        prefix = None if prefix is None else jnp.repeat(prefix, 2, axis=0)
    plans = [
        _Plan(
            num_prefix=seen,
            num_new=new,
            do_sample=do_sample and cfg.loss == "gmm",
            is_guided=is_guided,
            share_draws=share_guidance_draws,
            parity=parity,
        )
        for seen, new in spans
    ]
    inputs = _Inputs(
        text_ids=text_ids,
        prefix=prefix,
        keys=keys,
        first_index=jnp.asarray(num_prefix * cfg.num_tokens, jnp.int32),
        var_scale=jnp.asarray(var_scale, jnp.float32),
        logits_temperature=jnp.asarray(logits_temperature, jnp.float32),
        guidance_scale=jnp.asarray(guidance_scale, jnp.float32),
    )
    tokens = _generate(*nnx.split(lm), inputs, tuple(plans))
    # The last window may reach further than asked, so that all windows share one program.
    return tokens[:b, :num_keyframes]


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
        ("logits_temperature", logits_temperature, 1e-6),
        ("guidance_scale", guidance_scale, 1.0),
    ):
        if not isinstance(value, jax.Array) and not least <= value < float("inf"):
            raise ValueError(f"{name} must be at least {least:g} and finite, got {value:g}")


def _windows(
    lm, text_length, num_prefix, num_new, window, overlap, parity
) -> list[tuple[int, int]]:
    """`(keyframes seen before, keyframes generated)` of each window."""
    if parity:
        # The reference's wrong numbers run ahead of the keyframes; it knows no window.
        places = _places(lm.cfg.num_tokens, num_prefix, num_new, parity=True)
        positions = text_length + 1 + num_prefix * (lm.cfg.num_tokens + 1) + len(places.feeds)
        last = max(places.frame, default=0)
        if last >= lm.cfg.max_keyframes or positions > lm.body.max_seq_len:
            raise ValueError(
                f"with parity=True {num_prefix} + {num_new} keyframes reach keyframe number {last} "
                f"and {positions} positions; the model has {lm.cfg.max_keyframes} and "
                f"{lm.body.max_seq_len}"
            )
        return [(num_prefix, num_new)]
    most = keyframes_in_sight(lm, text_length)
    window = most if window is None else window
    if not 1 <= window <= most:
        raise ValueError(
            f"a window of {window} keyframes is impossible: 1 to {most} fit behind a text of "
            f"{text_length} tokens"
        )
    if num_prefix + num_new <= window:
        return [(num_prefix, num_new)]
    overlap = max(1, window // 2) if overlap is None else overlap
    if not 1 <= overlap < window:
        raise ValueError(
            f"{num_prefix + num_new} keyframes do not fit in a window of {window}, so an overlap "
            f"of 1 to {window - 1} is needed, got {overlap}"
        )
    spans = []
    if num_prefix < window and num_prefix != overlap:
        spans.append((num_prefix, window - num_prefix))
    while sum(new for _, new in spans) < num_new:
        spans.append((overlap, window - overlap))
    return spans


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


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(graph, state, inputs: _Inputs, plans: tuple[_Plan, ...]):
    """All windows in one program: the first ones, then a scan over those that are alike."""
    lm: DiCoDeLM = nnx.merge(graph, state)
    n, last = lm.cfg.num_tokens, plans[-1]
    known, parts, index = inputs.prefix, [], inputs.first_index
    if len(plans) == 1:
        cut = None if known is None else known[:, known.shape[1] - last.num_prefix :]
        return _generate_window(lm, dataclasses.replace(inputs, prefix=cut), last)
    if plans[0] != last:
        tokens = _generate_window(lm, inputs, plans[0])
        known = tokens if known is None else jnp.concatenate([known, tokens], axis=1)
        parts, index = [tokens], index + plans[0].num_new * n

    assert known is not None  # the prefix, or what has just been generated

    def step(carry, _):
        known, index = carry
        now = dataclasses.replace(inputs, prefix=known, first_index=index)
        tokens = _generate_window(lm, now, last)
        known = jnp.concatenate([known, tokens], axis=1)[:, -last.num_prefix :]
        return (known, index + last.num_new * n), tokens

    carry = (known[:, -last.num_prefix :].astype(jnp.float32), index)
    _, tokens = jax.lax.scan(step, carry, None, length=len(plans) - len(parts))
    parts.append(rearrange(tokens, "windows b k n z -> b (windows k) n z"))
    return jnp.concatenate(parts, axis=1)


def _generate_window(lm: DiCoDeLM, inputs: _Inputs, plan: _Plan) -> Array:
    """New keyframes of one window: prefill, then one scan."""
    places = _places(lm.cfg.num_tokens, plan.num_prefix, plan.num_new, plan.parity)
    prompt = _prompt(lm, inputs, plan)
    rows, size = prompt.shape[0], prompt.shape[1] + len(places.feeds)
    cache = lm.body.init_cache(batch=rows, size=size)
    hidden, cache = lm.body(prompt, cache=cache)
    predict = functools.partial(_predict, lm, inputs, plan)
    image = lm.image_embed(prompt.dtype)
    first = predict(hidden[:, -1], 0)

    def step(carry, item):
        cache, x = carry
        feeds, frame, place, predicts = item
        embed = lm.input_mlp(x) if plan.parity else lm.embed_deep_tokens(x)
        embed = embed + lm.frame_embed[...][frame] + lm.place_embed[...][place]
        embed = jnp.where(feeds < 0, image, embed[:, None].astype(prompt.dtype))
        hidden, cache = lm.body(embed, cache=cache)
        tokens = predict(hidden[:, -1], jnp.maximum(predicts, 0))
        return (cache, tokens), tokens

    items = tuple(map(jnp.asarray, dataclasses.astuple(places)))
    _, rest = jax.lax.scan(step, (cache, first), items)
    emitted = np.flatnonzero(places.predicts >= 0)
    tokens = jnp.concatenate([first[None], rest[emitted]])
    tokens = tokens[:, : rows // 2] if plan.is_guided else tokens
    return lm.denormalize(rearrange(tokens, "(k n) b z -> b k n z", k=plan.num_new))


def _prompt(lm: DiCoDeLM, inputs: _Inputs, plan: _Plan) -> Array:
    """Embeddings of text and `<img>` and the given keyframes behind them."""
    text = lm.body.embed_tokens(inputs.text_ids)
    r, _, d = text.shape
    image = lm.image_embed(text.dtype)
    text = jnp.concatenate([text, jnp.broadcast_to(image, (r, 1, d))], axis=1)
    if inputs.prefix is None:
        return text
    frames = lm.embed_deep_tokens(lm.normalize(inputs.prefix)) + lm.positions_of(plan.num_prefix)
    separators = jnp.broadcast_to(image, (*frames.shape[:2], 1, d))
    frames = jnp.concatenate([frames.astype(text.dtype), separators], axis=2)
    if plan.is_guided:
        frames = jnp.concatenate([frames, frames])
    return jnp.concatenate([text, rearrange(frames, "b k n d -> b (k n) d")], axis=1)


def _predict(lm: DiCoDeLM, inputs: _Inputs, plan: _Plan, hidden: Array, index) -> Array:
    """Token number `index` of this window from the hidden state before it, `[r, d]` to `[r, z]`."""
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

"""The language model from inside: a loss by explicit masks, and what goes through a generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.distributions.gaussian_mixture import GaussianMixture
from dicode_jax.models.dicode import ar_losses, generate
from dicode_jax.nn.masks import causal_mask, key_mask


def explicit_loss(
    lm, input_ids, deep_tokens, *, token_mask, frame_mask=None, attention_mask=None, positions=None
):
    """Loss on any layout, as the original's training forward takes it; and the sequence.

    A row has `n` slots in `token_mask` for each of its valid keyframes. These may be any of
    `frame_mask` [b, k], and come first in the result.
    """
    b, k = deep_tokens.shape[:2]
    valid = jnp.ones((b, k), bool) if frame_mask is None else frame_mask
    first = jnp.argsort(~valid, axis=1, stable=True)
    valid = jnp.take_along_axis(valid, first, axis=1)
    sequence = lm.sequence(
        input_ids,
        jnp.take_along_axis(deep_tokens, first[..., None, None], axis=1),
        token_mask=token_mask,
        frame_numbers=jnp.broadcast_to(jnp.arange(k), (b, k)),
    )
    mask = None
    if attention_mask is not None:
        mask = causal_mask(input_ids.shape[1]) & key_mask(attention_mask)
    hidden, _ = lm.body(sequence.embeds, positions, mask)
    return lm._judge(lm.read(hidden, sequence), sequence.targets, valid), sequence


@dataclasses.dataclass(frozen=True)
class Seen:
    """What went through the body, rows as in `generate`.

    Attributes:
      text_embeds: Embeddings of text and `<img>`, [r, l+1, d].
      fed_embeds: Everything given to the body, in order, without positions, [r, t, d].
      hidden: The hidden state that each token was predicted from, [r, tokens, d].
      head_out: The head's output for each token, [r, tokens, p].
    """

    text_embeds: np.ndarray
    fed_embeds: np.ndarray
    hidden: np.ndarray
    head_out: np.ndarray


class Log:
    """A list that can be part of a module's static structure."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arrays):
        self.calls.append([np.asarray(array) for array in arrays])


class Recorder(nnx.Module):
    """A body that tells a log what goes in and what comes out."""

    def __init__(self, body, log):
        self.body, self.log = body, log
        self.embed_tokens, self.init_cache = body.embed_tokens, body.init_cache
        self.embed_dim, self.max_seq_len = body.embed_dim, body.max_seq_len

    def __call__(self, embeds, *args, **kwargs):
        hidden, cache = self.body(embeds, *args, **kwargs)
        jax.debug.callback(self.log, embeds, hidden[:, -1], ordered=True)
        return hidden, cache


def _draw_given(u, noise, lm, inputs, plan, raw, index):
    """In place of `generate._draw`: the given uniform and normal numbers of each token."""
    mixture = GaussianMixture.from_params(raw, lm.cfg.num_mixtures, var_scale=inputs.var_scale)
    return mixture.sample_with(mixture.component_of(u[index]), noise[index])


def observed(lm, text_ids, *, num_keyframes, u=None, noise=None, prefix=None, **options):
    """`generate` in one window, and what it went through.

    Args:
      u: Uniform numbers that pick components, [tokens, r], in place of keys.
      noise: Standard normal numbers [tokens, r, z], with `u`.
    """
    log, inside = Log(), nnx.merge(*nnx.split(lm))
    inside.body = Recorder(inside.body, log)  # another structure: nothing compiled is shared
    options |= {"num_keyframes": num_keyframes, "prefix": prefix}
    with pytest.MonkeyPatch.context() as patch:
        if noise is not None:
            patch.setattr(generate, "_draw", functools.partial(_draw_given, u, noise))
            options["keys"] = jax.random.split(jax.random.key(0), len(text_ids))
        tokens = generate.generate(inside, text_ids, **options)
        jax.effects_barrier()
    parity, given = options.get("parity", False), 0 if prefix is None else prefix.shape[1]
    places = generate._places(lm.cfg.num_tokens, given, num_keyframes, parity)
    fed, last = (list(arrays) for arrays in zip(*log.calls, strict=True))
    assert len(last) == 1 + len(places.predicts)
    hidden = np.stack([last[0], *(h for h, p in zip(last[1:], places.predicts) if p >= 0)], axis=1)
    is_scaled = lm.cfg.loss == "cosine" and parity
    head_in = ar_losses.normalize(jnp.asarray(hidden)) if is_scaled else jnp.asarray(hidden)
    fed = np.concatenate(fed, axis=1)
    text = fed[:, : text_ids.shape[1] + 1]
    return tokens, Seen(text, fed, hidden, np.asarray(lm.output_mlp(head_in)))

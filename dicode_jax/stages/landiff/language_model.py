"""Training of LanDiff's language model (arXiv 2503.04606): the next token of whole sequences.

The release has the layout and which tokens count, but neither loss nor training: cross-entropy of
the next token is the standard reading. A text encoder may learn with the model, and is kept for the
denoiser then; the release reads a frozen flan-T5.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.data.sources.open import kind_of
from dicode_jax.errors import Faults, UserError
from dicode_jax.models.landiff.language_model import LanguageModel, LanguageModelConfig
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.nn.masks import causal_mask, segment_mask
from dicode_jax.nn.rngs import draw, row_keys
from dicode_jax.stages import parts
from dicode_jax.stages.landiff.cached import part_folder
from dicode_jax.stages.landiff.generation_config import LMTrainConfig
from dicode_jax.stages.landiff.sequences import batch_shapes
from dicode_jax.storage import weights
from dicode_jax.text.t5 import T5Tokenizer, learn_words
from dicode_jax.training.stage import WEIGHT, Path, Stage
from dicode_jax.typing import Array, Float

LANGUAGE_MODEL, TEXT_ENCODER = "language_model", "text_encoder"  # as a pipeline calls them


class Writer(nnx.Module):
    """The language model, and the text encoder that learns with it, or None."""

    def __init__(self, config: LMTrainConfig, *, rngs: nnx.Rngs):
        dtype = parts.compute_dtype(config)
        self.lm = LanguageModel(config.model, dtype=dtype, rngs=rngs)
        self.text = config.text and T5Encoder(config.text, dtype=dtype, rngs=rngs)


def settle(
    config: LMTrainConfig, workdir: pathlib.Path | None = None, faults: Faults | None = None
) -> LMTrainConfig:
    """The config with what it leaves to its data: `data.kind`, and sizes of the vocabulary.

    Raises:
      UserError: The data are no cache, or there is no such vocabulary; all that is wrong is told.
    """
    del workdir
    known, faults = faults or Faults(), Faults()
    with faults.gather():
        if kind_of(config.data) != "cache":
            raise UserError(
                f"{config.data.path} is no cache: the language model learns codes, which "
                "train.encode makes of videos"
            )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, kind="cache"))
    with faults.gather():
        if config.text is not None and (words := read_words(config)) is not None:
            size = max(config.text.vocab_size, words.vocab_size)
            config = dataclasses.replace(
                config, text=dataclasses.replace(config.text, vocab_size=size)
            )
    faults.lines += known.lines
    faults.tell()
    return config


def read_words(config: LMTrainConfig) -> T5Tokenizer | None:
    """The vocabulary of the text encoder that learns; None where a frozen one has read.

    Raises:
      UserError: There is none.
    """
    if config.text is None:
        return None
    if config.words is not None:
        return T5Tokenizer.from_file(config.words)
    if config.init is not None:
        return T5Tokenizer.from_file(part_folder(config.init, TEXT_ENCODER))
    return learn_words(all_captions())


def make_stage(config: LMTrainConfig) -> Stage:
    """Batches are rows as `sequences.lay_row` describes them."""
    shapes = batch_shapes(config)
    return Stage(
        name="landiff_lm",
        config=config,
        create=lambda rngs: Writer(config, rngs=rngs),
        load=functools.partial(load, config),
        is_trained=lambda path, _: True,
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=lambda b: {
            name: jax.ShapeDtypeStruct((b, *shape), dtype)
            for name, (shape, dtype) in shapes.items()
        },
        export=functools.partial(export, config),
    )


def load(config: LMTrainConfig) -> dict[Path, Array]:
    """What `init` names; it may have read another number of tokens a frame.

    Raises:
      UserError: There is none, or it is of other sizes than the config's.
    """
    if config.init is None:
        return {}
    folder = part_folder(config.init, LANGUAGE_MODEL)
    lm, stored = weights.load_module(folder, LanguageModel, LanguageModelConfig, on_host=True)
    _check_same(folder, stored, config.model)
    loaded = parts.leaves(lm, "lm")
    if config.text is not None:
        folder = part_folder(config.init, TEXT_ENCODER)
        text, stored = weights.load_module(folder, T5Encoder, T5EncoderConfig, on_host=True)
        _check_same(folder, stored, config.text)
        loaded |= parts.leaves(text, "text")
    return loaded


def _check_same(folder, stored, wanted) -> None:
    how = {"remat": False}  # what changes no array
    if isinstance(wanted, LanguageModelConfig):
        stored, wanted = (
            dataclasses.replace(
                cfg, body=dataclasses.replace(cfg.body, **how), frames=wanted.frames
            )
            for cfg in (stored, wanted)
        )
    else:
        stored, wanted = (dataclasses.replace(cfg, **how) for cfg in (stored, wanted))
    if stored != wanted:
        raise UserError(f"{folder} holds a model of other sizes than the config's")


def embed(
    config: LMTrainConfig, model: Writer, batch, keys: Array, *, deterministic: bool = False
) -> Float[Array, "b t d"]:
    """What goes into the body: tokens, and where no token stands numbers and text."""
    lm, (b, s, _) = model.lm, batch["text_valid"].shape
    text = rearrange(batch["text"], "b s l ... -> (b s) l ...")
    if model.text is not None:
        valid = rearrange(batch["text_valid"], "b s l -> (b s) l")
        text = model.text(model.text.embed_tokens(text), valid)
    dropped = None
    if config.text_dropout and not deterministic:
        dropped = draw(jax.random.uniform, keys, (b, s)).reshape(-1) < config.text_dropout
    of_text = lm.embed_text(text.astype(lm.dtype or jnp.float32), dropped)
    of_numbers = lm.embed_numbers(*rearrange(batch["numbers"], "b s n -> n (b s)"))
    features = jnp.concatenate(
        [x.reshape(b, -1, x.shape[-1]).astype(jnp.float32) for x in (of_numbers, of_text)], axis=1
    )
    at, tokens = batch["features"], batch["tokens"]
    known = lm.body.embed_tokens(jnp.maximum(tokens, 0))
    other = jnp.take_along_axis(features, jnp.maximum(at, 0)[..., None], axis=1)
    return jnp.where(at[..., None] < 0, known, other.astype(known.dtype))


def loss_fn(
    config: LMTrainConfig, model: Writer, batch, keys: Array, *, deterministic: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the tokens that are learned, in nats; their number is the weight.

    `iframe` and `pframe` are that of the codes of I and P frames, `accuracy` the share of codes
    that are the likeliest.

    Args:
      deterministic: Drop no text.
    """
    x = embed(
        config, model, batch, row_keys(keys, len(batch["tokens"])), deterministic=deterministic
    )
    positions = mask = None
    if config.row_samples > 1:
        positions = batch["positions"]
        mask = causal_mask(x.shape[1]) & segment_mask(batch["segment_ids"])
    body, cfg = model.lm.body, config.model
    logits = body.logits(body(x, positions, mask)[0][:, :-1]).astype(jnp.float32)
    tokens, is_learned = batch["tokens"], batch["is_learned"][:, 1:]
    target = jnp.maximum(tokens[:, 1:], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    inside = [(tokens == cfg.mark(f"{edge}_iframe")).cumsum(1) for edge in ("start", "end")]
    in_iframe, is_code = (inside[0] > inside[1])[:, 1:], is_learned & (target < cfg.codebook_size)

    def mean(values: Array, where: Array) -> Array:
        return jnp.sum(values, where=where) / jnp.maximum(where.sum(), 1)

    return mean(losses, is_learned), {
        "iframe": mean(losses, is_code & in_iframe),
        "pframe": mean(losses, is_code & ~in_iframe),
        "accuracy": mean((logits.argmax(-1) == target).astype(jnp.float32), is_code),
        WEIGHT: is_learned.sum().astype(jnp.float32),
    }


def export(config: LMTrainConfig, model: Writer, folder: pathlib.Path) -> None:
    """Writes `language_model`, and `text_encoder` with its words where one has learned."""
    weights.save_module(folder / LANGUAGE_MODEL, model.lm, config.model)
    if model.text is None or (words := read_words(config)) is None:
        return
    weights.save_module(folder / TEXT_ENCODER, model.text, config.text)
    words.save(folder / TEXT_ENCODER)

"""Training of the language model (paper, section 3.3): from a caption, deep token after token."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.causal_lm import BodyConfig, build_body, compare_bodies
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import (
    ClipDecoder,
    ClipDecoderConfig,
    decode_clip,
    decode_latents,
    to_uint8,
)
from dicode_jax.models.dicode.generate import generate
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.causal_body import CausalBody
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.nn.rngs import draw, row_keys, split, stream
from dicode_jax.stages import parts
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.storage import weights
from dicode_jax.text.gpt import TextTokenizer, train_small
from dicode_jax.training.stage import WEIGHT, Path, Stage
from dicode_jax.typing import Array, Float, Int, UInt8


class Reader(nnx.Module):
    """The trained language model, and the frozen tokenizer that makes its targets of keyframes."""

    def __init__(
        self, lm: DiCoDeLMConfig, tokenizer: DeepTokenizerConfig | None, *, dtype=None, rngs
    ):
        self.lm = DiCoDeLM(lm, dtype=dtype, rngs=rngs)
        self.tokenizer = (
            None if tokenizer is None else DeepTokenizer(tokenizer, dtype=dtype, rngs=rngs)
        )


def make_stage(config: ARTrainConfig) -> Stage:
    """Trains the language model.

    Batches hold `text_ids` int32 [b, l], `frame_mask` bool [b, k], and `keyframes` uint8
    [b, k, h, w, 3], or `tokens` [b, k, n, z] where they were encoded before. Packed batches are
    those of `packing.pack_row`.

    Raises:
      UserError: There is no tokenizer to read keyframes with, or it gives other tokens than the
        model's.
    """
    tokenizer = None
    if not config.reads_tokens:
        tokenizer = tokenizer_config(config)

    def load():
        arrays = {}
        if tokenizer is not None:
            arrays |= parts.leaves(load_tokenizer(config), "tokenizer")
        if config.init is not None:
            earlier = load_lm(config.init, config.model)
            arrays |= parts.leaves(earlier, "lm")
        elif config.body_init is not None:
            arrays |= parts.leaves(load_body(config.body_init, config.model.body), "lm", "body")
        return arrays

    dtype = parts.compute_dtype(config)
    return Stage(
        name="ar",
        config=config,
        create=lambda rngs: Reader(config.model, tokenizer, dtype=dtype, rngs=rngs),
        load=load,
        is_trained=is_trained,
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=functools.partial(batch_shapes, config),
        export=functools.partial(export, config),
    )


def is_trained(path: Path, _) -> bool:
    """All of the language model, nothing of the tokenizer."""
    return path[0] == "lm"


def read_text(config: ARTrainConfig) -> TextTokenizer:
    """The text tokenizer that a run names; the synthetic world's own when it names none."""
    if config.text_tokenizer is not None:
        return TextTokenizer.from_file(config.text_tokenizer)
    return train_small(all_captions())


def load_text(config: ARTrainConfig) -> TextTokenizer:
    """The text tokenizer of a run.

    Raises:
      UserError: Its ids are not those that the model's config names (`reading.settle` puts them
        there).
    """
    text = read_text(config)
    if text.vocab_size > config.model.body.vocab_size:
        raise UserError(
            f"the text tokenizer has {text.vocab_size} ids, the model's vocabulary "
            f"{config.model.body.vocab_size}"
        )
    ids = (text.pad_id, text.image_start_id)
    wanted = (config.model.pad_token_id, config.model.image_token_id)
    if ids != wanted:
        raise UserError(
            f"the text tokenizer in {config.text_tokenizer or 'the package'} pads with id {ids[0]} "
            f"and has <img> at {ids[1]}, the model's config says {wanted[0]} and {wanted[1]}"
        )
    return text


def tokenizer_config(config: ARTrainConfig) -> DeepTokenizerConfig:
    """The config of the tokenizer in `config.tokenizer`.

    Raises:
      UserError: There is none, or its tokens are not those that the model reads.
    """
    folder = config.tokenizer_folder / "tokenizer"
    tokenizer = parts.stored_config(folder, DeepTokenizerConfig)
    given = (tokenizer.num_tokens, tokenizer.token_dim)
    wanted = (config.model.num_tokens, config.model.token_dim)
    if given != wanted:
        raise UserError(
            f"the tokenizer in {folder} makes {given[0]} tokens of width {given[1]} per keyframe, "
            f"the model's config says {wanted[0]} of width {wanted[1]}"
        )
    return tokenizer


def load_tokenizer(config: ARTrainConfig) -> DeepTokenizer:
    """The frozen tokenizer, in host memory."""
    folder = config.tokenizer_folder / "tokenizer"
    return weights.load_module(folder, DeepTokenizer, DeepTokenizerConfig, on_host=True)[0]


def load_lm(folder: str, wanted: DiCoDeLMConfig) -> DiCoDeLM:
    """The model of an earlier run, its layers kept as the config says.

    Raises:
      UserError: It has other sizes than the config's.
    """
    earlier, stored = weights.load_module(folder, DiCoDeLM, DiCoDeLMConfig, on_host=True)
    fault = compare_bodies(stored.body, wanted.body)
    if fault is None and dataclasses.replace(stored, body=wanted.body) != wanted:
        fault = "its tokens or its head"
    if fault is not None:
        raise UserError(f"{folder} holds a model of other sizes than --config's: {fault}")
    earlier.body = with_scan_layers(earlier.body, wanted.body.scan_layers)
    return earlier


def load_body(folder: str, wanted: BodyConfig) -> CausalBody:
    """A body to start from, its layers kept as the config says.

    Raises:
      UserError: It is another body than the config's.
    """
    body, stored = weights.load_module(folder, build_body, BodyConfig, on_host=True)
    if (fault := compare_bodies(stored, wanted)) is not None:
        raise UserError(f"{folder} holds another body than --config's: {fault}")
    return with_scan_layers(body, wanted.scan_layers)


def batch_shapes(config: ARTrainConfig, b: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batches that `make_stage` describes."""
    arrays: dict[str, tuple[tuple[int, ...], Any]]
    n, z = config.model.num_tokens, config.model.token_dim
    token_dtype = jnp.bfloat16 if config.data.kind == "cache" else jnp.float16
    if config.packed:
        t, f = config.packed_length, config.packed_keyframes
        arrays = dict.fromkeys(("input_ids", "segment_ids", "positions"), ((b, t), jnp.int32))
        arrays["token_mask"] = ((b, t), jnp.bool_)
        arrays["tokens"] = ((b, f, n, z), token_dtype)
        arrays["frame_segments"] = ((b, f), jnp.int32)
    else:
        k = config.num_keyframes
        arrays = {"text_ids": ((b, config.text_length), jnp.int32), "frame_mask": ((b, k), bool)}
        if config.reads_tokens:
            arrays["tokens"] = ((b, k, n, z), token_dtype)
        else:
            arrays["keyframes"] = (parts.image_shape(config, b, k), jnp.uint8)
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}


def loss_fn(
    config: ARTrainConfig, model: Reader, batch, keys: Array, *, deterministic: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Loss of the deep tokens of every keyframe, given the caption and the tokens before.

    It is a mean over the valid tokens, whose number is the weight (over videos with
    `balance_samples`). The input noise of a row is relative to that row's own tokens.
    `deterministic` switches dropout and input noise off.
    """
    if "tokens" in batch:
        tokens = batch["tokens"].astype(jnp.float32)
    else:
        assert model.tokenizer is not None  # made where batches hold keyframes
        tokens = model.tokenizer(to_float(batch["keyframes"])).astype(jnp.float32)
    tokens = jax.lax.stop_gradient(tokens)
    noise_keys, dropout_keys = split(row_keys(keys, len(tokens)), 2)
    inputs = None
    if config.input_noise and not deterministic:
        valid = batch["frame_segments"] > 0 if config.packed else batch["frame_mask"]
        std = jnp.std(tokens, axis=(1, 2, 3), keepdims=True, where=valid[..., None, None])
        scale = config.input_noise * jnp.nan_to_num(std)  # a row may hold no token
        inputs = tokens + scale * draw(jax.random.normal, noise_keys, tokens.shape)
    options = {
        "inputs": inputs,
        "deterministic": deterministic,
        "rngs": nnx.Rngs(dropout=dropout_keys),
    }
    if "segment_ids" in batch:
        out = model.lm.packed_loss(**{**batch, "tokens": tokens}, **options)
    else:
        out = model.lm.loss(batch["text_ids"], tokens, frame_mask=batch["frame_mask"], **options)
    return out.loss, {WEIGHT: out.weight}


def encode(
    tokenizer: DeepTokenizer, keyframes: UInt8[Array, "b k h w 3"]
) -> Float[Array, "b k n z"]:
    """Deep tokens of keyframes."""
    return tokenizer(to_float(keyframes))


def load_decoder(config: ARTrainConfig) -> ClipDecoder | None:
    """What paints sample sheets: the decoder beside the tokenizer, None when there is none."""
    if config.tokenizer is None or not (folder := config.tokenizer_folder / "decoder").is_dir():
        return None
    decoder, _ = weights.load_module(folder, ClipDecoder, ClipDecoderConfig, on_host=True)
    return parts.on_device(decoder)


def generate_tokens(
    config: ARTrainConfig, lm: DiCoDeLM, text_ids: Int[Array, "b l"]
) -> Float[Array, "b k n z"]:
    """Deep tokens of the first keyframes after each caption, with fixed noise."""
    k = min(max(config.num_keyframes, 2), 4, config.model.max_keyframes)
    keys = row_keys(stream(0, "tokens of the sheet"), len(text_ids))
    return generate(lm, text_ids, num_keyframes=k, keys=keys).astype(jnp.float32)


def show(
    config: ARTrainConfig, decoder: ClipDecoder, tokens: Float[Array, "b k n z"]
) -> UInt8[Array, "b f h w 3"]:
    """Keyframes as the latent head sees them; without one, the clip between the first two."""
    if decoder.cfg.latent_head is not None:
        latents = decoder.latent_images(tokens)
    else:
        sampling = SamplingConfig(
            num_frames=decoder.cfg.unet.temporal_length or config.data.num_frames,
            num_inference_steps=25,
            guidance_scale=1.0,
            fs=decoder.cfg.unet.default_fs,
        )
        keys = row_keys(stream(0, "sheet"), len(tokens))
        latents = decode_clip(decoder, tokens[:, :2], keys, sampling)
    return to_uint8(decode_latents(decoder, latents))


def export(config: ARTrainConfig, model: Reader, folder: pathlib.Path) -> None:
    """Writes the language model and its text tokenizer."""
    weights.save_module(folder, model.lm, config.model)
    load_text(config).save(folder)

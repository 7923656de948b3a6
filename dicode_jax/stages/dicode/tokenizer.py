"""Video diffusion training of the tokenizer (paper, section 3.1): the UNet learns to paint clips.

Trained are the UNet and, without a ready representation, the resampler that makes deep tokens;
what of the UNet, `trainable` says.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.dicode.decoder import (
    ClipDecoder,
    ClipDecoderConfig,
    decode_clip,
    decode_latents,
    to_uint8,
)
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn import lora
from dicode_jax.nn.rngs import blank, row_keys, split, stream
from dicode_jax.stages import parts
from dicode_jax.stages.dicode import reading, tokenizer_loss
from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
from dicode_jax.stages.dicode.representation import load_representation
from dicode_jax.storage import weights
from dicode_jax.training.stage import Path, Stage
from dicode_jax.typing import Array, UInt8

PROJECTIONS = ("q", "k", "v", "k_image", "v_image", "out")  # of attention, for low-rank additions


class VideoTokenizer(nnx.Module):
    """Keyframes to deep tokens, and deep tokens to clips."""

    def __init__(
        self, tokenizer: DeepTokenizerConfig, decoder: ClipDecoderConfig, *, dtype=None, rngs
    ):
        self.tokenizer = DeepTokenizer(tokenizer, dtype=dtype, rngs=rngs)
        self.decoder = ClipDecoder(decoder, dtype=dtype, rngs=rngs)


def make_stage(config: TokenizerTrainConfig) -> Stage:
    """Trains the clip decoder, with the tokenizer or after it.

    Batches hold `fs` int32 [b], and `video` uint8 [b, f, h, w, 3]; or, with cached clips,
    `latents` [b, f, y, x, c] and the `tokens` [b, k, n, z] of a frozen tokenizer or the `keyframes`
    uint8 [b, k, h, w, 3] for one that learns.

    Raises:
      UserError: A folder that the config names is missing.
    """
    decoder = decoder_config(config)

    def create(rngs):
        dtype = parts.compute_dtype(config)
        model = VideoTokenizer(config.tokenizer, decoder, dtype=dtype, rngs=rngs)
        if config.representation is None and config.init is None:
            model.decoder.null_tokens[...] = model.tokenizer.null_tokens().astype(jnp.float32)
        if config.trainable.lora_rank:
            lora.add(
                model.decoder.unet,
                is_projection,
                rank=config.trainable.lora_rank,
                alpha=config.trainable.lora_alpha,
                rngs=rngs,
            )
        return model

    return Stage(
        name="tokenizer",
        config=config,
        create=create,
        load=functools.partial(load, config),
        is_trained=functools.partial(is_trained, config),
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=functools.partial(batch_shapes, config, decoder),
        export=functools.partial(export, config),
    )


def decoder_config(config: TokenizerTrainConfig) -> ClipDecoderConfig:
    """The decoder's config with the stored autoencoder's in it, which knows its latents' scale."""
    if config.init is not None:
        folder = pathlib.Path(config.init) / "decoder"
        autoencoder = parts.stored_config(folder, ClipDecoderConfig).autoencoder
    elif config.autoencoder is not None:
        autoencoder = parts.stored_config(config.autoencoder, AutoencoderKLConfig)
    else:
        return config.decoder
    return dataclasses.replace(config.decoder, autoencoder=autoencoder)


def is_projection(path: Path) -> bool:
    """Whether a module of the UNet projects to or from attention."""
    return path[-1] in PROJECTIONS and str(path[-2]).startswith("attention")


def is_trained(config: TokenizerTrainConfig, path: Path, _: Any) -> bool:
    """What `trainable` says; a ready representation keeps resampler and latent head."""
    if config.representation is not None and str(path[1]) != "unet":
        return False
    return config.trainable(path)


def load(config: TokenizerTrainConfig) -> dict[Path, Array]:
    """The parts of earlier runs or of converted weights.

    Raises:
      UserError: A part is missing, or of other sizes than the config's.
    """
    if config.init is not None:
        return load_start(config, pathlib.Path(config.init))
    arrays = {}
    if config.autoencoder is not None:
        autoencoder = parts.load_autoencoder(config.autoencoder)
        arrays |= parts.leaves(autoencoder, "decoder", "autoencoder")
    if config.representation is not None:
        ready = load_representation(config.representation)
        arrays |= parts.leaves(ready.tokenizer, "tokenizer")
        arrays["decoder", "null_tokens"] = nnx.jit(DeepTokenizer.null_tokens)(ready.tokenizer)
        if config.decoder.latent_head is not None:
            arrays |= parts.leaves(ready.head, "decoder", "latent_head")
        if config.decoder.token_path is not None:
            if ready.path is None:
                raise UserError(
                    f"{config.representation} has no path, decoder.token_path wants one"
                )
            arrays |= parts.leaves(ready.path, "decoder", "token_path")
    return arrays


def load_start(config: TokenizerTrainConfig, folder: pathlib.Path) -> dict[Path, Array]:
    """Tokenizer and decoder of `folder`, whose sizes must be the config's."""

    def load(name: str, kind: Callable[..., nnx.Module], cfg: Any) -> dict[Path, Array]:
        make = lambda _, **types: kind(cfg, **types)  # noqa: E731
        module, _ = weights.load_module(folder / name, make, type(cfg), on_host=True)
        return parts.leaves(module, name)

    decoder = load("decoder", ClipDecoder, decoder_config(config))
    return load("tokenizer", DeepTokenizer, config.tokenizer) | decoder


def batch_shapes(
    config: TokenizerTrainConfig, decoder: ClipDecoderConfig, b: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batches that `make_stage` describes."""
    f = config.data.num_frames
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {"fs": ((b,), jnp.int32)}
    if config.cached_clips:
        side = config.frame_size // decoder.autoencoder.downsampling
        arrays["latents"] = ((b, f, side, side, decoder.autoencoder.embed_dim), jnp.float16)
        if config.has_frozen_tokenizer:
            tokens = (b, 2, config.tokenizer.num_tokens, config.tokenizer.token_dim)
            arrays["tokens"] = (tokens, jnp.float16)
        else:
            arrays["keyframes"] = (parts.image_shape(config, b, 2), jnp.uint8)
    else:
        arrays["video"] = (parts.image_shape(config, b, f), jnp.uint8)
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}


def loss_fn(
    config: TokenizerTrainConfig,
    model: VideoTokenizer,
    batch,
    keys: Array,
    *,
    deterministic: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Denoising loss of cached latents, or of a video that is encoded here."""
    decoder = model.decoder
    b = batch["fs"].shape[0]
    draw_keys, dropout_keys = split(row_keys(keys, b), 2)
    if "latents" in batch:
        latents = batch["latents"].astype(jnp.float32)
        shape = latents.shape
    else:
        video = to_float(batch["video"])
        _, f, h, w, _ = video.shape
        step = decoder.cfg.autoencoder.downsampling
        shape = (b, f, h // step, w // step, decoder.cfg.autoencoder.embed_dim)
    draws = tokenizer_loss.sample_draws(
        draw_keys,
        shape,
        config.loss,
        num_timesteps=config.decoder.schedule.num_timesteps,
    )
    options = {
        "fs": batch["fs"],
        "rngs": nnx.Rngs(dropout=dropout_keys),
        # as the original, which runs a UNet that is not wholly trained in evaluation mode
        "deterministic": deterministic or not config.trainable.unet,
    }
    if "tokens" in batch:
        tokens = batch["tokens"].astype(jnp.float32)
        loss, metrics = tokenizer_loss.decoder_loss(
            decoder, latents, tokens, draws, config.loss, **options
        )
    elif "keyframes" in batch:
        keyframes = to_float(batch["keyframes"])
        loss, metrics = tokenizer_loss.keyframe_loss(
            model.tokenizer, decoder, latents, keyframes, draws, config.loss, **options
        )
    else:
        loss, metrics = tokenizer_loss.tokenizer_loss(
            model.tokenizer, decoder, video, draws, config.loss, **options
        )
    names = ("loss_simple", "latent_std")
    return loss, {name: metrics[name] for name in names}


class Encoder(nnx.Module):
    """The frozen parts that cached clips are made with; no tokenizer where it learns."""

    def __init__(self, autoencoder: AutoencoderKL, tokenizer: DeepTokenizer | None):
        self.autoencoder, self.tokenizer = autoencoder, tokenizer


def load_encoder(config: TokenizerTrainConfig) -> Encoder:
    """The parts as they were stored, on the default device.

    Raises:
      UserError: A part is missing, or of other sizes than the config's.
    """
    arrays = load(config)

    def part(module: Any, *prefix: str) -> Any:
        graph, abstract = nnx.split(module)
        flat = nnx.to_flat_state(abstract)
        leaves = [(p, v.replace(jnp.asarray(arrays[(*prefix, *p)]))) for p, v in flat]
        return nnx.merge(graph, nnx.from_flat_state(leaves))

    shapes = blank(VideoTokenizer, config.tokenizer, decoder_config(config))
    tokenizer = part(shapes.tokenizer, "tokenizer") if config.has_frozen_tokenizer else None
    return Encoder(part(shapes.decoder.autoencoder, "decoder", "autoencoder"), tokenizer)


def encoder_folders(config: TokenizerTrainConfig) -> list[pathlib.Path]:
    """Where the modules lie that `load_encoder` takes the parts from."""
    if config.init is None:
        folders = (config.autoencoder, config.representation)
        return [pathlib.Path(folder) for folder in folders if folder is not None]
    names = ("decoder", "tokenizer") if config.has_frozen_tokenizer else ("decoder",)
    return [pathlib.Path(config.init) / name for name in names]


def encode(
    config: TokenizerTrainConfig, encoder: Encoder, video: UInt8[Array, "b f h w 3"]
) -> dict[str, Array]:
    """What cached clips hold for each clip: scaled latents, and deep tokens or keyframes."""
    keyframes = tokenizer_loss.select_keyframes(video)
    latents = encoder.autoencoder.encode_latents(to_float(video), per_frame=True)
    if encoder.tokenizer is None:
        return {"latents": latents, "keyframes": keyframes}
    return {"latents": latents, "tokens": encoder.tokenizer(to_float(keyframes))}


def reconstruct(
    config: TokenizerTrainConfig, model: VideoTokenizer, video: UInt8[Array, "b f h w 3"]
) -> UInt8[Array, "b f h w 3"]:
    """Clips through their keyframes' deep tokens and back, with fixed noise."""
    sampling = SamplingConfig(
        num_frames=video.shape[1],
        num_inference_steps=config.sample_steps,
        guidance_scale=config.sample_guidance,
        fs=config.decoder.unet.default_fs if config.fs is None else config.fs,
        batch_guidance=True,
    )
    keyframes = tokenizer_loss.select_keyframes(video)
    keys = row_keys(stream(0, "sheet"), video.shape[0])
    latents = decode_clip(model.decoder, model.tokenizer(to_float(keyframes)), keys, sampling)
    return to_uint8(decode_latents(model.decoder, latents))


def export(config: TokenizerTrainConfig, model: VideoTokenizer, folder: pathlib.Path) -> None:
    """Writes `tokenizer` and `decoder`, with low-rank additions folded and null tokens anew."""
    lora.fold(model.decoder.unet)
    if not config.has_frozen_tokenizer:
        null_tokens = nnx.jit(DeepTokenizer.null_tokens)(model.tokenizer)
        model.decoder.null_tokens.set_value(null_tokens.astype(jnp.float32))
    tokenizer = reading.as_read(config, config.tokenizer)
    weights.save_module(folder / "tokenizer", model.tokenizer, tokenizer)
    weights.save_module(folder / "decoder", model.decoder, model.decoder.cfg)

"""What `train.encode` makes of videos for LanDiff: codes, latents, motion, features and text."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.data.encoded_cache import Spec
from dicode_jax.data.windows import BeginningReader
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.landiff.features import (
    STRIDE,
    encoder_config,
    features_of,
    grid_of,
    load_encoder,
)
from dicode_jax.models.landiff.motion import frame_motion
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.stages import parts
from dicode_jax.stages.landiff.config import EncodeConfig
from dicode_jax.stages.landiff.semantic_tokenizer import tokenizer_folder
from dicode_jax.storage import weights
from dicode_jax.training.evaluate import jit_local
from train import landiff_text

STEP = 8  # videos have a multiple of it and one more, so that their latents can be decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoEncoder:
    """Frozen modules that make several arrays of a whole video; see `train.encode`.

    Attributes:
      config: Settled.
      digest: Tells these modules from others.
      schema: Types and shapes of the arrays.
      read: Frames and times of a record.
      settings: What decides on the arrays besides data, frame size and seed.
      load: Gives what makes arrays of frames uint8 [f, h, w, 3] and captions.
    """

    config: Any
    digest: str
    schema: Mapping[str, Spec]
    read: Callable[..., Mapping[str, np.ndarray]]
    settings: Mapping[str, Any]
    load: Callable[[], Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]]


class _Modules(nnx.Module):
    """All that looks at a video."""

    def __init__(self, config: EncodeConfig, folders: Mapping[str, pathlib.Path]):
        options = {"dtype": parts.compute_dtype(config), "on_host": True}
        self.encoder = load_encoder(folders["features"], **options)
        load = functools.partial(weights.load_module, **options)
        self.tokenizer = load(folders["tokenizer"], SemanticTokenizer, SemanticTokenizerConfig)[0]
        kind = AutoencoderCausal3D, AutoencoderCausal3DConfig
        self.vae = load(folders["vae"], *kind)[0] if "vae" in folders else None
        self.in_chunks = config.vae_in_chunks


def find(config: EncodeConfig) -> VideoEncoder:
    """The encoder that a config describes.

    Raises:
      UserError: It names no tokenizer, or parts that do not fit each other.
    """
    if config.tokenizer is None:
        raise UserError("name the `model` folder of a run of train.landiff_tokenizer: --tokenizer")
    folder, data = pathlib.Path(config.tokenizer), config.data
    folders = {"tokenizer": tokenizer_folder(folder), "features": folder / "features"}
    sizes = parts.stored_config(folders["tokenizer"], SemanticTokenizerConfig)
    of_encoder = encoder_config(folders["features"])
    grid, (height, width) = grid_of(of_encoder, config.frame_shape), config.frame_shape
    if (*grid, of_encoder.embed_dim) != (*sizes.grid, sizes.feature_dim):
        raise UserError(
            f"the tokenizer in {folder} takes {sizes.grid[0]} x {sizes.grid[1]} features of "
            f"{sizes.feature_dim} numbers; of frames of {height} x {width} pixels its encoder "
            f"gives {grid[0]} x {grid[1]} of {of_encoder.embed_dim}: take another --frame-size "
            "or --frame-width"
        )
    if sizes.codebook_size > np.iinfo(np.int16).max + 1:
        raise UserError(f"codes are kept in 16 bits, {folder} has {sizes.codebook_size} of them")
    schema = {"codes": Spec("int16", (None,)), "motion": Spec("float32", (None,))}
    if config.vae is not None:
        vae = parts.stored_config(config.vae, AutoencoderCausal3DConfig)
        if vae.time_factor != STRIDE or height % vae.downsampling or width % vae.downsampling:
            raise UserError(
                f"the VAE in {config.vae} makes a latent of {vae.time_factor} frames and of "
                f"{vae.downsampling} pixels a side; wanted are {STRIDE} frames, and a divisor of "
                f"the height and width of frames, {height} x {width}"
            )
        latent = height // vae.downsampling, width // vae.downsampling
        schema["latents"] = Spec("bfloat16", (None, *latent, vae.z_channels))
        folders["vae"] = pathlib.Path(config.vae)
    if config.keep_features:
        schema["features"] = Spec("bfloat16", (None, *sizes.grid, sizes.feature_dim))
    texts = landiff_text.find(config)
    for name, width in landiff_text.widths(texts).items():
        schema[name] = Spec("bfloat16", (None, width))
    hashes = {name: weights.hash_module(path) for name, path in (folders | texts).items()}
    return VideoEncoder(
        config=dataclasses.replace(
            config, data=dataclasses.replace(data, resize=data.resize or "crop")
        ),
        digest=hashes["tokenizer"],
        schema=schema,
        read=BeginningReader(data=data, frame_size=config.frame_shape, step=STEP),
        settings={
            **hashes,
            "num_frames": data.num_frames,
            **({"frame_width": width} if width != height else {}),
            "fps": data.fps,
            "frame_stride": data.frame_stride,
            "keep_features": config.keep_features,
            **({"vae_in_chunks": True} if config.vae_in_chunks else {}),
            **{f"{name}_length": getattr(config, f"{name}_length") for name in texts},
        },
        load=lambda: _make(config, folders, texts, set(schema)),
    )


def _make(
    config: EncodeConfig,
    folders: Mapping[str, pathlib.Path],
    texts: Mapping[str, pathlib.Path],
    names: set[str],
) -> Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]:
    modules, read = _Modules(config, folders), landiff_text.load(config, texts)
    run = jit_local(encode)

    def call(frames: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        made = {name: x for name, x in run(modules, frames).items() if name in names}
        return made | {"motion": frame_motion(frames)} | read(captions)

    return call


def encode(modules: _Modules, frames: Any) -> dict[str, Any]:
    """`codes` [n] segment by segment, `latents` and `features` [g, ...] of one video."""
    video = to_float(frames)[None]
    features, sizes = features_of(modules.encoder, video), modules.tokenizer.cfg.frames
    codes, first = [], 0
    for length in sizes.segments(features.shape[1]):
        codes.append(modules.tokenizer.encode(features[:, first : first + length])[0])
        first += length
    made = {
        "codes": jnp.concatenate(codes).astype(jnp.int16),
        "features": features[0].astype(jnp.bfloat16),
    }
    if modules.vae is not None:
        latents = modules.vae.encode_latents(video, in_chunks=modules.in_chunks)
        made["latents"] = latents[0].astype(jnp.bfloat16)
    return made

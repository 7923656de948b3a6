"""What `train.encode` makes of videos: deep tokens of keyframes, or latents of all frames."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.data.encoded_cache import Spec
from dicode_jax.data.examples import WholeReader
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.stages import parts
from dicode_jax.stages.ar_diffusion import dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.stages.ar_diffusion.examples import LATENTS
from dicode_jax.stages.dicode import language_model
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.dicode.examples import KeyframeReader
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.landiff.config import EncodeConfig
from dicode_jax.storage import weights
from dicode_jax.typing import Array
from train import landiff_encoder

KINDS = (ARTrainConfig, DiTTrainConfig, EncodeConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen module, and the frames that it is shown.

    Attributes:
      config: Of the training that reads the cache, with all that it leaves to the module.
      array: How the cache calls what is made of the frames.
      spec: Its type and shape, of a whole video.
      folder: Where the module lies.
      read: Frames and times of a record, see `VideosToEncode`.
      settings: What decides on the frames besides data, frame size and seed.
      load: Gives the module.
      encode: From frames uint8 [b, h, w, 3] to an array [b, ...].
    """

    config: Any
    array: str
    spec: Spec
    folder: pathlib.Path
    read: Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]
    settings: Mapping[str, Any]
    load: Callable[[], nnx.Module]
    encode: Callable[[Any, Array], Array]

    @property
    def schema(self) -> dict[str, Spec]:
        """Types and shapes of the arrays of an example."""
        return {self.array: self.spec}

    @property
    def digest(self) -> str:
        """Tells the module from others."""
        return weights.hash_module(self.folder)


def find_encoder(config: Any) -> Encoder | landiff_encoder.VideoEncoder:
    """The encoder of the training that a config describes.

    Raises:
      UserError: The config names none, or data and module do not fit it.
    """
    if isinstance(config, EncodeConfig):
        return landiff_encoder.find(config)
    if isinstance(config, DiTTrainConfig):
        return _frame_vae(dit.settle_videos(config))
    return _tokenizer(settle(config))


def _tokenizer(config: ARTrainConfig) -> Encoder:
    sizes, folder = language_model.tokenizer_config(config), config.tokenizer_folder / "tokenizer"

    def load():
        dtype = parts.compute_dtype(config)
        return weights.load_module(
            folder, DeepTokenizer, DeepTokenizerConfig, dtype=dtype, on_host=True
        )[0]

    return Encoder(
        config=config,
        array="tokens",
        spec=Spec("bfloat16", (None, sizes.num_tokens, sizes.token_dim)),
        folder=folder,
        read=KeyframeReader(
            data=config.data, frame_size=config.frame_size, num_keyframes=config.num_keyframes
        ),
        settings={"num_keyframes": config.num_keyframes},
        load=load,
        encode=lambda module, frames: language_model.encode(module, frames[:, None])[:, 0].astype(
            jnp.bfloat16
        ),
    )


def _frame_vae(config: DiTTrainConfig) -> Encoder:
    data, sizes = config.data, config.model.dit
    is_longer = data.num_frames > sizes.num_frames  # than a clip, and goes on at the same pace
    return Encoder(
        config=config,
        array=LATENTS,
        spec=Spec("float32", (None, sizes.num_tokens, sizes.channels)),
        folder=pathlib.Path(str(config.vae)),
        read=WholeReader(data=data, frame_size=config.frame_size, clip_frames=sizes.num_frames),
        settings={
            "num_frames": data.num_frames,  # of a scene, which has no end
            **({"clip_frames": sizes.num_frames} if is_longer else {}),
            "fps": data.fps,
            "frame_stride": data.frame_stride,
        },
        load=lambda: dit.load_vae(config),
        encode=lambda module, frames: dit.encode(module, frames[:, None])[:, 0],
    )

"""What LanDiff's semantic tokens stand for: features of every fourth frame of a video.

The release takes them from Theia (Shang et al., arXiv 2407.20179, `theia-base-patch16-224-cddsv`):
a ViT-B/16, its last vectors without the class token. Frames are padded below, or to the right, with
grey to a square, as the release pads them, and the features of the padding are cut off. Only
videos need it; text to video runs without. Compared with transformers' `ViTModel` of random
weights; no weights of Theia have been seen here.
"""

import os
import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, printable
from dicode_jax.kinds import config_type
from dicode_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicode_jax.models.vit import ViT, ViTConfig
from dicode_jax.nn.resampler import Resampler
from dicode_jax.storage import weights
from dicode_jax.typing import Array, Float, typechecked

STRIDE = 4  # frames of a video for a semantic frame
GREY = 127 / 127.5 - 1  # of what is padded
NORM_EPS = 1e-5


class FeatureEncoder(Protocol):
    """Frozen, and anything that gives a grid of features: a training may have another."""

    def __call__(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b g y x c"]:
        """Features of the frames 0, 4, .. of a video in [-1, 1] of `4 g - 3` frames."""
        ...


def num_semantic_frames(num_frames: int) -> int:
    """How many semantic frames a video has.

    Raises:
      ValueError: It has not 4k + 1 frames.
    """
    if num_frames < 1 or num_frames % STRIDE != 1:
        raise ValueError(f"a video has 4k + 1 frames here (49 for 6 seconds), got {num_frames}")
    return num_frames // STRIDE + 1


@typechecked
def vit_features(vit: ViT, video: Float[Array, "b f h w 3"]) -> Float[Array, "b g y x c"]:
    """Features of a `ViT` such as Theia, one frame at a time.

    Args:
      vit: The encoder, which takes colours in [-1, 1].
      video: Colours in [-1, 1]; sides a multiple of the patch size, 4k + 1 frames.

    Raises:
      ValueError: They are none.
    """
    num_semantic_frames(video.shape[1])
    frames, patch = video[:, ::STRIDE], vit.cfg.patch_size
    b, _, height, width, _ = frames.shape
    if height % patch or width % patch:
        raise ValueError(
            f"the sides of a video must be a multiple of {patch}, got {height}x{width}"
        )
    side = max(height, width)
    room = ((0, 0), (0, 0), (0, side - height), (0, side - width), (0, 0))
    padded = jnp.pad(frames, room, constant_values=GREY)

    def encode(image):
        patches = rearrange(vit(image[None])[0, 1:], "(y x) c -> y x c", y=side // patch)
        return patches[: height // patch, : width // patch]

    features = jax.lax.map(encode, rearrange(padded, "b f h w c -> (b f) h w c"))
    return rearrange(features, "(b f) y x c -> b f y x c", b=b)


@typechecked
def clip_features(tower: CLIPVision, video: Float[Array, "b f h w 3"]) -> Float[Array, "b g y x c"]:
    """Features of an image tower that takes colours in [-1, 1], as the small DiCoDe's; float32.

    Its last block has no norm behind it, so that each vector is brought to mean 0 and variance 1.

    Args:
      video: Colours in [-1, 1]; squares of the tower's size, 4k + 1 frames.

    Raises:
      ValueError: They are none.
    """
    num_semantic_frames(video.shape[1])
    frames = video[:, ::STRIDE]
    x = tower(rearrange(frames, "b f h w c -> (b f) h w c"))[:, 1:].astype(jnp.float32)
    x = jax.nn.standardize(x, axis=-1, epsilon=NORM_EPS)
    side = tower.cfg.image_size // tower.cfg.patch_size
    return rearrange(x, "(b f) (y x) c -> b f y x c", b=len(video), y=side)


def features_of(
    encoder: ViT | CLIPVision, video: Float[Array, "b f h w 3"]
) -> Float[Array, "b g y x c"]:
    """Features of a video in [-1, 1] by whichever frozen encoder there is, float32."""
    if isinstance(encoder, ViT):
        return vit_features(encoder, video).astype(jnp.float32)
    return clip_features(encoder, video)


def grid_of(cfg: ViTConfig | CLIPVisionConfig, frame_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the features of frames of a height and a width."""
    return frame_size[0] // cfg.patch_size, frame_size[1] // cfg.patch_size


class _Deep(nnx.Module):
    """What a folder of DiCoDe's tokenizer holds; its image tower is wanted."""

    def __init__(self, cfg: Any, **options):
        self.vision = CLIPVision(cfg.vision, **options)
        self.resampler = Resampler(cfg.resampler, **options)


def encoder_config(folder: str | os.PathLike) -> ViTConfig | CLIPVisionConfig:
    """The config of the frozen encoder in a folder, see `load_encoder`.

    Raises:
      UserError: There is none, or it is of a kind that gives no features.
    """
    path = pathlib.Path(folder) / weights.CONFIG_FILE
    kind, _ = config_lib.read_json(path)
    if kind in ("vit", "clip_vision"):
        return config_lib.from_json(config_type(kind), path)
    if kind != "dicode_tokenizer":
        raise UserError(
            f"{folder} holds {printable(kind, 60)}: features of frames are those of a vit, a "
            "clip_vision, or the image tower of a dicode_tokenizer"
        )
    deep: Any = config_lib.from_json(config_type(kind), path)
    if deep.preprocess != "plain":
        raise UserError(
            f"the image tower in {folder} wants CLIP's preprocessing; only towers that take "
            "colours as they are give features here"
        )
    return deep.vision


def load_encoder(
    folder: str | os.PathLike, *, dtype: Any = None, on_host: bool = False
) -> ViT | CLIPVision:
    """A frozen encoder: a `vit`, a `clip_vision`, or the image tower of a `dicode_tokenizer`.

    Raises:
      UserError: There is none, or its weights do not fit.
    """
    folder, options = pathlib.Path(folder), {"dtype": dtype, "on_host": on_host}
    cfg, (kind, _) = encoder_config(folder), config_lib.read_json(folder / weights.CONFIG_FILE)
    if kind == "dicode_tokenizer":
        return weights.load_module(folder, _Deep, config_type(kind), **options)[0].vision
    make: Any = ViT if isinstance(cfg, ViTConfig) else CLIPVision
    return weights.load_module(folder, make, type(cfg), **options)[0]

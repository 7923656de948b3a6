"""What LanDiff's semantic tokens stand for: features of every fourth frame of a video.

The release takes them from Theia (Shang et al., arXiv 2407.20179, `theia-base-patch16-224-cddsv`):
a ViT-B/16, its last vectors without the class token. Frames are padded below, or to the right, with
grey to a square, as the release pads them, and the features of the padding are cut off. Only
videos need it; text to video runs without. Compared with transformers' `ViTModel` of random
weights; no weights of Theia have been seen here.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from einops import rearrange

from dicode_jax.models.vit import ViT
from dicode_jax.typing import Array, Float, typechecked

STRIDE = 4  # frames of a video for a semantic frame
GREY = 127 / 127.5 - 1  # of what is padded


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

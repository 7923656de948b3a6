"""DiCoDe's tokenizer: keyframe -> CLIP image tokens -> resampler -> deep tokens.

The encode half of the paper's video tokenizer: 16 deep tokens of width 1024 for each keyframe, each
keyframe alone. The image tower may be CLIP's ViT-H/14 behind its exact preprocessing, or a small
ViT on images as they are.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.media.transforms import CLIP_MEAN, CLIP_STD, clip_preprocess
from dicode_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.typing import Array, Float, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepTokenizerConfig:
    """Parts of a `DeepTokenizer`; the defaults are those of the released DiCoDe.

    Attributes:
        vision: image tower. `output_dim=None` leaves its pooled embedding out.
        resampler: reads the tower's width; without an `output_shape`.
        preprocess: "clip": CLIP's resize and normalisation; "plain": none, of [-1, 1].
        image_mean, image_std: per channel, of pixels in [0, 1].
        resize: how frames become squares before; None (old folders): as pipeline or data say.
        antialias: whether the filter widens where frames shrink; the original's does not.
    """

    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    resampler: ResamplerConfig = dataclasses.field(default_factory=ResamplerConfig)
    preprocess: Literal["clip", "plain"] = "clip"
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    resize: Literal["stretch", "crop"] | None = None
    antialias: bool = False

    RETIRED: ClassVar = {
        "use_vae": (False, "the resampler's tokens themselves"),
        "vae_decoder": (False, "the resampler's tokens themselves"),
    }

    def __post_init__(self):
        if self.resampler.embed_dim != self.vision.embed_dim:
            raise ValueError(
                "the resampler must read the image tower's width, got embed_dim "
                f"{self.resampler.embed_dim} and {self.vision.embed_dim}"
            )
        if self.resampler.output_shape is not None:
            raise ValueError("the resampler of a tokenizer gives tokens: set output_shape to None")
        if self.preprocess not in ("clip", "plain"):
            raise ValueError(f"preprocess must be 'clip' or 'plain', got {self.preprocess!r}")
        if self.resize not in ("stretch", "crop", None):
            raise ValueError(f"resize must be 'stretch' or 'crop', got {self.resize!r}")

    @property
    def num_tokens(self) -> int:
        """Deep tokens of a keyframe."""
        return self.resampler.num_tokens

    @property
    def token_dim(self) -> int:
        """Width of a deep token."""
        return self.resampler.output_dim


class DeepTokenizer(nnx.Module):
    """Keyframes [b, k, h, w, 3] in [-1, 1] -> deep tokens [b, k, n, z]."""

    def __init__(
        self, cfg: DeepTokenizerConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg = cfg
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision = CLIPVision(cfg.vision, **kwargs)
        self.resampler = Resampler(cfg.resampler, **kwargs)

    @typechecked
    def __call__(self, keyframes: Float[Array, "b k h w 3"]) -> Float[Array, "b k n z"]:
        """Deep tokens as the resampler gives them.

        Args:
            keyframes: [b, k, h, w, 3] in [-1, 1]; any size with the "clip" preprocessing.

        Raises:
            ValueError: without preprocessing, the images are not of the tower's size.
        """
        features = self.encode_images(rearrange(keyframes, "b k h w c -> (b k) h w c"))
        return rearrange(self.resampler(features), "(b k) n z -> b k n z", b=len(keyframes))

    @typechecked
    def preprocess(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b y x 3"]:
        """What the image tower gets for images in [-1, 1]."""
        cfg = self.cfg
        if cfg.preprocess == "plain":
            return images
        return clip_preprocess(images, cfg.vision.image_size, cfg.image_mean, cfg.image_std)

    @typechecked
    def encode_images(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b l d"]:
        """All tokens of the image tower, class token first, for images in [-1, 1]."""
        return self.vision(self.preprocess(images))

    def null_tokens(self) -> Float[Array, "n z"]:
        """Deep tokens of a grey (all zero) image: the unconditional branch of guidance."""
        size = self.cfg.vision.image_size
        return self(jnp.zeros((1, 1, size, size, 3), jnp.float32))[0, 0]


def mask_leading_tokens(
    tokens: Float[Array, "*b n z"], last_masked: int | Array
) -> Float[Array, "*b n z"]:
    """Zeroes tokens 0..`last_masked` of every keyframe; -1 leaves all (the demo's `rm_tkn`).

    Args:
        tokens: deep tokens, any leading axes.
        last_masked: index of the last token to remove; may be traced.
    """
    keep = jnp.arange(tokens.shape[-2]) > last_masked
    return jnp.where(keep[:, None], tokens, jnp.zeros((), tokens.dtype))


def tokens_between(
    tokens: Float[Array, "b 2 n z"], place: Float[Array, "*b k"]
) -> Float[Array, "b k n z"]:
    """Tokens on the line between those of two keyframes (the paper's interpolation of videos).

    Args:
        tokens: deep tokens of the two keyframes.
        place: 0 for the first keyframe's tokens to 1 for the second's; of all rows or of each.
    """
    place = place[..., None, None]
    return (1 - place) * tokens[:, :1] + place * tokens[:, 1:]

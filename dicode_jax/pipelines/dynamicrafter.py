"""Image to video, and the video between two images, with DynamiCrafter (arXiv 2310.12190).

    pipe = DynamiCrafterPipeline.from_pretrained("models/dynamicrafter_512")
    video = pipe("waves roll in", image="beach.jpg", seed=0)

The image conditions twice: its CLIP tokens go through a resampler into one run of tokens for each
frame, and its latents are concatenated to the noisy ones (of every frame, or of the first and the
last in the interpolation model). Unlike the original's script, an image is scaled to cover the
frame before it is cropped, so that a narrow one gets no black bars.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import clip_preprocess, resize_bilinear, to_float
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dicode_jax.models.latent_video import latent_conditions
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines import base, calls, checks, latent_painting, options, painting
from dicode_jax.pipelines.painting import Clip
from dicode_jax.text.clip import ClipTokenizer
from dicode_jax.typing import Array, Float, UInt8

PARTS: dict[str, tuple[type, type]] = {
    "unet": (UNet3D, UNet3DConfig),
    "autoencoder": (AutoencoderKL, AutoencoderKLConfig),
    "text_tower": (CLIPText, CLIPTextConfig),
    "image_tower": (CLIPVision, CLIPVisionConfig),
    "resampler": (Resampler, ResamplerConfig),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamiCrafterConfig:
    """What a pipeline knows besides its parts.

    Attributes:
      frame_size: Height and width of the videos.
      fps: Frames per second that videos are meant to be shown at.
      interpolation: The model paints between two images; it concatenates the latents of both ends
        only. Otherwise it goes on from one image.
      schedule: Training noise schedule.
      sampling: Sampling defaults.
    """

    frame_size: tuple[int, int] = (256, 256)
    fps: float = 8.0
    interpolation: bool = False
    schedule: NoiseSchedule = NoiseSchedule()
    sampling: SamplingConfig = SamplingConfig(fs=3)

    def __post_init__(self):
        options.check_config(self)


class DynamiCrafterPipeline(base.Pipeline):
    """Holds UNet, autoencoder, both CLIP towers, resampler and text tokenizer.

    Args:
      parts: A module for each name in `PARTS`.
      text: Prompts to ids.
      config: Sizes and sampling defaults.
      metadata: Where the weights of each part come from (see `weights.read_metadata`).

    Raises:
      UserError: The parts do not fit together.
    """

    kind = "dynamicrafter"
    part_types = PARTS
    config_type = DynamiCrafterConfig
    takes = calls.COMMON - {"video", "num_clips", "temperature", "tokens"}

    def __init__(
        self,
        parts: Mapping[str, nnx.Module],
        *,
        text: ClipTokenizer,
        config: DynamiCrafterConfig,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ):
        super().__init__(parts, config=config, text=text, metadata=metadata)

    @classmethod
    def _read_text(cls, folder: pathlib.Path, configs: Mapping[str, Any]) -> ClipTokenizer:
        vocab_size = configs["text_tower"].vocab_size
        if (folder / base.TEXT_FOLDER).is_dir():
            return ClipTokenizer.from_file(folder / base.TEXT_FOLDER, vocab_size)
        return ClipTokenizer(None, vocab_size)

    @classmethod
    def check_fit(cls, config: DynamiCrafterConfig, configs: Mapping[str, Any]) -> None:
        if missing := [name for name in PARTS if name not in configs]:
            raise UserError(f"a DynamiCrafter pipeline needs {', '.join(missing)}")
        unet, autoencoder, text, image, resampler = (configs[name] for name in PARTS)
        step = autoencoder.downsampling * unet.downsampling
        for wrong, line in (
            (
                unet.in_channels != 2 * autoencoder.embed_dim,
                "the UNet must take two sets of latents",
            ),
            (
                unet.out_channels != autoencoder.embed_dim,
                "the UNet must give the autoencoder's latents",
            ),
            (resampler.embed_dim != image.embed_dim, "the resampler does not read the image tower"),
            (unet.context_dim != resampler.output_dim, "the UNet does not read the resampler"),
            (unet.context_dim != text.embed_dim, "the UNet does not read the text tower"),
            (unet.text_context_len != text.max_seq_len, "the UNet expects another length of text"),
            (any(side % step for side in config.frame_size), f"frame_size must divide by {step}"),
        ):
            if wrong:
                raise UserError(f"the parts of this model do not fit together: {line}")

    def _answer(self, call: calls.Call) -> calls.Answer:
        """Paints a clip of each image, and of its last image in the interpolation model.

        Another number of frames than the 16 of the training lets every frame see the image tokens
        of all 16, as in the original. `fs` is the frame stride for the 256 model (1 to 6, larger
        for more motion), frames per second for the others (smaller for more motion).
        """
        if call.images is None:
            raise UserError("this model goes on from an image; give one as image=")
        images, lasts = (self._covering(x) for x in (call.images, call.last_images))
        settings = dict(call.options)
        batch = settings.pop("clips_per_batch", "auto")
        prompts = ["" if one is None else one for one in call.prompts]
        is_latent = call.output_type == "latent"
        clips = self._videos(
            images,
            prompts,
            lasts,
            call.seeds,
            batch,
            "latents" if is_latent else "pixels",
            self._watch(**call.listeners),
            **settings,
        )
        if is_latent:
            return calls.Answer(latents=painting.gathered(clips, len(prompts)))
        parts = (Clip(i, 0, frames) for i, frames in enumerate(clips))
        return calls.Answer(frames=call.gather(parts, len(prompts)))

    def sample_latents(
        self,
        image: UInt8[np.ndarray, "*b h w 3"],
        prompt: str | Sequence[str] = "",
        *,
        last_image: UInt8[np.ndarray, "*b h w 3"] | None = None,
        seed: int | Sequence[int] = 0,
        clips_per_batch: int | str = "auto",
        **changes: Any,
    ) -> Float[np.ndarray, "b f y x c"]:
        """The scaled latents of what `__call__` paints; it takes the same arguments.

        Raises:
          UserError: An image or an option is impossible.
        """
        images = self._fit(image, "image")
        lasts = None if last_image is None else self._fit(last_image, "last_image")
        painted = self._videos(
            images, prompt, lasts, seed, clips_per_batch, "latents", self._watch(None, None),
            **changes,
        )  # fmt: skip
        return painting.gathered(painted, len(images))

    def _videos(
        self,
        images,
        prompt,
        lasts,
        seed,
        clips_per_batch,
        result,
        watch,
        negative_prompt="",
        **changes,
    ) -> Iterator[np.ndarray]:
        prompts = options.check_prompts(prompt)
        prompts = prompts * len(images) if isinstance(prompt, str) else prompts
        if len(prompts) != len(images):
            raise UserError(f"{len(images)} image(s) and {len(prompts)} prompts: give one for each")
        self._check_last_images(lasts, images)
        sampling = self._sampling(**changes)
        at_once = painting.check_clips(clips_per_batch)
        seeds = options.check_seeds(seed, len(images))
        null_ids, *ids = self.text(
            [*options.check_prompts([negative_prompt]), *prompts],
            self.parts["text_tower"].cfg.max_seq_len,
        )
        rows = (
            {
                "ids": ids[i],
                "image": images[i],
                "last": None if lasts is None else lasts[i],
                "seed": np.uint32(one),
            }
            for i, one in enumerate(seeds)
        )
        return self._paint(
            _LATENTS if result == "latents" else _PIXELS,
            list(PARTS),
            rows,
            len(images),
            sampling,
            (null_ids,),
            clips_per_batch=at_once,
            blame=", ".join(PARTS),
            watch=watch,
            schedule=self.config.schedule,
        )

    def _covering(self, images: list[np.ndarray] | None) -> Any:
        """Images of any sizes, as `_fit` makes them."""
        if images is None:
            return None
        return jnp.concatenate([self._fit(image, "image") for image in images])

    def _fit(self, image, name: str) -> Float[Array, "b y x 3"]:
        """Images [b, h, w, 3] of the model's size in [-1, 1], scaled to cover it and cropped."""
        image = checks.as_array(image, f"{name} is uint8 [h, w, 3] or a batch")
        if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
            raise UserError(
                f"{name} is uint8 [h, w, 3] or a batch, got {image.dtype} {image.shape}"
            )
        if 0 in image.shape:
            raise UserError(f"{name} is empty: {image.shape}")
        batch = image if image.ndim == 4 else image[None]
        return _cover(jnp.asarray(batch), size=self.config.frame_size)

    def _check_last_images(self, lasts, images) -> None:
        if self.config.interpolation and lasts is None:
            raise UserError(
                "this model paints between two images: pass last_image (the first again for a loop)"
            )
        if not self.config.interpolation and lasts is not None:
            raise UserError("this model goes on from one image; last_image is for interpolation")
        if lasts is not None and len(lasts) != len(images):
            raise UserError(f"{len(images)} image(s) and {len(lasts)} last image(s)")

    def _sampling(self, **changes: Any) -> SamplingConfig:
        sampling = super()._sampling(**changes)
        if self.config.interpolation and sampling.num_frames < 2:
            raise UserError(f"num_frames must be at least 2, got {sampling.num_frames}")
        return sampling


@functools.partial(jax.jit, static_argnames=("size",))
def _cover(images, *, size):
    """uint8 images to [-1, 1], scaled to cover `size` and cropped to its middle."""
    h, w = images.shape[1:3]
    scale = max(size[0] / h, size[1] / w)
    scaled = [max(round(side * scale), wanted) for side, wanted in zip((h, w), size)]
    images = to_float(images)
    if (h, w) != tuple(scaled):
        images = resize_bilinear(images, tuple(scaled), antialias=True)
    top, left = ((side - wanted) // 2 for side, wanted in zip(scaled, size))
    return images[:, top : top + size[0], left : left + size[1]]


def _contexts(text_tower, image_tower, resampler, ids, images):
    """Context of every sample, and that of the empty prompt and a grey image, [b, l, d] each.

    The first row of `ids` is the empty prompt.
    """
    images = jnp.concatenate([jnp.zeros_like(images[:1]), images])
    pixels = clip_preprocess(images, image_tower.cfg.image_size)
    text, tokens = text_tower(ids, "penultimate"), resampler(image_tower(pixels))
    context = jnp.concatenate([text, tokens.astype(text.dtype)], axis=1)
    return context[1:], jnp.broadcast_to(context[:1], context[1:].shape)


def _concat(autoencoder, images, lasts, keys, num_frames):
    """Latents [b, f, h, w, c] that go beside the noisy ones."""
    first = autoencoder.encode_latents(images[:, None], fold(keys, 2))
    if lasts is None:
        return jnp.repeat(first, num_frames, axis=1)
    last = autoencoder.encode_latents(lasts[:, None], fold(keys, 3))
    b, _, *shape = first.shape
    middle = jnp.zeros((b, num_frames - 2, *shape), first.dtype)
    return jnp.concatenate([first, middle, last], axis=1)


@painting.program
def _prepare(
    unet, autoencoder, text_tower, image_tower, resampler, rows, sampling, null_ids, *, schedule
):
    images, keys = rows["image"], sample_keys(rows["seed"])
    ids = jnp.concatenate([null_ids[None], rows["ids"]])
    contexts = _contexts(text_tower, image_tower, resampler, ids, images)
    concat = _concat(autoencoder, images, rows["last"], keys, sampling.num_frames)
    conditions = latent_conditions(*contexts, concat, sampling)
    shape = tuple(concat.shape[2:])
    return latent_painting.begin(unet, schedule, conditions, rows["seed"], shape, sampling)


@painting.program
def _denoise(
    unet, autoencoder, text_tower, image_tower, resampler, rows, sampling, start, stop, *, schedule
):
    return latent_painting.advance(unet, schedule, rows, sampling, start, stop)


@painting.program
def _decode(unet, autoencoder, text_tower, image_tower, resampler, latents):
    return checks.quantize(autoencoder.decode_latents(latents, per_frame=True))


_PIXELS = painting.Programs(_prepare, _denoise, _decode)
_LATENTS = painting.Programs(_prepare, _denoise, painting.latents)

"""Divot's de-tokenizer (arXiv 2412.04432): features of its video tokenizer to clips.

    decoder = DivotDetokenizer.from_pretrained("models/divot")
    video = decoder(features, null_features=null_features, seed=0)

The UNet is DynamiCrafter's with four input channels. Its whole context are the tokens that a
resampler reads from the features, the same for every frame. Divot's video tokenizer is not part of
this package, so the features, and for guidance those of an all-zero clip, come from there.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.media.videos import Video, Videos
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.latent_video import latent_conditions
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.pipelines import base, calls, checks, latent_painting, options, painting
from dicode_jax.pipelines import progress as progress_lib
from dicode_jax.pipelines.painting import Clip
from dicode_jax.typing import Float

PARTS: dict[str, tuple[type, type]] = {
    "unet": (UNet3D, UNet3DConfig),
    "autoencoder": (AutoencoderKL, AutoencoderKLConfig),
    "resampler": (Resampler, ResamplerConfig),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivotConfig:
    """What the de-tokenizer knows besides its parts; the defaults are the release's.

    Attributes:
      frame_size: Height and width.
      fps: Frames per second that videos are meant to be shown at.
      schedule: Training noise schedule.
      sampling: Sampling defaults. The original rounds its tables to float16.
    """

    frame_size: tuple[int, int] = (256, 256)
    fps: float = 8.0
    schedule: NoiseSchedule = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
    sampling: SamplingConfig = SamplingConfig(fs=3, table_dtype="float16")

    def __post_init__(self):
        options.check_config(self)


class DivotDetokenizer(base.Pipeline):
    """Holds UNet, autoencoder and resampler.

    Args:
      parts: A module for each name in `PARTS`.
      config: Sizes and sampling defaults.
      metadata: Where the weights of each part come from (see `weights.read_metadata`).
    """

    kind = "divot"
    part_types = PARTS
    config_type = DivotConfig

    def __call__(
        self,
        features: Float[np.ndarray, "*b l e"],
        *,
        null_features: Float[np.ndarray, "l e"] | None = None,
        clips_per_batch: int | str = "auto",
        seed: int | Sequence[int] = 0,
        callback_on_step_end: calls.OnStep | None = None,
        callback_on_clip_end: calls.OnClip | None = None,
        progress: Any = True,
        **changes: Unpack[options.SamplingOptions],
    ) -> Videos:
        """Paints a clip for each set of features.

        Args:
          features: Of Divot's video tokenizer, one clip or a batch ([64, 256] in the release).
          null_features: Those of an all-zero clip, for guidance.
          clips_per_batch: Clips that each device paints at once; "auto" for as many as are fast and
            fit in the memory that is free.
          seed: Of all randomness, 0 to 2**32 - 1; or a seed for each clip. Clip i of a call with
            `seed=s` is what it is alone with `seed=s + i`, within one grey level.
          callback_on_step_end, callback_on_clip_end, progress: As for `base.Pipeline`.
          changes: How it is painted, see `options.SamplingOptions`.

        Returns:
          A video of a clip for each.

        Raises:
          UserError: Features of another width, guidance without `null_features`, or an option that
            is impossible.
        """
        width = self.parts["resampler"].cfg.embed_dim
        wanted = f"features are [l, {width}] or a batch"
        if isinstance(features, str):
            raise UserError(f"{wanted}, got text: this model decodes features, and no prompt")
        features = checks.as_array(features, wanted, np.float32)
        if features.ndim not in (2, 3) or features.shape[-1] != width or 0 in features.shape:
            raise UserError(f"{wanted}, got shape {features.shape}")
        batch = features if features.ndim == 3 else features[None]
        sampling = self._sampling(**changes)
        seeds = options.check_seeds(seed, len(batch))
        at_once = painting.check_clips(clips_per_batch)
        if null_features is None:
            if sampling.guidance_scale != 1.0:
                raise UserError(
                    "guidance needs null_features, those of an all-zero clip; or pass "
                    "guidance_scale=1"
                )
            null = np.zeros(batch.shape[1:], np.float32)
        else:
            wanted = f"null_features are {list(batch.shape[1:])}"
            null = checks.as_array(null_features, wanted, np.float32)
        if null.shape != batch.shape[1:]:
            raise UserError(f"null_features have shape {null.shape}, want {batch.shape[1:]}")
        with progress_lib.shown(progress) as tell:
            painted = self._paint(
                _PIXELS,
                list(PARTS),
                ({"features": one, "seed": np.uint32(seed)} for one, seed in zip(batch, seeds)),
                len(batch),
                sampling,
                (null,),
                watch=self._watch(tell, callback_on_step_end),
                clips_per_batch=at_once,
                blame=", ".join(PARTS),
                config=self.config,
            )
            videos = []
            clips = (Clip(i, 0, frames) for i, frames in enumerate(painted))
            for clip in calls.counted(clips, len(batch), tell):
                videos.append(clip.frames)
                if callback_on_clip_end is not None:
                    callback_on_clip_end(self, len(videos), len(batch), clip)
        return Videos(
            Video(frames=frames, fps=float(self.config.fps), seed=one)
            for one, frames in zip(seeds, videos, strict=True)
        )


@painting.program
def _prepare(unet, autoencoder, resampler, rows, sampling, null_features, *, config):
    tokens = resampler(jnp.concatenate([null_features[None], rows["features"]]))
    context, null = tokens[1:], jnp.broadcast_to(tokens[:1], tokens[1:].shape)
    step = autoencoder.cfg.downsampling
    h, w = (side // step for side in config.frame_size)
    conditions = latent_conditions(context, null, None, sampling)
    shape = (h, w, autoencoder.cfg.embed_dim)
    return latent_painting.begin(unet, config.schedule, conditions, rows["seed"], shape, sampling)


@painting.program
def _denoise(unet, autoencoder, resampler, rows, sampling, start, stop, *, config):
    return latent_painting.advance(unet, config.schedule, rows, sampling, start, stop)


@painting.program
def _decode(unet, autoencoder, resampler, latents):
    return checks.quantize(autoencoder.decode_latents(latents, per_frame=True))


_PIXELS = painting.Programs(_prepare, _denoise, _decode)

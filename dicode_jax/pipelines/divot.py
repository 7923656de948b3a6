"""Divot's de-tokenizer (arXiv 2412.04432): features of its video tokenizer to clips.

    decoder = DivotDetokenizer.from_pretrained("models/divot")
    video = decoder(features, null_features=null_features, seed=0)

The UNet is DynamiCrafter's with four input channels. Its whole context are the tokens that a
resampler reads from the features, the same for every frame. Divot's video tokenizer is not part of
this package, so the features, and for guidance those of an all-zero clip, come from there.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.latent_video import VideoSamplingConfig, sample_latents
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs, sample_keys
from dicode_jax.pipelines import checks, options
from dicode_jax.pipelines.load import check_kind
from dicode_jax.storage import hub, model_card, weights
from dicode_jax.storage.folders import new_folder
from dicode_jax.typing import Float, UInt8

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
    sampling: VideoSamplingConfig = VideoSamplingConfig(table_dtype="float16")


class DivotDetokenizer:
    """Holds UNet, autoencoder and resampler.

    Args:
      parts: A module for each name in `PARTS`.
      config: Sizes and sampling defaults.
      metadata: Where the weights of each part come from (see `weights.read_metadata`).
    """

    def __init__(
        self,
        parts: Mapping[str, nnx.Module],
        *,
        config: DivotConfig,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.parts, self.config, self.metadata = dict(parts), config, dict(metadata or {})
        self._split = {name: nnx.split(module) for name, module in self.parts.items()}

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike,
        revision: str | None = None,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        **options: Any,
    ) -> "DivotDetokenizer":
        """Loads a folder that `convert.divot` wrote, or a model of the Hub.

        Args:
          path_or_name: A folder, or `owner/name` on the Hugging Face Hub.
          revision: Branch, tag or commit on the Hub.
          dtype: Computing type; None for that of the parameters.
          param_dtype: Type of the weights in memory.
          options: Of `hub.find_model`: `cache_dir`, `local_files_only`, `token`.

        Raises:
          UserError: There is no such model, or its files are broken.
        """
        folder = hub.find_model(path_or_name, revision=revision, **options)
        check_kind(folder, "divot")
        config = config_lib.from_json(DivotConfig, folder / weights.CONFIG_FILE)
        parts = {}
        for name, (kind, config_type) in PARTS.items():
            build = lambda cfg, kind=kind: kind(  # noqa: E731
                cfg, dtype=dtype, param_dtype=param_dtype, rngs=ShapeRngs()
            )
            parts[name], _ = weights.load_module(
                folder / name, build, config_type, param_dtype=param_dtype
            )
            checks.check_weights(name, parts[name])
        metadata = {name: weights.read_metadata(folder / name) for name in PARTS}
        return cls(parts, config=config, metadata=metadata)

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: Any = None) -> None:
        """Writes a folder, with a model card if it has none; `dtype` is the storage type.

        A model that was written here is replaced, but for its card.

        Raises:
          UserError: The folder holds anything but a model that was written here.
        """
        with new_folder(folder, overwrite=True, keep=[model_card.CARD_FILE]) as fresh:
            for name, module in self.parts.items():
                metadata = self.metadata.get(name)
                weights.save_module(
                    fresh / name, module, module.cfg, dtype=dtype, metadata=metadata
                )
            config_lib.to_json(self.config, fresh / weights.CONFIG_FILE)
            model_card.write(fresh, name=pathlib.Path(folder).resolve().name)

    def __call__(
        self,
        features: Float[np.ndarray, "*b l e"],
        *,
        null_features: Float[np.ndarray, "l e"] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """Paints a clip for each set of features.

        Args:
          features: Of Divot's video tokenizer, one clip or a batch ([64, 256] in the release).
          null_features: Those of an all-zero clip, for guidance.
          num_inference_steps, guidance_scale, eta: None for the model's default.
          seed: Of all randomness, 0 to 2**32 - 1; or a seed for each clip. Clip i of a call with
            `seed=s` is what it is alone with `seed=s + i`, within one grey level.

        Returns:
          Frames in [0, 255].

        Raises:
          UserError: Features of another width, guidance without `null_features`, or an option that
            is impossible.
        """
        width = self.parts["resampler"].cfg.embed_dim
        wanted = f"features are [l, {width}] or a batch"
        features = checks.as_array(features, wanted, np.float32)
        if features.ndim not in (2, 3) or features.shape[-1] != width or 0 in features.shape:
            raise UserError(f"{wanted}, got shape {features.shape}")
        batch = features if features.ndim == 3 else features[None]
        sampling = checks.sampling_of(
            self.config.sampling,
            self.config.schedule,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
        )
        seeds = options.check_seeds(seed, len(batch))
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
        graphs, states = zip(*(self._split[name] for name in PARTS), strict=True)
        pixels, is_finite = _paint(
            graphs,
            states,
            jnp.asarray(batch),
            jnp.asarray(null),
            sample_keys(seeds),
            config=dataclasses.replace(self.config, sampling=sampling),
        )
        checks.check_painted(is_finite, ", ".join(PARTS), sampling)
        return np.asarray(pixels)


@functools.partial(jax.jit, static_argnames=("graphs", "config"))
def _paint(graphs, states, features, null_features, keys, *, config):
    unet, autoencoder, resampler = map(nnx.merge, graphs, states)
    tokens = resampler(jnp.concatenate([null_features[None], features]))
    context, null = tokens[1:], jnp.broadcast_to(tokens[:1], tokens[1:].shape)
    step = autoencoder.cfg.downsampling
    h, w = (side // step for side in config.frame_size)
    shape = (h, w, autoencoder.cfg.embed_dim)
    latents = sample_latents(
        unet, config.schedule, context, null, None, keys, shape, config.sampling
    )
    return checks.quantize(autoencoder.decode_latents(latents, per_frame=True))

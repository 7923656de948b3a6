"""What the trainings of AR-Diffusion are told."""

import dataclasses
import math
from typing import Literal

from dicode_jax.diffusion.timesteps import check_mode
from dicode_jax.models.ar_diffusion.dit import DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.patch_discriminator import PatchDiscriminatorConfig
from dicode_jax.stages.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameVAETrainConfig(RunConfig):
    """Training of the frame VAE; of its temporal part alone where the model has one.

    Errors are means over pixels: the original's sums, over as many times as an image has numbers.

    Attributes:
      model: Sizes. With `temporal`, clips of `data.num_frames` are read, and what came with `init`
        stays as it is.
      init: `model` folder of an earlier run, or a converted VAE; None starts fresh.
      train_encoder: Whether what makes latents learns; without it, as in TiTok's second stage, a
        denoiser of these latents stays good.
      lpips: Folder of a converted LPIPS; None weighs edges in its place.
      pixel_weight: Weight of all that the pixel decoder's frames are judged by; with 0 it is left
        out, and the transformers learn alone, by patches and probes, in a fraction of the time.
      squared_weight: Weight of the squared error beside the absolute error of weight 1.
      perceptual_weight: Weight of LPIPS.
      edge_weight: Weight of the absolute error of differences between neighbours, at full, half and
        quarter size; without `lpips` alone.
      kl_weight: Weight of the KL term, averaged over latent numbers; 0 in the release.
      token_noise: Standard deviation of the noise on the unit vectors that the decoder learns from,
        in place of the posterior's own, which then learns by `kl_weight` alone; None draws from the
        posterior, as the release does.
      logit_weight: Weight of the mean square of the codes' logits, from which their mean for each
        patch is taken off. A patch whose logits have run away gets one code whatever happens, and
        no gradient through it; the release starts from trained codes and has none.
      patch_weight: Weight of the squared error of pixels that one linear layer, not exported, reads
        off the transformer's patches. It trains the tokens while the codes still mean nothing; the
        release, which starts from trained codes, has none.
      proxy: `model` folder of a trained autoencoder of images, whose scaled latents are read off
        the patches in place of pixels (as TiTok's first stage learns another tokenizer's codes):
        an edge counts in them as much as an area.
      probe_weight: Weight of the cross-entropy of linear probes, not exported, that tell from the
        latents what a frame of the drawn world shows; 0 for other data.
      disc_start: Step from which a discriminator of patches judges: odd steps are its own, even
        ones the VAE's, each with an optimiser of its own. None for none at all.
      disc_weight: Weight of what it says, after that was scaled to move the last convolution as
        the errors do.
      discriminator: Its sizes.
      discriminator_init: Folder of a converted one; None starts fresh.
    """

    model: FrameVAEConfig = FrameVAEConfig()
    init: str | None = None
    train_encoder: bool = True
    lpips: str | None = None
    frame_size: int = 256
    pixel_weight: float = 1.0
    squared_weight: float = 0.0
    perceptual_weight: float = 1.0
    edge_weight: float = 1.0
    kl_weight: float = 0.0
    token_noise: float | None = None
    logit_weight: float = 0.0
    patch_weight: float = 0.0
    proxy: str | None = None
    probe_weight: float = 0.0
    disc_start: int | None = None
    disc_weight: float = 1.0
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig()
    discriminator_init: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.token_noise is not None and not 0 <= self.token_noise < math.inf:
            raise ValueError(f"token_noise must not be negative, got {self.token_noise}")
        if not 0 <= self.pixel_weight < math.inf:
            raise ValueError(f"pixel_weight must not be negative, got {self.pixel_weight}")
        if not self.patch_weight and (not self.pixel_weight or self.proxy):
            raise ValueError(
                "without pixel_weight, or with a proxy, the patches are read: set patch_weight"
            )
        if not self.pixel_weight and self.disc_start is not None:
            raise ValueError(
                "a discriminator judges what the pixel decoder makes: set pixel_weight"
            )
        for name in ("patch_weight", "probe_weight"):
            weight = getattr(self, name)
            if weight < 0 or (weight and self.model.temporal):
                raise ValueError(
                    f"{name} must not be negative, and 0 for the temporal decoder, got {weight}"
                )
        if not self.train_encoder and self.init is None:
            raise ValueError(
                "an encoder that does not learn has to come from init: name its folder"
            )
        if self.disc_start is None:
            if self.discriminator_init is not None:
                raise ValueError("discriminator_init is of no use without disc_start")
        else:
            self._check_discriminator(self.disc_start)
        if self.frame_size != self.model.image_size:
            raise ValueError(
                f"frame_size must be the model's image_size, got {self.frame_size} and "
                f"{self.model.image_size}"
            )
        if self.model.temporal and self.init is None:
            raise ValueError(
                "the temporal decoder goes on from a trained frame VAE: name its folder as init"
            )

    def _check_discriminator(self, start: int):
        if start < 0 or not 0 <= self.disc_weight < math.inf:
            raise ValueError(
                f"disc_start and disc_weight must not be negative, got {start} and "
                f"{self.disc_weight}"
            )
        if self.model.temporal:
            raise ValueError("the temporal decoder learns without a discriminator: no disc_start")
        if self.optim.schedule != "constant" or self.optim.warmup_steps:
            raise ValueError(
                "two optimisers that take turns want a rate that does not change: with disc_start "
                "set optim.schedule to constant and optim.warmup_steps to 0"
            )
        if (least := self.discriminator.least_size) > self.frame_size:
            raise ValueError(
                f"a discriminator of {self.discriminator.num_layers} layers needs frames of "
                f"{least} pixels at least, frame_size is {self.frame_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTTrainConfig(RunConfig):
    """Training of the denoiser on latents of single frames.

    `data.path` is a cache of latents (of `train.encode`), or videos, of which the first
    `cached_clips` clips are encoded beside the run.

    Attributes:
      model: Transformer, classes and noise.
      vae: `model` folder of a trained frame VAE, whose latents are learned; None for a cache alone,
        without sample sheets and without a VAE beside the exported denoiser.
      init: `model` folder of an earlier run, or a converted model, whose denoiser is gone on from,
        with a new optimiser; None starts fresh.
      cached_clips: Clips that are encoded once and kept.
      clip_step: Frames between the starts of the clips of a cached video.
      late_share: Share of the clips that begin behind the first frame of a cached video, anywhere,
        as windows of a long video do; the others begin at it, and `clip_step` does not matter. For
        captions that say how a video begins: late clips are learned without, and what is exported
        paints later windows so (`prompt_windows`). Ours; 0 for clips by `clip_step`.
      num_known: First frames of a late clip, which have no noise and do not count: where a video is
        on its way is said by them alone.
      timesteps: How noisy the frames of a clip are: "fopp" and "uniform_paths" never less than the
        one before, "independent" (diffusion forcing), or "shared", the same for all.
      frame_weight_rise: Frame i of f counts 1 + i / f times this.
      context_dropout: Share of clips that see the null context, which guidance moves away from.
      train_context: Whether contexts learn; False keeps what they were drawn as, and their
        gradients out of the clip norm.
      class_names: Names of the classes, in order; empty where they only have numbers.
      class_list: File with these names in their place, one a line, with or without a number before
        it, as UCF-101's `classInd.txt`.
      class_of: What tells the class of a video, a name or number: its caption, in which the name
        may also be a part, or the folder that it lies in.
      sample_steps: Steps of each frame, in sample sheets and by default in what is exported.
      sample_lag: Rows between the starts of neighbouring frames.
      sample_guidance: Guidance scale; 1 for none.
      sample_guidance_interval: Shares of a frame's steps, from the noisiest, where it begins and
        ends.
    """

    model: DenoiserConfig = DenoiserConfig()
    vae: str | None = None
    init: str | None = None
    cached_clips: int = 0
    clip_step: int = 1
    late_share: float = 0.0
    num_known: int = 4
    timesteps: Literal["fopp", "uniform_paths", "independent", "shared"] = "fopp"
    frame_weight_rise: float = 0.0
    context_dropout: float = 0.0
    train_context: bool = True
    class_names: tuple[str, ...] = ()
    class_list: str | None = None
    class_of: Literal["caption", "folder"] = "caption"
    sample_steps: int = 50
    sample_lag: int = 5
    sample_guidance: float = 2.0
    sample_guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        check_mode(self.timesteps)
        model = self.model
        if self.data.num_frames < model.dit.num_frames:
            raise ValueError(
                f"clips have the frames of the model's window: data.num_frames is "
                f"{self.data.num_frames}, model.dit.num_frames {model.dit.num_frames}"
            )
        if not 0 <= self.late_share < 1:
            raise ValueError(f"late_share must be in [0, 1), got {self.late_share}")
        if self.late_share and not 0 < self.num_known < model.dit.num_frames:
            raise ValueError(
                f"late clips know some of their {model.dit.num_frames} frames and learn others: "
                f"num_known must lie between 0 and that, got {self.num_known}"
            )
        if not 0 <= self.context_dropout < 1:
            raise ValueError(f"context_dropout must be in [0, 1), got {self.context_dropout}")
        if self.frame_weight_rise < 0:
            raise ValueError(
                f"frame_weight_rise must not be negative, got {self.frame_weight_rise}"
            )
        if self.cached_clips < 0 or self.clip_step < 1:
            raise ValueError("cached_clips must not be negative, clip_step at least 1")
        if self.class_names and len(self.class_names) != model.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names for {model.num_classes} classes "
                "(model.num_classes)"
            )
        if len({name.casefold() for name in self.class_names}) != len(self.class_names):
            raise ValueError("class_names has a name twice")
        if not 0 <= self.sample_lag <= self.sample_steps <= model.schedule.num_timesteps:
            raise ValueError(
                f"want sample_lag <= sample_steps <= {model.schedule.num_timesteps}, got "
                f"{self.sample_lag} and {self.sample_steps}"
            )
        start, end = self.sample_guidance_interval
        if not 0 <= start <= end <= 1:
            raise ValueError(
                "sample_guidance_interval must ascend within 0..1, got "
                f"{self.sample_guidance_interval}"
            )

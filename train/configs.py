"""Configs of the trainings; the files in `configs/` return one of these."""

import dataclasses

from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.representation import RepresentationConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.models.dicode.tokenizer_loss import TokenizerLossConfig
from dicode_jax.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig:
    """Training of the autoencoder.

    Attributes:
      model: Sizes; `scale_factor` is measured at export, so that latents have unit variance.
      optim: Optimiser and schedule.
      num_steps: Length of the run (and of the schedule).
      batch_size: Frames per step.
      frame_size: Height and width in pixels.
      l1_weight: Weight of the absolute error beside the squared error of weight 1.
      kl_weight: Weight of the KL term, averaged over latent numbers.
      ema_decay: Moving average of the weights that is exported; 0 for none.
      seed: Of weights, data and noise.
    """

    model: AutoencoderKLConfig
    optim: OptimConfig = OptimConfig()
    num_steps: int = 2000
    batch_size: int = 16
    frame_size: int = 64
    l1_weight: float = 0.1
    kl_weight: float = 1e-3
    ema_decay: float = 0.999
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationTrainConfig:
    """First stage of a small tokenizer: image tower and resampler, by regression.

    Attributes:
      model: Tokenizer, head and probes.
      autoencoder: `model` folder of a trained autoencoder, whose latents are regressed.
      init: `model` folder of an earlier run that is gone on from; None starts fresh.
      optim: Optimiser and schedule.
      num_steps: Length of the run (and of the schedule).
      batch_size: Keyframes per step.
      frame_size: Height and width in pixels.
      probe_weight: Weight of the probes' cross-entropy.
      pixel_weight: Weight of the squared error of the decoded latents.
      ema_decay: Moving average of the weights that is exported; 0 for none.
      seed: Of weights, data and noise.
    """

    model: RepresentationConfig
    autoencoder: str
    init: str | None = None
    optim: OptimConfig = OptimConfig()
    num_steps: int = 4000
    batch_size: int = 32
    frame_size: int = 64
    probe_weight: float = 0.02
    pixel_weight: float = 0.0
    ema_decay: float = 0.999
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Video diffusion training of the tokenizer: the clip decoder's UNet learns to paint clips.

    Attributes:
      tokenizer: Image tower and resampler.
      decoder: UNet, autoencoder, latent head, noise schedule.
      autoencoder: `model` folder of a trained autoencoder that replaces the decoder's; None keeps a
        fresh one.
      representation: `model` folder of a regression run, whose tokenizer and head are taken over
        and frozen; None trains the resampler together with the UNet.
      init: Folder with the `tokenizer` and `decoder` to start from, as `convert.dynamicrafter
        --for-dicode` writes it (or the `model` of an earlier run); None starts fresh. It brings
        all parts: `autoencoder` is not read then, and `representation` says no more than that the
        tokenizer stays frozen.
      cached_clips: Clips that are encoded once and trained on again and again, which needs a frozen
        tokenizer; 0 encodes every batch anew.
      loss: Condition dropping and regularisers.
      optim: Optimiser and schedule.
      num_steps: Length of the run (and of the schedule).
      batch_size: Clips per step.
      frame_size: Height and width in pixels.
      fs: Frame stride that the UNet is told.
      ema_decay: Moving average of the weights that is exported; 0 for none.
      seed: Of weights, data and noise.
    """

    tokenizer: DeepTokenizerConfig = dataclasses.field(default_factory=DeepTokenizerConfig)
    decoder: ClipDecoderConfig = dataclasses.field(default_factory=ClipDecoderConfig)
    autoencoder: str | None = None
    representation: str | None = None
    init: str | None = None
    cached_clips: int = 0
    loss: TokenizerLossConfig = dataclasses.field(default_factory=TokenizerLossConfig)
    optim: OptimConfig = OptimConfig()
    num_steps: int = 10_000
    batch_size: int = 8
    frame_size: int = 64
    fs: int = 6
    ema_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.cached_clips and self.representation is None:
            raise ValueError("cached_clips needs a representation: its tokens must not change")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARTrainConfig:
    """Training of the language model on deep tokens.

    Attributes:
      model: Body, head and loss.
      tokenizer: `model` folder of a tokenizer run, whose tokenizer reads the keyframes (and whose
        decoder paints the samples).
      init: `model` folder of an earlier run that is gone on from; None starts fresh.
      body_init: Folder of a body to start from, as `convert.gpt2 --for-dicode` and `convert.llama
        --for-dicode` write it; None starts fresh.
      cached_videos: Videos whose keyframes are encoded once and trained on again and again; 0
        encodes every batch anew.
      text_tokenizer: Folder or file of the text tokenizer; None makes the synthetic world's own.
      text_length: Text ids per sample, padded.
      num_keyframes: Keyframes per sample.
      input_noise: Standard deviation of noise on the tokens that the model reads, relative to
        theirs; it makes generation forgive its own errors.
      optim: Optimiser and schedule.
      num_steps: Length of the run (and of the schedule).
      batch_size: Videos per step.
      frame_size: Height and width in pixels.
      ema_decay: Moving average of the weights that is exported; 0 for none.
      seed: Of weights, data and noise.
    """

    model: DiCoDeLMConfig
    tokenizer: str | None = None
    init: str | None = None
    body_init: str | None = None
    cached_videos: int = 0
    text_tokenizer: str | None = None
    text_length: int = 80
    num_keyframes: int = 5
    input_noise: float = 0.0
    optim: OptimConfig = OptimConfig()
    num_steps: int = 10_000
    batch_size: int = 32
    frame_size: int = 64
    ema_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.init is not None and self.body_init is not None:
            raise ValueError("init brings the body too: leave body_init out")
        needed = self.text_length + self.num_keyframes * (self.model.num_tokens + 1)
        if needed > self.model.body.max_seq_len:
            raise ValueError(
                f"{self.num_keyframes} keyframes after {self.text_length} text ids need {needed} "
                f"positions, the body has {self.model.body.max_seq_len}"
            )

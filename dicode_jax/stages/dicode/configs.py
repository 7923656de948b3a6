"""Configs of DiCoDe's own trainings; the files in `configs/` return one of these."""

import dataclasses
import pathlib
from typing import Literal

from dicode_jax.distributions import MIN_TEMPERATURE
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.stages.config import AutoencoderTrainConfig as AutoencoderTrainConfig
from dicode_jax.stages.config import RunConfig
from dicode_jax.stages.dicode.representation_model import RepresentationConfig
from dicode_jax.stages.dicode.tokenizer_loss import TokenizerLossConfig
from dicode_jax.stages.dicode.trainable import TrainableParts

_LONGEST_ROW = 2**15  # a packed row has a mask of as many bytes as the square of its length


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationTrainConfig(RunConfig):
    """First stage of a small tokenizer: image tower and resampler, by regression.

    Attributes:
      model: Tokenizer, head and probes.
      autoencoder: `model` folder of a trained autoencoder, whose latents are regressed.
      init: `model` folder of an earlier run that is gone on from; None starts fresh.
      probe_weight: Weight of the probes' cross-entropy; their labels only exist for the synthetic
        world, with other data it must be 0.
      pixel_weight: Weight of the squared error of the decoded latents.
      between_weight: Weight of the error of a frame between two keyframes, read from tokens between
        theirs, beside 1 for each keyframe; 0 reads single frames. For a decoder with
        `latent_view="between"`.
      trained: "all", or the "path" alone, of a representation that is named by `init`.
    """

    model: RepresentationConfig
    autoencoder: str
    init: str | None = None
    num_steps: int = 4000
    batch_size: int = 32
    probe_weight: float = 0.02
    pixel_weight: float = 0.0
    between_weight: float = 0.0
    trained: Literal["all", "path"] = "all"
    ema_decay: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        if self.between_weight < 0:
            raise ValueError(f"between_weight must not be negative, got {self.between_weight}")
        if self.model.path is not None and not self.has_between:
            raise ValueError(
                "a path is learned from frames between: between_weight must be above 0"
            )
        if self.trained == "path" and (self.model.path is None or self.init is None):
            raise ValueError('trained "path" needs a model.path, and init with all the others')
        if self.has_between and (f := self.data.num_frames) < 3:
            raise ValueError(f"between_weight needs a frame between: data.num_frames is {f}, not 3")

    @property
    def has_between(self) -> bool:
        """Whether batches hold keyframes in pairs and a frame between them."""
        return self.between_weight > 0

    @property
    def has_labels(self) -> bool:
        """Whether batches hold the labels of what a frame shows."""
        return self.probe_weight > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(RunConfig):
    """Video diffusion training of the tokenizer: the clip decoder's UNet learns to paint clips.

    Attributes:
      tokenizer: Image tower and resampler.
      decoder: UNet, autoencoder, latent head, noise schedule.
      autoencoder: `model` folder of a trained autoencoder; None keeps a fresh one.
      representation: `model` folder of a regression run, whose parts stay frozen.
      init: Folder with all of `tokenizer` and `decoder` to start from; None starts fresh.
      cached_clips: Clips that are encoded once and kept; 0 encodes every batch anew.
      trainable: Which parts are trained, beside what `representation` freezes.
      loss: Condition dropping and weights.
      fs: Frame stride that the UNet is told; None for that of each clip.
      sample_steps: Sampling steps of the sample sheet.
      sample_guidance: Guidance scale of the sample sheet; 1 for none.
    """

    tokenizer: DeepTokenizerConfig = dataclasses.field(default_factory=DeepTokenizerConfig)
    decoder: ClipDecoderConfig = dataclasses.field(default_factory=ClipDecoderConfig)
    autoencoder: str | None = None
    representation: str | None = None
    init: str | None = None
    cached_clips: int = 0
    trainable: TrainableParts = TrainableParts()
    loss: TokenizerLossConfig = dataclasses.field(default_factory=TokenizerLossConfig)
    fs: int | None = 6
    sample_steps: int = 25
    sample_guidance: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if (given := self.tokenizer.num_tokens) != self.decoder.num_tokens:
            raise ValueError(
                f"the tokenizer makes {given} tokens per keyframe, decoder.num_tokens says "
                f"{self.decoder.num_tokens}"
            )
        if self.cached_clips and self.autoencoder is None and self.init is None:
            raise ValueError("cached_clips needs a trained autoencoder: give autoencoder or init")
        if self.has_frozen_tokenizer and self.representation is None and self.init is None:
            raise ValueError("trainable.resampler False needs a tokenizer that is ready: give init")
        if self.decoder.latent_prior is not None and self.loss.uncond_prob > 0:
            raise ValueError(
                "decoder.latent_prior is about the image of a clip's own tokens, which must not be "
                "dropped: set loss.uncond_prob to 0"
            )

    @property
    def has_frozen_tokenizer(self) -> bool:
        """Whether deep tokens stay what they are, so that they can be computed once."""
        return self.representation is not None or not self.trainable.resampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARTrainConfig(RunConfig):
    """Training of the language model on deep tokens.

    Attributes:
      model: Body, head and loss.
      tokenizer: `model` folder that reads keyframes and paints samples, or `owner/name` on the Hub.
      init: `model` folder of an earlier run that is gone on from; None starts fresh.
      body_init: A body to start from: of `convert NAME --for-dicode`, or an original, a folder or a
        name (`gpt2`), which is converted into the run's folder.
      cached_videos: Videos that are encoded once and kept; 0 encodes every batch anew.
      text_tokenizer: Folder, file or name (`gpt2`). None takes the synthetic world's own for that
        world, and for other data that of `init` or `body_init`, or one learnt from the captions, of
        up to as many ids as `model.body.vocab_size` (or about 1,000); the model's ids follow it.
      text_length: Text ids per sample, padded.
      num_keyframes: Keyframes per sample.
      caption_dropout: Share of samples that see the empty prompt, which guidance needs.
      packed: Several videos in one row; needs a token cache.
      row_length: Positions of a packed row, at most 32,768; None for room for four videos of the
        longest kind, at least 1,024, at most the body's longest sequence.
      input_noise: Noise on the tokens that are read, relative to their standard deviation.
      sample_prompts: Prompts of the sample sheet; held-out captions when empty.
      logits_temperature: By default of the pipeline that is exported, where it divides the logits
        of the mixture: a small model's light components are seldom what a caption says. None takes
        that of the tokenizer's pipeline, or 1.
    """

    model: DiCoDeLMConfig
    tokenizer: str | None = None
    init: str | None = None
    body_init: str | None = None
    cached_videos: int = 0
    text_tokenizer: str | None = None
    text_length: int = 80
    num_keyframes: int = 5
    batch_size: int = 32
    caption_dropout: float = 0.0
    packed: bool = False
    row_length: int | None = None
    input_noise: float = 0.0
    sample_prompts: tuple[str, ...] = ()
    logits_temperature: float | None = None

    def __post_init__(self):
        super().__post_init__()
        cold = self.logits_temperature
        if cold is not None and not MIN_TEMPERATURE <= cold <= 1e6:
            raise ValueError(f"logits_temperature is from 1e-6 to 1e6, got {cold}")
        if self.init is not None and self.body_init is not None:
            raise ValueError("init brings the body too: leave body_init out")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {self.caption_dropout}")
        if self.data.kind == "cache" and self.cached_videos:
            raise ValueError("cached_videos is for videos; a token cache is encoded already")
        needed = self.text_length + self.num_keyframes * (self.model.num_tokens + 1)
        if needed > self.model.body.max_seq_len:
            raise ValueError(
                f"{self.num_keyframes} keyframes after {self.text_length} text ids need {needed} "
                f"positions, the body has {self.model.body.max_seq_len}"
            )

        if self.row_length is not None and self.row_length < needed:
            raise ValueError(
                f"row_length {self.row_length} is too short for {self.num_keyframes} keyframes "
                f"after {self.text_length} text ids, which need {needed}"
            )
        if self.packed and self.packed_length > _LONGEST_ROW:
            raise ValueError(
                f"rows of {self.packed_length} positions need an attention mask of "
                f"{self.packed_length**2 / 2**30:.1f} GiB each; set row_length to "
                f"{_LONGEST_ROW} or less"
            )

    @property
    def tokenizer_folder(self) -> pathlib.Path:
        """`tokenizer`.

        Raises:
          UserError: There is none.
        """
        if self.tokenizer is None:
            raise UserError(
                "no tokenizer: name the `model` folder of a run of train.tokenizer, or a converted "
                "model (python -m convert dicode), by --tokenizer"
            )
        return pathlib.Path(self.tokenizer)

    @property
    def packed_length(self) -> int:
        """Positions of a packed row."""
        longest = self.text_length + self.num_keyframes * (self.model.num_tokens + 1)
        return self.row_length or min(self.model.body.max_seq_len, max(4 * longest, 1024))

    @property
    def packed_keyframes(self) -> int:
        """Keyframes that a packed row has room for."""
        return (self.packed_length - self.text_length) // (self.model.num_tokens + 1)

    @property
    def reads_tokens(self) -> bool:
        """Whether batches hold deep tokens; otherwise keyframes, which are encoded in the step.

        `settle` has told by then whether `data.path` is a cache.
        """
        return self.data.kind == "cache" or self.cached_videos > 0

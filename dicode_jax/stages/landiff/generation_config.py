"""What the trainings of LanDiff's language model and of its denoiser are told."""

import dataclasses
import math
from typing import Literal

from dicode_jax.models.landiff.dit import DenoiserConfig
from dicode_jax.models.landiff.language_model import NUM_PREFIX, LanguageModelConfig
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.models.t5 import T5EncoderConfig
from dicode_jax.stages.config import RunConfig

_LONGEST_ROW = 2**15  # a packed row has a mask of as many bytes as the square of its length


def _check_share(config: RunConfig, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMTrainConfig(RunConfig):
    """Training of the language model on semantic tokens of a cache (of `train.encode`).

    Attributes:
      model: Body, frames and codes.
      text: Sizes of a text encoder that learns with the model; None reads what a frozen one has
        made of the captions (`lm_text` of the cache).
      words: `tokenizer.json` of the text encoder that learns, or its folder; None takes the words
        of the shapes world.
      semantic_tokenizer: `model` folder that the codes are of, which the cache is checked by; None
        does not check.
      init: `model` folder of an earlier run that is gone on from; None starts fresh.
      segments: Most segments of a sequence.
      cut_share: Share of the sequences that end at any frame.
      late_share: Share of the sequences that begin at a later segment of a video that is long
        enough. Their first segment is seen and not learned, so that the model can go on with a
        video whose beginning it no longer sees.
      motion_scale: Times the motion of the cache makes the motion score that the model is told.
      text_length: Most text tokens, the end of the text included.
      text_dropout: Share of the sequences that see the null text, which guidance needs.
      row_samples: Sequences that may share a row; 1 does not pack.
      row_length: Positions of a row; None for the longest sequence times `row_samples`, at most the
        body's longest.
    """

    model: LanguageModelConfig = LanguageModelConfig()
    text: T5EncoderConfig | None = None
    words: str | None = None
    semantic_tokenizer: str | None = None
    init: str | None = None
    segments: int = 1
    cut_share: float = 0.0
    late_share: float = 0.0
    motion_scale: float = 1.0
    text_length: int = 512
    text_dropout: float = 0.1
    row_samples: int = 1
    row_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_share(self, "cut_share", "late_share", "text_dropout")
        if min(self.segments, self.row_samples) < 1 or self.text_length < 2:
            raise ValueError("segments and row_samples must be at least 1, text_length at least 2")
        if not 0 < self.motion_scale < math.inf:
            raise ValueError(f"motion_scale must be positive, got {self.motion_scale}")
        if self.late_share and self.segments == 1:
            raise ValueError("late_share needs a second segment to learn: set segments above 1")
        if self.text is not None and self.text.embed_dim != self.model.text_dim:
            raise ValueError(
                f"the text encoder makes vectors of {self.text.embed_dim} numbers, model.text_dim "
                f"is {self.model.text_dim}"
            )
        if self.longest > self.model.body.max_seq_len or self.longest > self.positions:
            raise ValueError(
                f"{self.segments} segments behind {self.text_length} text tokens are "
                f"{self.longest} positions; the body has {self.model.body.max_seq_len}, a row "
                f"{self.positions}"
            )
        if self.row_samples > 1 and self.positions > _LONGEST_ROW:
            raise ValueError(
                f"rows of {self.positions} positions need an attention mask of "
                f"{self.positions**2 / 2**30:.1f} GiB each; row_length is {_LONGEST_ROW} at most"
            )

    @property
    def num_frames(self) -> int:
        """Most semantic frames of a sequence."""
        return self.segments * self.model.frames.segment

    @property
    def longest(self) -> int:
        """Positions of the longest sequence, its end included."""
        frames = self.num_frames
        return NUM_PREFIX + self.text_length + self.model.frames.count(frames) + 2 * frames + 1

    @property
    def positions(self) -> int:
        """Positions of a row."""
        return self.row_length or min(
            self.longest * self.row_samples, max(self.model.body.max_seq_len, self.longest)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTrainConfig(RunConfig):
    """Training of the denoiser, or of its control branch alone, on windows of a cache.

    Attributes:
      model: Transformer, control branch and noise.
      semantic: Sizes of the frozen semantic tokenizer, whose decoder makes features of codes.
      semantic_tokenizer: `model` folder of its training, or a pipeline.
      text: Sizes of the frozen text encoder; None reads what one has made: `dit_text` of the cache.
      text_encoder: `model` folder of the language model's training, or a pipeline, with the text
        encoder and its words.
      language_model: The same of the language model that writes for this painter, where it reads
        by another text encoder, such as a later state of that run; what is exported has both. None
        takes that of `text_encoder`.
      vae: `model` folder of the autoencoder whose latents are learned, or a pipeline: for sheets of
        samples, and the cache is checked by it.
      base: Folder of a pipeline, of an earlier run or of a converted CogVideoX-2b, whose
        transformer is the base; the control branch starts as a copy of its lower layers.
      init: The same, whose whole denoiser is gone on from. Without both all weights are drawn.
      init_upsampler: Whether the upsampler comes from `init` too; without it begins anew, in the
        sizes of the config.
      trained: "control", with the upsampler, of a base that stays as it is; or "all".
      control_start: How the linear layers between control and base start. "zero" changes nothing of
        a base that can paint. Each of them feeds the next, so that none learns before the one in
        front; without a base there is nothing to keep, and "drawn" lets all of them learn at once.
      num_known: First latents of a window that are clean where there is a prefix.
      prefix_share: Share of the windows with a prefix, whose other latents alone are learned.
      window_step: Latents between the starts of the windows of a video; 0 takes the first alone.
      num_latents: First latents of a window that are seen and learned, so that a batch of the same
        cost shows more scenes; None for all. Ours.
      text_dropout: Share of the windows that see zeros in place of their text.
      semantic_weight: Weight of the squared error of the semantic latents themselves, as a guess of
        the clean ones. Ours, for models without a base: what the control branch adds to the noise
        is worth something then before the rest has learned to ask for it.
      denoising_weight: Weight of the denoiser's error. With 0 the upsampler learns alone, by
        `semantic_weight`, and the rest stays as it is: in a fraction of the time. Ours.
      detail_weight: By how much errors count more where a frame's latents have their detail, see
        `diffusion.detail`; 0, as in the release, counts all of a frame alike. Ours, for small
        objects.
      sample_steps: Sampling steps of sample sheets, and by default of what is exported.
      sample_guidance: By how much guidance exceeds 1 at most there; in what is exported too.
      text_guidance, text_temperature, motion_score: Of the language model, by default in what is
        exported.
    """

    model: DenoiserConfig = DenoiserConfig()
    semantic: SemanticTokenizerConfig = SemanticTokenizerConfig()
    semantic_tokenizer: str | None = None
    text: T5EncoderConfig | None = None
    text_encoder: str | None = None
    language_model: str | None = None
    vae: str | None = None
    base: str | None = None
    init: str | None = None
    init_upsampler: bool = True
    trained: Literal["control", "all"] = "all"
    control_start: Literal["zero", "drawn"] = "zero"
    num_known: int = 7
    prefix_share: float = 0.5
    window_step: int = 0
    num_latents: int | None = None
    text_dropout: float = 0.1
    semantic_weight: float = 0.0
    denoising_weight: float = 1.0
    detail_weight: float = 0.0
    sample_steps: int = 50
    sample_guidance: float = 6.0
    text_guidance: float = 7.5
    text_temperature: float = 1.0
    motion_score: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_share(self, "text_dropout")
        dit, grid = self.model.dit, self.semantic.grid
        for name in ("semantic_weight", "denoising_weight", "detail_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.denoising_weight and not self.semantic_weight:
            raise ValueError(
                "nothing is learned with a denoising_weight and a semantic_weight of 0: set one"
            )
        if not self.denoising_weight and self.init is None and self.base is None:
            raise ValueError(
                "with a denoising_weight of 0 the rest stays as it was drawn: name what to take it "
                "from as init or base"
            )
        if not self.init_upsampler and self.init is None:
            raise ValueError("init_upsampler says what to take of init: name that")
        if not 0 <= self.prefix_share <= 1:
            raise ValueError(f"prefix_share must be in [0, 1], got {self.prefix_share}")
        if dit.num_frames % 2 == 0:
            raise ValueError(
                "latents are decoded in pairs behind the first: model.dit.num_frames must be odd, "
                f"got {dit.num_frames}"
            )
        if not 1 <= self.seen <= dit.num_frames:
            raise ValueError(f"num_latents must be from 1 to {dit.num_frames}, got {self.seen}")
        known, is_used = self.num_known, bool(self.prefix_share)
        if not 0 <= known < (self.seen if is_used else dit.num_frames) or (is_used and not known):
            raise ValueError(
                f"num_known leaves something to learn of {self.seen} latents, and is above 0 "
                f"with a prefix_share, got {known}"
            )
        if self.window_step < 0:
            raise ValueError(f"window_step must not be negative, got {self.window_step}")
        if self.base is not None and self.init is not None:
            raise ValueError("init brings the base too: leave base out")
        if self.base is not None and self.control_start != "zero":
            raise ValueError('control that is drawn spoils its base: control_start must be "zero"')
        if self.trained == "control" and self.base is None and self.init is None:
            raise ValueError('a base that was never trained cannot stay: name it, or train "all"')
        if self.text is not None and self.text.embed_dim != dit.text_dim:
            raise ValueError(
                f"the text encoder makes vectors of {self.text.embed_dim} numbers, "
                f"model.dit.text_dim is {dit.text_dim}"
            )
        upsampler = self.model.upsampler
        sides = tuple(side * upsampler.upsampling for side in grid)
        if sides != (dit.height, dit.width) or upsampler.feature_dim != self.semantic.feature_dim:
            raise ValueError(
                f"features of {grid[0]}x{grid[1]}x{self.semantic.feature_dim} make latents of "
                f"{sides[0]}x{sides[1]} from a width of {upsampler.feature_dim}, the model's are "
                f"{dit.height}x{dit.width}"
            )

    @property
    def seen(self) -> int:
        """Latents of a window that are seen."""
        return self.model.dit.num_frames if self.num_latents is None else self.num_latents

    @property
    def segments(self) -> int:
        """Segments of semantic tokens that a window, and what it sees before it, can touch."""
        frames, segment = self.model.dit.num_frames, self.semantic.frames.segment
        if self.window_step == 0:
            return math.ceil(frames / segment)
        return 1 + math.ceil((self.model.upsampler.num_past + frames - 1) / segment)

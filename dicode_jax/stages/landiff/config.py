"""What the trainings of LanDiff's autoencoder and semantic tokenizer are told."""

import dataclasses

from dicode_jax.data.config import DataConfig
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
from dicode_jax.models.landiff.features import num_semantic_frames
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.stages.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAE3DTrainConfig(RunConfig):
    """Training of the causal autoencoder on clips of `data.num_frames` frames.

    Errors are means over pixels in [-1, 1].

    Attributes:
      model: Sizes; `scale_factor` is measured at export, so that latents have unit variance.
      init: `model` folder of an earlier run, or a converted VAE; None starts fresh.
      inflate: `init` has seen single frames alone, where all places of a kernel along time see the
        same: their sum is put on the present frame, and zeros on those before, so that a clip
        starts as frames that know nothing of each other (Yu et al., arXiv 2310.05737).
      train_encoder: Whether the encoder learns; without, latents stay what a denoiser has learned.
      lpips: Folder of a converted LPIPS; None weighs edges in its place.
      crop_size: Side of the random squares of a clip that are learned from; None takes all of it.
        Validation and sheets always see all.
      squared_weight: Weight of the squared error beside the absolute error of weight 1.
      perceptual_weight: Weight of LPIPS.
      edge_weight: Weight of the absolute error of differences between neighbours, at full, half and
        quarter size; without `lpips` alone.
      kl_weight: Weight of the KL term, averaged over latent numbers.
    """

    data: DataConfig = DataConfig(num_frames=17)
    model: AutoencoderCausal3DConfig = AutoencoderCausal3DConfig()
    init: str | None = None
    inflate: bool = False
    train_encoder: bool = True
    lpips: str | None = None
    crop_size: int | None = None
    squared_weight: float = 1.0
    perceptual_weight: float = 1.0
    edge_weight: float = 0.5
    kl_weight: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        self.model.num_decodable(self.data.num_frames)
        if self.inflate and self.init is None:
            raise ValueError("inflate changes what init names, and it names nothing")
        if not self.train_encoder and (self.init is None or self.inflate):
            raise ValueError("an encoder that stays is that of init, which inflate would change")
        for name in ("frame_size", "crop_size"):
            size, step = getattr(self, name), self.model.downsampling
            if size is not None and (size < step or size % step):
                raise ValueError(f"{name} must be a multiple of {step}, got {size}")
        if self.crop_size is not None and self.crop_size > self.frame_size:
            raise ValueError(
                f"crop_size must be at most the frame_size {self.frame_size}, got {self.crop_size}"
            )
        for name in ("squared_weight", "perceptual_weight", "edge_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideRunConfig(RunConfig):
    """A run whose frames need not be squares.

    Attributes:
      frame_width: Of frames that are `frame_size` high; None for squares.
    """

    frame_width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.frame_width is not None and self.frame_width < 1:
            raise ValueError(f"frame_width must be at least 1, got {self.frame_width}")

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.frame_size, self.frame_width or self.frame_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticTokenizerTrainConfig(WideRunConfig):
    """Training of the semantic tokenizer on features of clips of up to a segment.

    The loss is the mean squared error of features, and the commitment of tokens to their codes.

    Attributes:
      model: Sizes; grid and width of the features are the encoder's.
      features: Folder of the frozen encoder: a `vit` such as Theia, a `clip_vision`, or the image
        tower of a small DiCoDe's tokenizer; None takes that of the packaged one.
      init: `model` folder of an earlier run, or a converted tokenizer, which may have fewer tokens
        for a frame; None starts fresh.
      commitment_weight: Weight of the squared distance of tokens to their codes.
      code_decay: Decay of the moving averages that codes are.
      revive_below: A code that fewer vectors of a batch go to, on average, becomes one of them.
      kmeans_rounds: Rounds of k-means on the vectors of the first step, which start the codes; that
        step itself learns from tokens as they are.
      probe_weight: Weight of the cross-entropy of linear probes, not exported, that tell from the
        mean of a frame's features behind the codes what a scene of the shapes world shows. Ours:
        what changes features little, such as an outline, takes no code otherwise.
      patch_weight: Weight of the squared error of the colours, in [-1, 1], that a linear layer, not
        exported, reads from each feature behind the codes: those of its part of the frame. Ours.
      detail_weight: By how much the errors of features and patches count more where a frame has its
        detail, see `semantic_tokenizer.detail`; 0, as in the release, counts all parts alike. Ours,
        for small objects.
    """

    data: DataConfig = DataConfig(num_frames=49)
    model: SemanticTokenizerConfig = SemanticTokenizerConfig()
    features: str | None = None
    init: str | None = None
    commitment_weight: float = 1.0
    code_decay: float = 0.8
    revive_below: float = 2.0
    kmeans_rounds: int = 10
    probe_weight: float = 0.0
    patch_weight: float = 0.0
    detail_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.model.check_frames(num_semantic_frames(self.data.num_frames))
        if self.ema_decay:
            raise ValueError(
                "ema_decay must be 0: codes are averages of the latest tokens, which averaged "
                "weights would not make"
            )
        if not 0 <= self.code_decay < 1:
            raise ValueError(f"code_decay must be in [0, 1), got {self.code_decay}")
        names = "commitment_weight", "revive_below", "probe_weight", "patch_weight", "detail_weight"
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.kmeans_rounds < 1:
            raise ValueError(f"kmeans_rounds must be at least 1, got {self.kmeans_rounds}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(WideRunConfig):
    """What `train.encode` makes of videos for LanDiff's language model and denoiser.

    A video is what is read of up to `data.num_frames` frames, 8m + 1 of them. Of the settings of a
    training `data`, `frame_size`, `frame_width`, `dtype` and `seed` count.

    Attributes:
      tokenizer: `model` folder of the tokenizer's run, with the frozen encoder beside it.
      vae: `model` folder of the autoencoder's run; None keeps no latents.
      vae_in_chunks: Encode latents in chunks as they are decoded, in the memory of one; the release
        encodes the whole, and numbers differ.
      keep_features: Keep the encoder's features too, which are large.
      lm_text, dit_text: Folder of the frozen text encoder that the language model or the denoiser
        reads by, or of a pipeline: keeps what it makes of the first caption of a video. None keeps
        nothing, as for a text encoder that learns.
      lm_text_length, dit_text_length: Most tokens of the one, `</s>` among them; all tokens of the
        other, padding among them.
    """

    data: DataConfig = DataConfig(num_frames=49, clip_start="start")
    tokenizer: str | None = None
    vae: str | None = None
    vae_in_chunks: bool = False
    keep_features: bool = False
    lm_text: str | None = None
    dit_text: str | None = None
    lm_text_length: int = 512
    dit_text_length: int = 226

    def __post_init__(self):
        super().__post_init__()
        if min(self.lm_text_length, self.dit_text_length) < 2:
            raise ValueError("lm_text_length and dit_text_length must be at least 2")

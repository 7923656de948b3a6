"""What the trainings of LanDiff's autoencoder and semantic tokenizer are told."""

import dataclasses

from dicode_jax.data.config import DataConfig
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
from dicode_jax.stages.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAE3DTrainConfig(RunConfig):
    """Training of the causal autoencoder on clips of `data.num_frames` frames.

    Errors are means over pixels in [-1, 1].

    Attributes:
      model: Sizes; `scale_factor` is measured at export, so that latents have unit variance.
      init: `model` folder of an earlier run, or a converted VAE; None starts fresh.
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
    lpips: str | None = None
    crop_size: int | None = None
    squared_weight: float = 1.0
    perceptual_weight: float = 1.0
    edge_weight: float = 0.5
    kl_weight: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        self.model.num_latents(self.data.num_frames)
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

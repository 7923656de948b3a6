"""What the trainings of AR-Diffusion are told."""

import dataclasses
import math

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.stages.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameVAETrainConfig(RunConfig):
    """Training of the frame VAE; of its temporal part alone where the model has one.

    Errors are means over pixels: the original's sums, over as many times as an image has numbers.

    Attributes:
      model: Sizes. With `temporal`, clips of `data.num_frames` are read, and what came with `init`
        stays as it is.
      init: `model` folder of an earlier run, or a converted VAE; None starts fresh.
      lpips: Folder of a converted LPIPS; None weighs edges in its place.
      squared_weight: Weight of the squared error beside the absolute error of weight 1.
      perceptual_weight: Weight of LPIPS.
      edge_weight: Weight of the absolute error of differences between neighbours, at full, half and
        quarter size; without `lpips` alone.
      kl_weight: Weight of the KL term, averaged over latent numbers; 0 in the release.
      token_noise: Standard deviation of the noise on the unit vectors that the decoder learns from,
        in place of the posterior's own, which then learns by `kl_weight` alone; None draws from the
        posterior, as the release does.
    """

    model: FrameVAEConfig = FrameVAEConfig()
    init: str | None = None
    lpips: str | None = None
    frame_size: int = 256
    squared_weight: float = 0.0
    perceptual_weight: float = 1.0
    edge_weight: float = 1.0
    kl_weight: float = 0.0
    token_noise: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.token_noise is not None and not 0 <= self.token_noise < math.inf:
            raise ValueError(f"token_noise must not be negative, got {self.token_noise}")
        if self.frame_size != self.model.image_size:
            raise ValueError(
                f"frame_size must be the model's image_size, got {self.frame_size} and "
                f"{self.model.image_size}"
            )
        if self.model.temporal and self.init is None:
            raise ValueError(
                "the temporal decoder goes on from a trained frame VAE: name its folder as init"
            )

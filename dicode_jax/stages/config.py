"""What the configs of all trainings share, and the config of the one that is no family's own."""

import dataclasses
from typing import ClassVar, Literal

from dicode_jax.data.config import DataConfig
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training has.

    Attributes:
      data: Where the examples come from and how they are read.
      optim: Optimiser and schedule.
      num_steps: Length of the run (and of the schedule).
      batch_size: Examples per step, over all devices.
      frame_size: Height and width in pixels.
      dtype: Of the computation; parameters, norms, softmax and losses are float32.
      ema_decay: Moving average of the weights that is exported; 0 for none.
      validation_examples: The first held-out examples; the validation loss is their mean.
      sharding: The mesh of devices, and how parameters lie on it.
      seed: Of weights, data and noise.
    """

    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    num_steps: int = 10_000
    batch_size: int = 8
    frame_size: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0
    validation_examples: int = 64
    sharding: ShardingConfig = ShardingConfig()
    seed: int = 0

    RETIRED: ClassVar = {"validation_batches": "validation_examples"}

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "frame_size", "validation_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig(RunConfig):
    """Training of the autoencoder on single frames.

    Attributes:
      model: Sizes; `scale_factor` is measured at export, so that latents have unit variance.
      init: `model` folder of an earlier run that is gone on from; None starts fresh.
      l1_weight: Weight of the absolute error beside the squared error of weight 1.
      kl_weight: Weight of the KL term, averaged over latent numbers.
    """

    model: AutoencoderKLConfig
    init: str | None = None
    num_steps: int = 2000
    batch_size: int = 16
    l1_weight: float = 0.1
    kl_weight: float = 1e-3
    ema_decay: float = 0.999

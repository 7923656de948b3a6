"""Settings that the released trainings of the frame VAE share.

The original judges by LPIPS too: `--lpips FOLDER` names what `convert ar_diffusion` wrote.
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.training.optim import OptimConfig


def optim(lr: float, **options) -> OptimConfig:
    """AdamW at a constant rate."""
    return OptimConfig(lr=lr, warmup_steps=0, schedule="constant", weight_decay=1e-4, **options)


def data(num_frames: int = 1) -> DataConfig:
    """Neighbouring frames, cropped to squares."""
    return DataConfig(path="videos", num_frames=num_frames, fps=None, frame_stride=1, resize="crop")


def image_vae(lr: float, disc_start: int | None) -> FrameVAETrainConfig:
    """One random frame of each video, on one device the batch of one of the original's.

    The discriminator judges from `disc_start` on.
    """
    side = QueryTransformerConfig(remat=True)
    return FrameVAETrainConfig(
        data=data(),
        model=FrameVAEConfig(encoder=side, decoder=side),
        optim=optim(lr, accumulate_steps=2),
        num_steps=500_000,
        batch_size=32,
        dtype="bfloat16",
        disc_start=disc_start,
    )

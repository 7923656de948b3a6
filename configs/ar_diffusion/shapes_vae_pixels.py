"""Frame VAE of the small AR-Diffusion, the second part: what makes pixels of its tokens.

See shapes_vae.py. The latents stay, so that the denoiser can learn at the same time.
"""

from configs.ar_diffusion.shapes_vae import MODEL
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> FrameVAETrainConfig:
    return FrameVAETrainConfig(
        model=MODEL,
        init="runs/latents/model",
        train_encoder=False,
        frame_size=64,
        optim=OptimConfig(
            optimizer="muon",
            lr=4e-3,
            warmup_steps=50,
            schedule="wsd",
            decay_steps=500,
            weight_decay=0.0,
        ),
        num_steps=1500,
        batch_size=16,
        squared_weight=20.0,
        edge_weight=0.1,
        token_noise=0.05,
        logit_weight=3e-4,
        ema_decay=0.998,
    )

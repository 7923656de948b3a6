"""Frame VAE of the small system: 64x64 pixels to 32 tokens of 4 numbers.

python -m train.ar_diffusion_vae --config configs/ar_diffusion/shapes_vae.py --workdir runs/vae
"""

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.training.optim import OptimConfig

SIDE = QueryTransformerConfig(patch_size=8, embed_dim=128, num_layers=3, num_heads=4)


def get_config() -> FrameVAETrainConfig:
    return FrameVAETrainConfig(
        model=FrameVAEConfig(
            image_size=64,
            codebook_size=256,
            encoder=SIDE,
            decoder=SIDE,
            pixel_decoder=MaskGITDecoderConfig(
                z_channels=64,
                channels=16,
                channel_mult=(1, 1, 2, 4),
                num_res_blocks=1,
                num_groups=8,
            ),
        ),
        optim=OptimConfig(optimizer="muon", lr=5e-3, warmup_steps=50, weight_decay=0.0),
        num_steps=4000,
        batch_size=8,
        frame_size=64,
        squared_weight=10.0,
        edge_weight=0.25,
        ema_decay=0.995,
    )

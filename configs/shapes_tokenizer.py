"""Clip decoder of the small system: 16 frames of 64x64 from two keyframes' deep tokens.

python -m train.tokenizer --config configs/shapes_tokenizer.py --workdir runs/tokenizer

Measured: loss 0.066 after 2000 steps, 56 minutes on two shared CPU cores; 0.031 after 2000 more
with Muon (57 minutes):

python -m train.tokenizer --config configs/shapes_tokenizer.py --workdir runs/tokenizer_muon \
    --init runs/tokenizer/model --optim.optimizer muon --optim.lr 3e-3 --num-steps 2000
"""

from configs import shapes_parts
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> TokenizerTrainConfig:
    return TokenizerTrainConfig(
        tokenizer=shapes_parts.TOKENIZER,
        decoder=ClipDecoderConfig(
            unet=UNet3DConfig(
                in_channels=8,
                model_channels=48,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_resolutions=(2,),
                head_dim=24,
                context_dim=shapes_parts.TOKEN_DIM,
                text_context_len=1,
                init_attention=False,
                num_groups=8,
                dropout=0.0,
                temporal_dropout=0.0,
            ),
            autoencoder=AutoencoderKLConfig(num_groups=8, resolution=64),
            latent_head=shapes_parts.LATENT_HEAD,
        ),
        autoencoder="runs/autoencoder/model",
        representation="runs/representation/model",
        cached_clips=3000,
        optim=OptimConfig(lr=1e-3, warmup_steps=200, weight_decay=0.01),
        num_steps=2300,
        batch_size=8,
        ema_decay=0.998,
    )

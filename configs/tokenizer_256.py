r"""DiCoDe's released tokenizer: ViT-H/14, resampler, 256x256 UNet of DynamiCrafter's size.

python -m train.tokenizer --config configs/tokenizer_256.py --workdir runs/tokenizer_256 \
    --init models/start --data.path VIDEOS

2,203,115,835 parameters in the image tower, resampler, UNet and autoencoder that this builds.
Not trained here yet: it needs accelerators. UNet and resampler learn at 1e-5, constant, after a
start from DynamiCrafter's weights (arXiv 2412.04446, section 3.1; the released training config).
"""

from dicode_jax.data.config import DataConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> TokenizerTrainConfig:
    return TokenizerTrainConfig(
        tokenizer=DeepTokenizerConfig(),
        decoder=ClipDecoderConfig(unet=UNet3DConfig(dropout=0.1, remat="full")),
        optim=OptimConfig(
            lr=1e-5, warmup_steps=0, schedule="constant", weight_decay=0.01, clip_norm=0.0
        ),
        num_steps=100_000,  # ours: the release does not say
        batch_size=8,  # ours
        frame_size=256,
        dtype="bfloat16",
        fs=3,
        data=DataConfig(resize="stretch"),
        sample_guidance=7.5,
        sharding=ShardingConfig(data=1, fsdp=-1),
    )

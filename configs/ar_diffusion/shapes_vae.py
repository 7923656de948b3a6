"""Frame VAE of the small AR-Diffusion: 64x64 pixels to 8 tokens of 16 numbers, their first part.

python -m train.autoencoder --config configs/shapes_autoencoder.py --model.channel-mult 1 2 4 \
    --optim.optimizer muon --optim.lr 5e-3 --optim.warmup-steps 50 --num-steps 1500 \
    --workdir runs/proxy
python -m train.ar_diffusion_vae --config configs/ar_diffusion/shapes_vae.py \
    --proxy runs/proxy/model --workdir runs/latents
python -m train.ar_diffusion_vae --config configs/ar_diffusion/shapes_vae_pixels.py \
    --init runs/latents/model --workdir runs/vae

As in TiTok, the transformers learn the latents of another autoencoder before the pixel decoder
does: on one core half the time of a step, and an edge counts as much as an area. Seen:

- Draws from the posterior, kl_weight 1e-4: the means vanish in 80 steps.
- All at once, 8 numbers a token, by pixels: 17 dB until squared errors, pixels read off the patches
  and wider kernels were there, then held out 27 dB at step 1,800 and with probes 30 dB at 4,300,
  where they read the shape of 80 % of the frames. Without logit_weight the soft choice of codes
  hardens at step 360, the same code for all patches.
- 16 numbers a token, pixels read off the patches without the pixel decoder, probe_weight 0.1: the
  shape of 72 % of the batch at step 500, where it was stopped.
- So, of 16 numbers: of 44 % of the batch at step 500 with probe_weight 0.1; with 0.5 from step 574
  on of 66 % at 700, and held out of 98 % at 3,000, with an error of 0.040 of the latents' variance.
  33 minutes of one core. How much is the proxy's and how much the wider tokens' was not told apart.
"""

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.training.optim import OptimConfig

SIDE = QueryTransformerConfig(patch_size=8, embed_dim=128, num_layers=3, num_heads=4)
MODEL = FrameVAEConfig(
    image_size=64,
    num_tokens=8,
    token_dim=16,
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
)


def get_config() -> FrameVAETrainConfig:
    return FrameVAETrainConfig(
        model=MODEL,
        frame_size=64,
        optim=OptimConfig(
            optimizer="muon",
            lr=5e-3,
            warmup_steps=50,
            schedule="wsd",
            decay_steps=1000,
            weight_decay=0.0,
        ),
        num_steps=3000,
        batch_size=32,
        proxy="runs/proxy/model",
        pixel_weight=0.0,
        patch_weight=1.0,
        probe_weight=0.5,
        token_noise=0.05,
        ema_decay=0.998,
    )

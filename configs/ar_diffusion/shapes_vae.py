"""Frame VAE of the small AR-Diffusion: 64x64 pixels to 8 tokens of 8 numbers.

python -m train.ar_diffusion_vae --config configs/ar_diffusion/shapes_vae.py --workdir runs/vae

Not trained to its end yet. What was seen, from scratch:

- Draws from the posterior, Muon at 2e-3, kl_weight 1e-4, batch 16: the means vanish (divergence 2.3
  to 0.75 a number in 80 steps).
- Noise of a fixed size, Muon at 4e-3: 16.3 dB at step 160, 13.5 at 360. By step 368 the soft choice
  of codes was hard and the same for all patches of an image: two codes used, 37 % of the tanh
  saturated, hence no gradient through it. AdamW at 1e-3, on kernels drawn 2.8 times as wide, falls
  the same way after 16 dB at step 160. Hence logit_weight.
- Absolute errors of weight 1 and logit_weight 3e-3: 16 to 18 dB from step 160 to 580. Where an
  object covers less than half of what may be, the background is the best guess by absolute error.
  Squared errors of weight 20, pixels read off the patches and kernels drawn by their width, batch
  32, held out: 18.2 dB at step 250, 22.2 at 500, 24.7 at 1,000, 27.1 at 1,800 (its rate falling
  from 1,200 on): colours and places are right, every shape is a blob.
- From there with probes on the latents: 28.2 dB at step 1,000, 29.1 at 1,750, where they read the
  shape of 53 % of held-out frames and of 75 % in training, both still rising.
"""

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> FrameVAETrainConfig:
    side = QueryTransformerConfig(patch_size=8, embed_dim=128, num_layers=3, num_heads=4)
    return FrameVAETrainConfig(
        model=FrameVAEConfig(
            image_size=64,
            num_tokens=8,
            token_dim=8,
            codebook_size=256,
            encoder=side,
            decoder=side,
            pixel_decoder=MaskGITDecoderConfig(
                z_channels=64,
                channels=16,
                channel_mult=(1, 1, 2, 4),
                num_res_blocks=1,
                num_groups=8,
            ),
        ),
        frame_size=64,
        optim=OptimConfig(
            optimizer="muon",
            lr=4e-3,
            warmup_steps=50,
            schedule="wsd",
            decay_steps=2000,
            weight_decay=0.0,
        ),
        num_steps=9000,
        batch_size=32,
        squared_weight=20.0,
        edge_weight=0.1,
        token_noise=0.05,
        logit_weight=3e-4,
        patch_weight=10.0,
        probe_weight=0.1,
        ema_decay=0.998,
    )

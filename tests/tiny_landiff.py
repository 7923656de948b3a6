"""LanDiff's painter in tiny."""

from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
from dicode_jax.models.landiff.dit import DenoiserConfig, DiTConfig
from dicode_jax.models.landiff.semantic import UpsamplerConfig

TINY = DenoiserConfig(
    dit=DiTConfig(
        num_frames=2, height=4, width=6, channels=3, embed_dim=16, num_layers=3, num_heads=2,
        time_dim=5, text_len=7, text_dim=9,
    ),
    control_layers=2,
    upsampler=UpsamplerConfig(
        feature_dim=11, channels=(32, 64), num_res_blocks=1, hidden_dim=10
    ),
)  # fmt: skip
TINY_VAE = AutoencoderCausal3DConfig(
    channels=32, encoder_mult=(1, 2), decoder_mult=(1, 2), encoder_blocks=1, decoder_blocks=2,
    z_channels=3, time_factor=2,
)  # fmt: skip

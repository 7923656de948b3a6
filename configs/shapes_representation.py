"""Image tower, resampler and latent head of the small system, to the autoencoder's latents.

python -m train.tokenizer --config configs/shapes_representation.py --workdir runs/representation

Expected: not measured yet.
"""

from configs import shapes_parts
from dicode_jax.training.optim import OptimConfig
from train.configs import RepresentationTrainConfig


def get_config() -> RepresentationTrainConfig:
    return RepresentationTrainConfig(
        model=shapes_parts.representation(shapes_parts.LATENT_HEAD),
        autoencoder="runs/autoencoder/model",
        optim=OptimConfig(lr=1.5e-3, warmup_steps=200, b2=0.98, weight_decay=0.01),
        num_steps=4500,
        batch_size=32,
        probe_weight=0.3,
    )

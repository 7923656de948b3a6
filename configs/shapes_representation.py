"""Image tower, resampler and latent head of the small system, to the autoencoder's latents.

python -m train.tokenizer --config configs/shapes_representation.py --workdir runs/representation

Measured: latent error 0.020 of the variance, all probes right, after 4500 steps that went on from
2000 with a weaker probe (41 minutes on two shared CPU cores). Without the strong probe, shape was
not learned: right in 0.4 of the frames after 2000 steps.
"""

from configs import shapes_parts
from dicode_jax.stages.dicode.configs import RepresentationTrainConfig
from dicode_jax.training.optim import OptimConfig


def get_config() -> RepresentationTrainConfig:
    return RepresentationTrainConfig(
        model=shapes_parts.representation(shapes_parts.LATENT_HEAD),
        autoencoder="runs/autoencoder/model",
        optim=OptimConfig(lr=1.5e-3, warmup_steps=200, b2=0.98, weight_decay=0.01),
        num_steps=4500,
        batch_size=32,
        probe_weight=0.3,
    )

"""Trains the KL-VAE on frames of the synthetic world.

python -m train.autoencoder --config configs/shapes_autoencoder.py --workdir runs/autoencoder
"""

import dataclasses
import functools
import pathlib
import sys

import jax.numpy as jnp
from flax import nnx

from dicode_jax.data import batches
from dicode_jax.models.autoencoder_kl import AutoencoderKL
from dicode_jax.models.dicode.stages.configs import AutoencoderTrainConfig
from train import loop


def loss_fn(config: AutoencoderTrainConfig, model: AutoencoderKL, batch, rng):
    """Reconstruction of sampled latents plus the KL term; pixels in [-1, 1]."""
    images = batches.to_unit_range(batch["image"])
    posterior = model.encode(images)
    error = model.decode(posterior.sample(rng)) - images
    mse, l1 = jnp.mean(jnp.square(error)), jnp.mean(jnp.abs(error))
    kl = jnp.mean(posterior.kl()) / posterior.mean[0].size
    loss = mse + config.l1_weight * l1 + config.kl_weight * kl
    psnr = 10 * jnp.log10(4.0 / mse)
    return loss, {"mse": mse, "psnr": psnr, "kl": kl, "std": jnp.exp(0.5 * posterior.logvar).mean()}


def build(config: AutoencoderTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the KL-VAE that maps frames to latents."""
    model = AutoencoderKL(config.model, rngs=nnx.Rngs(config.seed))
    graph, trained, frozen = nnx.split(model, nnx.Param, ...)
    source = batches.FrameSource(seed=config.seed, frame_size=config.frame_size)
    held_out = batches.FrameSource(seed=config.seed + 1, split="test", frame_size=config.frame_size)
    images = jnp.stack([held_out[i]["image"] for i in range(64)])

    @nnx.jit
    def reconstruct(model, images):
        posterior = model.encode(batches.to_unit_range(images))
        return posterior.mode(), model.decode(posterior.mode())

    def sample(model: AutoencoderKL, folder: pathlib.Path, step: int) -> dict[str, float]:
        from dicode_jax.data.video import contact_sheet

        pixels = jnp.clip((reconstruct(model, images)[1] + 1) * 127.5, 0, 255).astype(jnp.uint8)
        rows = [images[:12], pixels[:12]]
        contact_sheet(folder / f"{step:06d}.png", rows, labels=["frames", "reconstructed"])
        return {"held_out_psnr": batches.psnr(images, pixels)}

    def export(model: AutoencoderKL, folder: pathlib.Path) -> None:
        from dicode_jax.weights import save_module

        latents, _ = reconstruct(model, images)
        scaled = dataclasses.replace(config.model, scale_factor=float(1 / jnp.std(latents)))
        save_module(folder, model, scaled)

    return loop.Task(
        name="autoencoder",
        config=config,
        graph=graph,
        trained=trained,
        frozen=frozen,
        loss_fn=functools.partial(loss_fn, config),
        batches=batches.make_batches(source, config.batch_size),
        sample=sample,
        export=export,
    )


if __name__ == "__main__":
    sys.exit(loop.main("train.autoencoder", build, (AutoencoderTrainConfig,)))

"""Settings that the released trainings of the denoiser share.

The original never steps its contexts: here they are fixed too, and outside of the clip norm, in
which the original's gradients of them pile up. Without classes it drops no context, and guides away
from zeros that it never saw; with them a fifth of the clips is meant to lose its class, which a
draw from the wrong distribution made 0.58, onto the context of class 0: here it is a fifth, onto a
context of its own. Weights decay in kernels alone, which at 1e-4 tells nothing.
"""

import dataclasses

from configs.ar_diffusion.released_vae import optim
from dicode_jax.data.config import DataConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.ar_diffusion.dit import DenoiserConfig, DiTConfig
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def denoiser(
    lr: float, *, clip_step: int, clip_norm: float = 1.0, parts: int = 6
) -> DiTTrainConfig:
    """Clips of 16 frames without classes; on one device the batch of one of the original's.

    Args:
      lr: Constant learning rate.
      clip_step: Frames between the starts of the clips of a video.
      clip_norm: Largest norm of the gradients.
      parts: Of 16 clips each, that make a batch.
    """
    return DiTTrainConfig(
        data=DataConfig(path="cache", kind="cache", fps=None, frame_stride=1),
        model=DenoiserConfig(dit=DiTConfig(remat=True), null="zero"),
        clip_step=clip_step,
        train_context=False,
        optim=optim(lr, accumulate_steps=parts, clip_norm=clip_norm),
        num_steps=100_000,
        batch_size=16 * parts,
        frame_size=256,
        dtype="bfloat16",
        ema_decay=0.9999,
    )


SETS = {  # learning rate and how clips are cut and clipped
    "sky": {"lr": 2e-4, "clip_step": 1},
    "taichi": {"lr": 2e-4, "clip_step": 64},
    "ucf101": {"lr": 1e-4, "clip_step": 128, "clip_norm": 0.1},
    "face": {"lr": 1e-4, "clip_step": 16, "clip_norm": 0.1, "parts": 3},
}


def of_set(name: str) -> DiTTrainConfig:
    """The released training on one of the data sets."""
    return denoiser(**SETS[name])


def with_dit(config: DiTTrainConfig, **changes) -> DiTTrainConfig:
    """The config with another transformer."""
    dit = dataclasses.replace(config.model.dit, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))


def baseline(name: str, timesteps: str) -> DiTTrainConfig:
    """All frames see all, velocities are predicted, and betas go from 8.5e-4 to 1.2e-2."""
    config = with_dit(of_set(name), mask="none")
    schedule = NoiseSchedule(linear_start=8.5e-4, linear_end=1.2e-2, parameterization="v")
    model = dataclasses.replace(config.model, schedule=schedule)
    return dataclasses.replace(config, model=model, timesteps=timesteps)

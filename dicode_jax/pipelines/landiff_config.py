"""What a pipeline of LanDiff knows besides its parts, and how it makes videos unless told."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dicode_jax.errors import UserError
from dicode_jax.pipelines import options

WRITING = ("num_clips", "guidance_scale", "motion_score", "temperature", "top_k", "top_p")
"""What of sampling is the language model's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanDiffSamplingConfig:
    """How videos are made; the defaults are those of the release's command.

    Attributes:
      num_clips: Of a stream: the first one is a window of the painter, each other what a further
        window adds. The language model is told the length, so that the first windows of a longer
        video are not those of a shorter one of the same seed; a video is made longer by giving it.
      guidance_scale: Of the language model; 1 for none.
      motion_score: How much moves, as the language model was told in training.
      temperature, top_k, top_p: How tokens are drawn; at most one of the last two.
      num_inference_steps: Of the painter, for each window.
      diffusion_guidance_scale: By how much guidance of the painter exceeds 1 at most; 0 for none.
      ramp: How that guidance changes from step to step: "released", as the release has it, whose
        ramp is of 50 steps at any number of steps, or "smooth" from 1 up.
      carry: What a further window begins with: "latents" of the one before, or its last "frames",
        encoded anew.
      history_noise: Timestep of the noise under which that beginning is seen; 0 for none.
    """

    num_clips: int = 1
    guidance_scale: float = 7.5
    motion_score: float = 0.1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_inference_steps: int = 50
    diffusion_guidance_scale: float = 6.0
    ramp: str = "released"
    carry: str = "latents"
    history_noise: int = 0

    def __post_init__(self):
        options.check(**vars(self))
        if self.top_k is not None and self.top_p is not None:
            raise UserError("top_k and top_p exclude each other; give one of them")


def check_painting(changes: Mapping[str, Any]) -> None:
    """Refuses what would change nothing where tokens are given.

    Raises:
      UserError: Something is of writing them; None says nothing.
    """
    if names := [name for name in WRITING if changes.get(name) is not None]:
        raise UserError(f"{names[0]} is of writing tokens, which are given here; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanDiffConfig:
    """What a pipeline knows besides its parts; the defaults are the release's, or ours for long.

    Attributes:
      fps: Frames per second of the videos it makes.
      prefix_latents: Latents that a further window has from the one before, an odd number.
      text_length: Most text tokens of the language model.
      max_segments: Segments that the language model has before it at most; None for all.
      sampling: Sampling defaults.
    """

    fps: float = 8.0
    prefix_latents: int = 7
    text_length: int = 512
    max_segments: int | None = None
    sampling: LanDiffSamplingConfig = LanDiffSamplingConfig()

    def __post_init__(self):
        options.check(fps=self.fps)
        count = options.Whole(1, 2**16)
        for name in ("prefix_latents", "text_length", "max_segments"):
            if (value := getattr(self, name)) is not None:
                options.named(name, count, value)
        if self.text_length < 2 or self.prefix_latents % 2 == 0:
            raise UserError(
                f"text_length must be at least 2 and prefix_latents odd, got {self.text_length} "
                f"and {self.prefix_latents}"
            )

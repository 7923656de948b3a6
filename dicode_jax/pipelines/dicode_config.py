"""What a DiCoDe pipeline knows besides its parts."""

import dataclasses

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.distributions import MIN_TEMPERATURE
from dicode_jax.pipelines import options

TEMPERATURE = options.Real(MIN_TEMPERATURE, 1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How deep tokens are drawn; the defaults are those of the released demo.

    Attributes:
      do_sample: Draw from the mixture; False takes its mean.
      var_scale: Multiplies the variances of the mixture.
      logits_temperature: Divides the logits of its components; below 1 prefers the heavier ones.
      guidance_scale: Above 1, tokens are moved away from those of the empty prompt.
      window: Most keyframes in sight at once; None for as many as the model's tables hold.
      overlap: Keyframes that the next window sees of the last one; None for half a window.
    """

    do_sample: bool = True
    var_scale: float = 0.01
    logits_temperature: float = 1.0
    guidance_scale: float = 1.0
    window: int | None = None
    overlap: int | None = None

    def __post_init__(self):
        for name, least, most in (
            ("var_scale", 0.0, 1e6),
            ("guidance_scale", 1.0, options.MAX_GUIDANCE),
        ):
            options.named(name, options.Real(least, most), getattr(self, name))
        options.named("logits_temperature", TEMPERATURE, self.logits_temperature)
        for name in ("window", "overlap"):
            if getattr(self, name) is not None:
                options.named(name, options.Whole(1), getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What a pipeline knows besides its parts.

    Attributes:
      frame_size: Height and width that videos are resized to before they are encoded; how, the
        tokenizer's config says.
      fps: Frames per second of the videos it makes.
      text_length: Text ids in front of the deep tokens; longer prompts are cut.
      sampling: How clips are painted.
      generation: How deep tokens are drawn.
    """

    frame_size: int = 256
    fps: float = 8.0
    text_length: int = 80
    sampling: SamplingConfig = SamplingConfig(batch_guidance=True)
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self):
        options.check_config(self)
        options.named("num_frames", options.Whole(1, is_even=True), self.sampling.num_frames)
        options.named("text_length", options.Whole(1), self.text_length)

"""Sampling of video latents: what it refuses (what it gives, the parity runners compare)."""

import jax.numpy as jnp
import pytest

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.latent_video import sample_latents


@pytest.mark.parametrize("option", [{"image_guidance_scale": 2.0}, {"drop_tokens": 1}])
def test_options_that_only_deep_tokens_have_are_refused(option):
    context = jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match="options of deep tokens alone"):
        sample_latents(
            lambda *_: None,
            NoiseSchedule(),
            context,
            context,
            None,
            None,
            (2, 2, 4),
            SamplingConfig(**option),
        )

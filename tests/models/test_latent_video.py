"""Sampling of video latents: what it refuses (what it gives, the parity runners compare)."""

import jax.numpy as jnp
import pytest

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.latent_video import sample_latents


def test_an_option_that_only_deep_tokens_have_is_refused():
    context = jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match="an option of deep tokens alone"):
        sample_latents(
            lambda *_: None,
            NoiseSchedule(),
            context,
            context,
            None,
            None,
            (2, 2, 4),
            SamplingConfig(drop_tokens=1),
        )

"""Sampling of video latents: which context guides which way, and what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.diffusion import guided
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models import latent_video
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


def once(predict, branches, schedule, cfg, shape, **_):
    """In place of the steps: the guided network, to be evaluated once."""
    fs = jnp.full(shape[:1], cfg.fs)
    denoise = guided.guided_denoise(
        lambda x, times, condition: predict(x, times, condition, fs),
        branches,
        guided.make_guide(cfg),
        batched=cfg.batch_guidance,
    )
    return types.SimpleNamespace(begin=lambda x: denoise(x, jnp.zeros(shape[0]), 0))


@pytest.mark.parametrize(("scale", "level"), [(1.0, 0.5), (3.0, 2.0)])
def test_guidance_leads_from_the_null_context_to_the_other_and_beyond(monkeypatch, scale, level):
    """-0.25 + scale * 0.75 of a network that paints the mean of its tokens, and what it is told."""
    monkeypatch.setattr(latent_video, "guided_steps", once)
    monkeypatch.setattr(latent_video, "run_steps", lambda steps, carry: (carry, None))

    def unet(x, times, tokens, fs):
        assert x.shape == (1, 3, 4, 5, 3)
        mean = tokens.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        return mean + 10 * x[..., 2:] + 100 * fs[0]

    contexts = [jnp.full((1, 3, 4), level) for level in (0.5, -0.25)]
    concat = jax.random.normal(jax.random.key(1), (1, 3, 4, 5, 1))
    cfg = SamplingConfig(num_frames=3, guidance_scale=scale, guidance_rescale=0.0, fs=11)
    x_init = jnp.zeros((1, 3, 4, 5, 2))
    got = sample_latents(
        unet, NoiseSchedule(), *contexts, concat, None, (4, 5, 2), cfg, x_init=x_init
    )
    np.testing.assert_allclose(got, level + 10 * concat + 1100, rtol=1e-6)

"""The guided loop: what is traced, guidance by step, given frames; settings of older folders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from dicode_jax import config as config_lib
from dicode_jax.diffusion.guidance import guide
from dicode_jax.diffusion.guided import (
    SamplingConfig,
    guided_denoise,
    make_guide,
    sample_guided,
)
from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError

X0 = NoiseSchedule(parameterization="x0")
CONFIG = SamplingConfig(num_frames=3, num_inference_steps=2, guidance_rescale=0.5)
SHAPE = (3, 4, 5, 2)
KEYS = jax.random.split(jax.random.key(0), 2)
BRANCHES = [jnp.full((2,), level) for level in (1.0, -0.5)]


def predict(x, times, condition, fs):
    """Moves with everything that it is given."""
    told = 0.1 * fs.astype(jnp.float32) + 1e-4 * times.astype(jnp.float32)
    pull = (condition + told).reshape(-1, 1, 1, 1, 1)
    return jnp.sin(x) + pull * jnp.linspace(0.0, 1.0, x.shape[1]).reshape(1, -1, 1, 1, 1)


def run(cfg, branches=2, **options):
    return sample_guided(predict, BRANCHES[:branches], X0, cfg, SHAPE, keys=KEYS, **options)[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_value_compiles_nothing_and_gives_what_it_gives_untraced(sampler):
    first = dataclasses.replace(CONFIG, sampler=sampler)
    compiled = jax.jit(lambda cfg: run(cfg))
    with compilations("<lambda>") as programs:
        before = compiled(first)
        for name, values in {
            "guidance_scale": (2.0, 3.5),
            "guidance_rescale": (0.2, 1.0),
            "eta": (0.0, 0.5),
            "fs": (1, 24),
        }.items():
            for value in values:
                after = compiled(dataclasses.replace(first, **{name: value}))
                is_deaf = name == "eta" and sampler == "unipc"  # which adds no noise
                assert (np.abs(after - before).max() > 1e-3) != is_deaf, (name, value)
    assert len(programs) == 1
    changes = {"guidance_scale": 2.0, "guidance_rescale": 0.2, "eta": 0.5, "fs": 24}
    other = dataclasses.replace(first, **changes)
    np.testing.assert_allclose(compiled(other), run(other), atol=5e-6)


def test_what_switches_a_part_off_is_another_program():
    compiled = jax.jit(lambda cfg: run(cfg, 2 if cfg.is_guided else 1))
    with compilations("<lambda>") as programs:
        for change in ({}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.0}):
            compiled(dataclasses.replace(CONFIG, **change))
    assert len(programs) == 3
    alone = dataclasses.replace(CONFIG, guidance_scale=1.0)
    np.testing.assert_allclose(compiled(alone), run(alone, 1), atol=5e-6)


def test_batched_and_separate_branches_agree():
    together = run(dataclasses.replace(CONFIG, batch_guidance=True))
    np.testing.assert_allclose(together, run(CONFIG), atol=1e-5)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("scale", "rescale"), [(3.0, 0.0), (3.0, 0.7), (7.5, 1.0)])
def test_guidance_is_its_closed_form(batched, scale, rescale):
    """Of a network that paints 2 pattern where it is told so and 0.5 pattern + 1 where not."""
    pattern = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    cond, uncond = 2 * pattern, 0.5 * pattern + 1
    cfg = dataclasses.replace(CONFIG, guidance_scale=scale, guidance_rescale=rescale)
    denoise = guided_denoise(
        lambda x, times, condition: x + condition, [cond, uncond], make_guide(cfg), batched=batched
    )
    got = denoise(jnp.zeros_like(pattern), jnp.zeros(2, jnp.int32), 0)
    guided = uncond + scale * (cond - uncond)
    spread = [x.reshape(2, -1).std(axis=1, ddof=1).reshape(2, 1, 1, 1, 1) for x in (cond, guided)]
    wanted = rescale * guided * spread[0] / spread[1] + (1 - rescale) * guided
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_guidance_may_have_a_scale_for_each_step():
    scales = jnp.array([2.0, 5.0])
    branches = [jnp.ones((2, 1, 1, 1, 1)), jnp.zeros((2, 1, 1, 1, 1))]
    _, steps = sample_guided(
        lambda x, times, condition, fs: jnp.broadcast_to(condition, x.shape),
        branches,
        X0,
        CONFIG,
        SHAPE,
        keys=KEYS,
        guide=lambda outputs, step: guide(*outputs, scales[step]),
        return_trajectory=True,
    )
    np.testing.assert_allclose(steps.x0.mean((1, 2, 3, 4, 5)), scales)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_frames_are_put_in_before_each_step_and_after_the_last(sampler):
    project = lambda x, step: x.at[:, :1].set(jnp.float32(10) + jnp.asarray(step, jnp.float32))  # noqa: E731
    latents, steps = sample_guided(
        lambda x, times, condition, fs: x,
        BRANCHES[:1],
        X0,
        dataclasses.replace(CONFIG, sampler=sampler),
        SHAPE,
        keys=KEYS,
        project=project,
        return_trajectory=True,
    )
    for step in range(2):  # the network, which gives back what it sees, saw them
        np.testing.assert_array_equal(steps.x0[step, :, 0], 10.0 + step)
    np.testing.assert_array_equal(latents[:, 0], 12.0)
    assert np.abs(latents[:, 1:]).max() < 10
    np.testing.assert_array_equal(latents[:, 1:], steps.x[-1, :, 1:])


def test_settings_pass_through_a_tree_unchanged():
    for cfg in (CONFIG, SamplingConfig(guidance_scale=1.0)):
        leaves, tree = jax.tree.flatten(cfg)
        assert jax.tree.unflatten(tree, leaves) == cfg
        assert set(leaves) <= set(vars(cfg).values())


def test_the_defaults_are_those_of_dicodes_demos():
    assert SamplingConfig() == SamplingConfig(
        num_frames=16,
        num_inference_steps=50,
        guidance_scale=7.5,
        guidance_rescale=0.7,
        sampler="ddim",
        eta=1.0,
        spacing="uniform",
        fs=6,
        drop_tokens=None,
        batch_guidance=False,
        table_dtype="float32",
        guidance_interval=(0.0, 1.0),
        deep_cache_interval=1,
    )


def test_settings_of_older_folders_load():
    """Those of a video pipeline had no `batch_guidance`, and looped over the branches."""
    video = {
        "num_frames": 16,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
        "eta": 1.0,
        "spacing": "uniform_trailing",
        "fs": 24,
        "table_dtype": "float16",
    }
    loaded = config_lib.from_dict(SamplingConfig, video)
    assert loaded == SamplingConfig(spacing="uniform_trailing", fs=24, table_dtype="float16")
    assert (loaded.sampler, loaded.batch_guidance) == ("ddim", False)
    dicode = video | {"image_guidance_scale": None, "drop_tokens": 3, "batch_guidance": True}
    loaded = config_lib.from_dict(SamplingConfig, dicode)
    assert (loaded.sampler, loaded.batch_guidance, loaded.drop_tokens) == ("ddim", True, 3)
    with pytest.raises(UserError, match=r"image_guidance_scale = 2.0 is gone"):
        config_lib.from_dict(SamplingConfig, video | {"image_guidance_scale": 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sampler": "euler"},
            r"sampler must be one of \('ddim', 'dpm\+\+', 'unipc'\), got 'euler'",
        ),
        ({"fs": 0}, "fs must be at least 1, got 0"),
        ({"guidance_interval": (0.6, 0.5)}, r"guidance_interval must ascend .*, got \(0.6, 0.5\)"),
        ({"guidance_interval": (0.0, 1.1)}, "guidance_interval must ascend within 0..1"),
        ({"deep_cache_interval": 0}, "deep_cache_interval must be at least 1, got 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)

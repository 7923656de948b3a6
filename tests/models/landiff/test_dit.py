"""LanDiff's denoiser: control that starts as nothing, two scans, full size, refusals."""

import dataclasses
import itertools
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig, DiTConfig
from dicode_jax.models.landiff.sampling import WindowSampling, guidance_ramp, sample_window
from dicode_jax.models.landiff.semantic import UpsamplerConfig
from dicode_jax.nn.rngs import ShapeRngs, TracedRngs, blank

TINY = DenoiserConfig(
    dit=DiTConfig(
        num_frames=3, height=4, width=6, channels=3, embed_dim=16, num_layers=3, num_heads=2,
        time_dim=5, text_len=7, text_dim=9,
    ),
    control_layers=2,
    upsampler=UpsamplerConfig(
        feature_dim=11, channels=(4, 8), num_res_blocks=1, hidden_dim=10, num_groups=2
    ),
)  # fmt: skip
STACKED = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, scan_layers=True))
X = jax.random.normal(jax.random.key(1), (2, 3, 4, 6, 3))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 7, 9))
SEMANTIC = jax.random.normal(jax.random.key(3), (1, 3, 4, 6, 3))
T = jnp.array([999, 3])


def alive(cfg):
    """A denoiser of stacked layers with every parameter drawn, in the form of the config."""
    graph, state = nnx.split(blank(Denoiser, STACKED))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state)
    if cfg.dit.scan_layers:
        return nnx.merge(graph, drawn)
    graph, state = nnx.split(blank(Denoiser, cfg))
    flat = dict(nnx.to_flat_state(drawn))

    def find(path):
        at = next((i for i, name in enumerate(path) if isinstance(name, int)), None)
        if at is None or path[0] == "semantic":
            return flat[path]
        stacked = flat[(*path[:at], *path[at + 1 :])]
        return stacked.replace(stacked[...][path[at]])

    leaves = [(path, find(path)) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def call(model, *args):
    graph, state = nnx.split(model)
    return jax.jit(lambda *args: nnx.merge(graph, state)(*args))(*args)


def test_both_scans_are_the_loop_and_hold_no_output_of_control():
    scanned, looped = alive(STACKED), alive(TINY)
    np.testing.assert_allclose(
        call(scanned, X, T, CONTEXT, SEMANTIC), call(looped, X, T, CONTEXT, SEMANTIC), atol=2e-5
    )
    graph, state = nnx.split(scanned)
    run = lambda s, *args: nnx.merge(graph, s)(*args)  # noqa: E731
    text = str(jax.make_jaxpr(run)(state, X, T, CONTEXT, SEMANTIC))
    positions = 7 + 3 * 2 * 3
    assert f"f32[2,{positions},16]" in text  # what a layer gives
    assert f"f32[2,2,{positions},16]" not in text  # and not that of both control layers


def test_before_training_control_adds_nothing_and_the_prediction_is_zero():
    state = jax.jit(lambda: nnx.state(Denoiser(TINY, rngs=cast(nnx.Rngs, TracedRngs(0)))))()
    kernels = {path[:-1]: x for path, x in nnx.to_flat_state(state) if path[-1] == "kernel"}
    zeros = {path[-2:] for path, x in kernels.items() if not np.any(x[...])}
    modulations = {("modulation", "linear")}
    assert zeros - modulations == {
        (0, "zero"), (1, "zero"), ("semantic", "to_latents"), ("head", "linear")
    }  # fmt: skip


def test_beside_a_prior_the_network_says_what_the_semantic_latents_leave_open():
    plain = alive(TINY)
    model = alive(dataclasses.replace(TINY, semantic_prior=0.3))
    tables = TINY.schedule.buffers
    a, s = (
        tables[name].astype(np.float64)[np.asarray(T)][:, None, None, None, None]
        for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    )
    variance = (0.3 * a) ** 2 + s**2
    seen = (X - a * SEMANTIC) / np.sqrt(variance)
    out = np.asarray(call(plain, jnp.asarray(seen, jnp.float32), T, CONTEXT, SEMANTIC), np.float64)
    v = np.asarray(call(model, X, T, CONTEXT, SEMANTIC), np.float64)
    clean = a * np.asarray(X, np.float64) - s * v
    # Of two Gaussians, the prior's and that of what is seen, and the deviation of what is left.
    by_bayes = (0.3**2 * a * X + s**2 * SEMANTIC) / variance
    deviation = 0.3 * s / np.sqrt(variance)
    np.testing.assert_allclose(clean, by_bayes - deviation * out, atol=1e-4)


def test_semantic_latents_are_of_a_frame_and_those_before_it():
    upsampler = dataclasses.replace(TINY.upsampler, num_past=2)
    model = random_module(
        lambda: Denoiser(dataclasses.replace(TINY, upsampler=upsampler), rngs=ShapeRngs())
    )
    kernel = model.semantic.to_latents.kernel
    kernel[...] = jax.random.normal(jax.random.key(5), kernel.shape)
    graph, state = nnx.split(model)
    make = jax.jit(lambda *args: nnx.merge(graph, state).semantic_latents(*args))
    features = jax.random.normal(jax.random.key(4), (1, 6, 2, 3, 11))
    whole = make(features)
    rest = make(features[:, 3:], features[:, 1:3])
    np.testing.assert_allclose(rest, whole[:, 3:], atol=1e-5)
    with pytest.raises(ValueError, match="past has 1 frames, num_past is 2"):
        model.semantic_latents(features, features[:, :1])
    first = jnp.repeat(features[:, :1], 2, axis=1)  # stands for what was before it
    np.testing.assert_allclose(make(features, first), whole, atol=1e-5)
    other = make(features.at[:, 2].add(1.0))
    moved = [not np.allclose(a, b, atol=1e-4) for a, b in zip(whole[0], other[0], strict=True)]
    assert moved == [False, False, True, True, True, False]


def test_the_release_has_its_sizes():
    cfg = DenoiserConfig(dit=DiTConfig(scan_layers=True))
    model = blank(Denoiser, cfg)
    count = lambda part: sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(part)))  # noqa: E731
    table = 34_129_920
    assert count(model.dit) == 1_727_913_792
    # Without the last norm of the control branch, which is not used.
    assert count(model.control) + count(model.semantic) == 979_141_968 - 2 * 1920
    assert count(model.semantic) == 39_242_688 + 9_232
    assert math.prod(model.dit.embed.positions.shape) == table
    assert cfg.stacks == ("dit.lower_blocks", "dit.upper_blocks", "control.blocks")
    graph, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, 13, 60, 90, 16), jnp.float32)
    features = jax.ShapeDtypeStruct((1, 13, 30, 45, 768), jnp.float32)

    def run(state, x, t, context, features):
        model = nnx.merge(graph, state)
        return model(x, t, context, model.semantic_latents(features))

    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    context = jax.ShapeDtypeStruct((2, 226, 4096), jnp.float32)
    assert jax.eval_shape(run, state, x, t, context, features).shape == x.shape


def test_what_is_of_another_size_is_refused():
    model = blank(Denoiser, TINY)
    longer = jnp.concatenate([X, X], axis=1)
    with pytest.raises(ValueError, match="at most 3 frames, got 6"):
        model(longer, T, CONTEXT, longer)
    with pytest.raises(ValueError, match="7 tokens, got 6"):
        model(X, T, CONTEXT[:, :6], SEMANTIC)
    with pytest.raises(ValueError, match="latents must be 4x6, got 4x4"):
        model(X[..., :4, :], T, CONTEXT, SEMANTIC[..., :4, :])
    with pytest.raises(ValueError, match="features of 2x2 make latents of 4x4"):
        model.semantic_latents(jnp.zeros((1, 3, 2, 2, 11)))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (DiTConfig, {"embed_dim": 1912}, "of 16, got 1912"),
        (DiTConfig, {"height": 61}, "got 61x90"),
        (DiTConfig, {"num_layers": 0}, "num_layers must be positive"),
        (DenoiserConfig, {"control_layers": 31}, r"1 to num_layers \(30\), got 31"),
        (
            DenoiserConfig,
            {"semantic_prior": 0.0},
            "semantic_prior: std must be positive and finite, got 0.0",
        ),
        (
            DenoiserConfig,
            {"semantic_prior": 0.2, "schedule": NoiseSchedule(parameterization="eps")},
            'semantic_prior: a prior needs a schedule with parameterization "v"',
        ),
        (UpsamplerConfig, {"channels": (100, 512)}, "got \\(100, 512\\)"),
        (UpsamplerConfig, {"channels": ()}, "at least one level"),
        (UpsamplerConfig, {"num_past": -1}, "num_past must be from 0 to 100, got -1"),
        (WindowSampling, {"guidance_scale": -1.0}, "must not be negative"),
        (WindowSampling, {"ramp": "steep"}, "released, smooth"),
        (WindowSampling, {"num_inference_steps": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


class Constant(nnx.Module):
    """Predicts its condition's sum everywhere."""

    cfg = TINY

    def __call__(self, x, timesteps, context, semantic):
        return jnp.zeros_like(x) + context.sum((1, 2))[:, None, None, None, None]


def test_a_prefix_comes_back_and_a_sample_depends_on_its_key_alone():
    keys, cfg = jax.random.split(jax.random.key(0), 2), WindowSampling(num_inference_steps=3)
    semantic = jnp.broadcast_to(SEMANTIC, X.shape)
    prefix = X[:, :2]
    run = jax.jit(lambda keys, context, semantic, prefix, cfg: sample_window(
        Constant(), context, semantic, cfg, keys=keys, prefix=prefix)[0])  # fmt: skip
    both = run(keys, CONTEXT, semantic, prefix, cfg)
    np.testing.assert_array_equal(both[:, :2], prefix)
    assert np.isfinite(both).all()
    alone = run(keys[1:], CONTEXT[1:], semantic[1:], prefix[1:], cfg)
    np.testing.assert_allclose(alone[0], both[1], atol=1e-5)
    with pytest.raises(ValueError, match="leaves at least one frame"):
        sample_window(Constant(), CONTEXT, semantic, cfg, keys=keys, prefix=X)
    with pytest.raises(ValueError, match="keys"):
        sample_window(Constant(), CONTEXT, semantic, cfg, keys=None)


def test_a_prefix_is_seen_under_noise_of_its_own_or_of_the_window_s_if_that_is_less():
    """The network of this one predicts what it sees of the prefix, which nothing else tells."""
    seen = []

    class Seeing(Constant):
        def __call__(self, x, timesteps, *args):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x[:, :2])
            return super().__call__(x, timesteps, *args)

    keys, prefix = jax.random.split(jax.random.key(0), 2), X[:, :2]
    semantic = jnp.broadcast_to(SEMANTIC, X.shape)
    options = {"num_inference_steps": 4, "guidance_scale": 0.0}  # at 999, 749, 499 and 249
    for timestep, equal in ((0, (True,) * 3), (500, (True, False, False))):
        cfg = WindowSampling(history_noise=timestep, **options)
        out, _ = sample_window(Seeing(), CONTEXT, semantic, cfg, keys=keys, prefix=prefix)
        jax.effects_barrier()
        np.testing.assert_array_equal(out[:, :2], prefix)  # bit for bit, whatever was shown
        assert len(seen) == 4
        got = tuple(np.allclose(a, b, atol=1e-6) for a, b in itertools.pairwise(seen))
        assert got == equal
        assert np.allclose(seen[0], prefix) == (timestep == 0)
        seen.clear()
    cfg = WindowSampling(history_noise=1000, **options)
    with pytest.raises(ValueError, match="history_noise must be below the 1000 timesteps"):
        sample_window(Constant(), CONTEXT, semantic, cfg, keys=keys, prefix=prefix)


def test_another_scale_compiles_nothing_and_a_smooth_ramp_rises():
    traced = jax.tree.structure(WindowSampling(guidance_scale=6.0))
    assert traced == jax.tree.structure(WindowSampling(guidance_scale=3.0))
    assert traced != jax.tree.structure(WindowSampling(guidance_scale=0.0))
    ramp = guidance_ramp(WindowSampling(ramp="smooth"), np.arange(999, 0, -20))
    assert ramp[0] == 0
    assert (np.diff(ramp[1:]) > 0).all()  # the second is 5e-17, which is lost beside 1
    assert ramp[-1] < 1


@pytest.mark.parametrize("count", [30, 50])
def test_the_released_ramp_counts_to_50_at_any_number_of_steps(count):
    times = np.linspace(999, 0, count, endpoint=False).astype(int)
    want = [(1 - math.cos(math.pi * ((count - int(t)) / 50) ** 5)) / 2 for t in times]
    cfg = WindowSampling(num_inference_steps=count)
    np.testing.assert_allclose(guidance_ramp(cfg, times), want, rtol=0, atol=1e-12)

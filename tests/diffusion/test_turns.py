"""Cheaper steps: guidance on some of them alone, and deep features that are used again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from dicode_jax.diffusion.guidance import guide
from dicode_jax.diffusion.guided import SamplingConfig, Turn, plan_turns, sample_guided
from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.diffusion.schedules import NoiseSchedule

V = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
CONFIG = SamplingConfig(
    num_frames=3, num_inference_steps=6, guidance_scale=2.0, guidance_rescale=0.5
)
SHAPE = (3, 4, 5, 2)
KEYS = jax.random.split(jax.random.key(0), 2)
BRANCHES = [jnp.array([1.0, 0.4]), jnp.array([-0.5, 0.1])]


def predict(x, times, condition, fs):
    return predict_deep(x, times, condition, fs, None)[0]


def predict_deep(x, times, condition, fs, deep):
    """Shallow: what the sample, the time and the condition say now; deep: what they said once."""
    told = (condition + 1e-3 * times.astype(jnp.float32)).reshape(-1, 1, 1, 1, 1)
    if deep is None:
        deep = jnp.cos(2 * x) * told
    return 0.3 * jnp.sin(x) + deep[..., ::-1] + 0.1 * told, deep


def run(changes, branches=2, **options):
    cfg = dataclasses.replace(CONFIG, **changes)

    def sampled():
        return sample_guided(predict, BRANCHES[:branches], V, cfg, SHAPE, keys=KEYS, **options)

    return jax.jit(sampled)()[0]


def test_turns_keep_to_the_interval_and_renew_deep_features():
    turns = lambda steps, **changes: plan_turns(  # noqa: E731
        dataclasses.replace(CONFIG, **changes), steps, 2
    )
    whole, one, again, one_again = Turn(2, True), Turn(1, True), Turn(2, False), Turn(1, False)
    assert turns(3) == [whole] * 3
    assert turns(4, guidance_interval=(0.25, 0.5)) == [one, whole, one, one]
    assert turns(4, guidance_interval=(0.0, 0.0)) == [one] * 4
    assert turns(5, deep_cache_interval=2) == [whole, again, whole, again, whole]
    # The second branch has nothing to use again where guidance begins.
    assert turns(6, deep_cache_interval=4, guidance_interval=(0.3, 0.7)) == [
        *(one, one_again, whole, again),
        *(one_again, one_again),
    ]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("interval", "every", "wanted"),
    [((0.0, 1.0), 1, (12, 0)), ((0.3, 0.7), 1, (8, 0)), ((0.0, 1.0), 3, (4, 8)),
     ((0.3, 0.7), 2, (4, 4))],
)  # fmt: skip
def test_branches_that_are_left_out_are_not_evaluated(batched, interval, every, wanted):
    """Counted while it runs, in branches of a batch of two samples."""
    counts = {"whole": 0, "shallow": 0}

    def counted(x, times, condition, fs, deep=None, *, keeps):
        def count(rows, name="whole" if deep is None else "shallow"):
            counts[name] += len(rows)

        jax.debug.callback(count, condition)
        out, deep = predict_deep(x, times, condition, fs, deep)
        return (out, deep) if keeps else out

    cfg = dataclasses.replace(
        CONFIG, guidance_interval=interval, deep_cache_interval=every, batch_guidance=batched
    )
    jax.block_until_ready(
        jax.jit(
            lambda: sample_guided(
                lambda *args: counted(*args, keeps=False),
                BRANCHES,
                V,
                cfg,
                SHAPE,
                keys=KEYS,
                predict_deep=lambda *args: counted(*args, keeps=True),
            )[0]
        )()
    )
    jax.effects_barrier()
    assert (counts["whole"] / 2, counts["shallow"] / 2) == wanted


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batched", [False, True])
def test_steps_outside_of_the_interval_are_those_of_scale_1(sampler, batched):
    changes = {"sampler": sampler, "batch_guidance": batched, "guidance_rescale": 0.0}
    scales = jnp.array([1.0, 1.0, 2.0, 2.0, 1.0, 1.0])
    wanted = run(changes, guide=lambda outputs, step: guide(*outputs, scales[step]))
    got = run(changes | {"guidance_interval": (0.3, 0.7)})
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert np.abs(got - run(changes)).max() > 0.01


def test_an_interval_of_no_step_is_no_guidance():
    none = run({"guidance_interval": (0.5, 0.5)})
    np.testing.assert_allclose(none, run({"guidance_scale": 1.0}, branches=1), atol=1e-6)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("changes", [{}, {"guidance_interval": (0.3, 0.7)}])
def test_whole_runs_every_step_are_the_same_bits_with_the_option(batched, changes):
    """An interval of 1 is off; that a network which could keep features then has no say in it."""
    changes = changes | {"batch_guidance": batched}
    off = run(changes)
    on = run(changes | {"deep_cache_interval": 1}, predict_deep=predict_deep)
    np.testing.assert_array_equal(on, off)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batched", [False, True])
def test_deep_features_are_those_of_the_last_whole_run(sampler, batched):
    """Beside a loop in Python whose network remembers by itself."""
    changes = {"sampler": sampler, "batch_guidance": batched}
    cached = {"deep_cache_interval": 3, "guidance_interval": (0.3, 0.7)}
    kept = {}

    def remembering(x, times, condition, fs):
        name = float(condition[0])
        step = steps.setdefault(float(times[0]), len(steps))
        is_whole = step in ((0, 2, 5) if name == 1.0 else (2,))
        out, kept[name] = predict_deep(x, times, condition, fs, None if is_whole else kept[name])
        return out

    steps, scales = {}, [1.0, 1.0, 2.0, 2.0, 1.0, 1.0]
    cfg = dataclasses.replace(CONFIG, **changes | {"guidance_rescale": 0.0})

    def denoise(outputs, step):
        return outputs[0] if scales[int(step)] == 1.0 else guide(*outputs, scales[int(step)])

    with jax.disable_jit():
        wanted = _by_hand(remembering, cfg, denoise)
    got = run(changes | cached | {"guidance_rescale": 0.0}, predict_deep=predict_deep)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert np.abs(got - run(changes | {"guidance_interval": (0.3, 0.7)})).max() > 1e-3


def _by_hand(network, cfg, join):
    """The steps of the sampler in Python; the second branch runs in the guided steps alone."""
    from dicode_jax.diffusion.guided import make_grid, make_sampler
    from dicode_jax.diffusion.samplers.base import per_sample_normal, sample
    from dicode_jax.nn.rngs import fold

    fs = jnp.full((2,), cfg.fs, jnp.int32)

    def denoise(x, times, step):
        outputs = [network(x, times, BRANCHES[0], fs)]
        if int(step) in (2, 3):
            outputs.append(network(x, times, BRANCHES[1], fs))
        return join(outputs, step)

    x = per_sample_normal(KEYS, 0, SHAPE)
    sampler, grid = make_sampler(V, cfg), make_grid(V, cfg)
    return sample(denoise, sampler, x, grid, keys=fold(KEYS, 1), use_scan=False)[0]


def test_another_scale_compiles_nothing_with_either_option():
    compiled = jax.jit(
        lambda cfg: sample_guided(
            predict, BRANCHES, V, cfg, SHAPE, keys=KEYS, predict_deep=predict_deep
        )[0]
    )
    cfg = dataclasses.replace(CONFIG, guidance_interval=(0.3, 0.7), deep_cache_interval=2)
    with compilations("<lambda>") as programs:
        first, second = (compiled(dataclasses.replace(cfg, guidance_scale=x)) for x in (2.0, 5.0))
    assert len(programs) == 1
    assert np.abs(first - second).max() > 1e-2


def test_a_network_that_keeps_no_features_is_refused():
    with pytest.raises(ValueError, match="keeps no deep features"):
        run({"deep_cache_interval": 2})

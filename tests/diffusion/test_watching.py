"""Steps that are taken some at a time: the same bits, one program, and who is told of what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from dicode_jax.diffusion.asynchronous import row_tables, run_rows
from dicode_jax.diffusion.frame_schedule import frame_schedule
from dicode_jax.diffusion.guided import (
    SamplingConfig,
    by_sample,
    guided_steps,
    sample_guided,
    starting_noise,
)
from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import Carry
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.watching import CALLS, Taken, Watch
from dicode_jax.errors import UserError

V = NoiseSchedule(zero_terminal_snr=True, parameterization="v")
CONFIG = SamplingConfig(
    num_frames=3, num_inference_steps=7, guidance_scale=2.0, guidance_rescale=0.5, eta=0.5
)
CHEAP = {"guidance_interval": (0.2, 0.7), "deep_cache_interval": 2}
SHAPE = (2, 3, 4, 5, 2)
KEYS = jax.random.split(jax.random.key(0), 2)
BRANCHES = [jnp.array([1.0, 0.4]), jnp.array([-0.5, 0.1])]
traced = []


def predict(*args):
    return predict_deep(*args, None)[0]


def predict_deep(x, times, condition, fs, deep):
    traced.append(x)
    told = (condition + 1e-3 * times.astype(jnp.float32) + 0.1 * fs.astype(jnp.float32)).reshape(
        -1, 1, 1, 1, 1
    )
    if deep is None:
        deep = jnp.cos(2 * x) * told
    return 0.3 * jnp.sin(x) + deep[..., ::-1] + 0.1 * told, deep


def make(cfg):
    return guided_steps(predict, BRANCHES, V, cfg, SHAPE, keys=KEYS, predict_deep=predict_deep)


@jax.jit
def begin(cfg):
    return by_sample(make(cfg).begin(starting_noise(KEYS, SHAPE[1:])))


@jax.jit
def advance(cfg, carry, start, stop):
    return by_sample(make(cfg).advance(by_sample(carry), start, stop)), stop + 0


@pytest.mark.parametrize(
    ("sampler", "changes"), [("ddim", {}), *((sampler, CHEAP) for sampler in SAMPLERS)]
)
def test_any_number_of_steps_at_a_time_is_one_program_and_gives_the_same_bits(sampler, changes):
    cfg = dataclasses.replace(CONFIG, sampler=sampler, **changes)
    options = {"keys": KEYS, "predict_deep": predict_deep}
    whole, _ = jax.jit(lambda cfg: sample_guided(predict, BRANCHES, V, cfg, SHAPE[1:], **options))(
        cfg
    )
    found, carry, times = [], begin(cfg), []
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {2}  # all of them rows
    with compilations("advance") as programs:
        for size in (1, 3, 7):
            now = carry
            for start in range(0, 7, size):
                now, _ = advance(cfg, now, np.int32(start), np.int32(min(start + size, 7)))
                times.append(len(traced))
            found.append(np.asarray(now.state.x))
        assert len(set(times)) == 1  # the network is traced once
    assert len(programs) == 1
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    np.testing.assert_allclose(found[0], whole, atol=5e-6)  # where sums are fused in another way
    assert np.isfinite(whole).all()


def test_rows_of_frames_some_at_a_time_are_those_of_one_scan():
    sampler = AsynchronousDDIM(schedule=NoiseSchedule(parameterization="x0"), timesteps=(1, 401))
    frames = frame_schedule(6, 2, 1, window=3).check()
    rows, x = row_tables(sampler, frames, history_noise=300), jnp.ones((2, 6, 4))
    draw = jax.random.normal(jax.random.key(1), x.shape)

    def denoise(x, times, step):
        return jnp.sin(x + 1e-3 * times[..., None].astype(jnp.float32)) * (1 + step).astype(
            jnp.float32
        )

    options = {"history": 2 * draw}
    run = jax.jit(lambda x, part: run_rows(denoise, sampler, x, rows, 3, part=part, **options)[0])
    whole = jax.jit(lambda x: run_rows(denoise, sampler, x, rows, 3, **options)[0])(draw)
    for size in (1, 4, frames.num_rows):
        part = draw
        for start in range(0, frames.num_rows, size):
            part = run(part, (start, min(start + size, frames.num_rows)))
        np.testing.assert_array_equal(part, whole)


def steps_of(watch, count, clips=1, x=None):
    """Counts the steps into the latents."""
    calls = []

    def take(x, start, stop):
        calls.append((int(start), int(stop)))
        return x + np.float32(stop - start), jnp.asarray(stop)

    def drive():
        out.append(
            (
                yield from watch.run(
                    take, jnp.zeros((2, 3)) if x is None else x, range(count, 0, -1), clips
                )
            )
        )

    out = []
    for news in drive():
        watch.tell(news)
    return calls, out[0]


def test_where_nobody_listens_a_clip_is_one_call_and_gives_no_news():
    watch = Watch()
    assert list(watch.run(lambda x, *_: (x, x), jnp.zeros(1), range(9))) == []
    assert steps_of(watch, 9)[0] == [(0, 9)]
    assert watch.ahead(9) == 1


@pytest.mark.parametrize(("count", "most"), [(4, 1), (CALLS, 1), (120, 3)])
def test_progress_ascends_to_the_total_in_few_calls(count, most):
    told = []
    watch = Watch(lambda *news: told.append(news))
    watch.expect(3 * count)
    calls, x = steps_of(watch, count, clips=2)
    assert max(stop - start for start, stop in calls) == most
    assert len(calls) <= CALLS
    steps_of(watch, count, clips=1)
    assert told[0] == ("steps", 0, 3 * count)
    done = [news[1] for news in told]
    assert done == sorted(set(done))
    assert told[-1] == ("steps", 3 * count, 3 * count)
    np.testing.assert_array_equal(x, count)


def test_a_callback_sees_each_step_once_and_may_put_other_latents():
    seen = []

    def callback(step, timestep, told):
        seen.append((step, timestep, float(told["latents"][0, 0])))
        assert told["latents"].shape == (1, 3)  # the other row fills up
        return {"latents": np.full((1, 3), 10.0)} if step == 1 else None

    calls, x = steps_of(Watch(callback=callback), 4)
    assert calls == [(i, i + 1) for i in range(4)]
    assert seen == [(0, 4, 1.0), (1, 3, 2.0), (2, 2, 11.0), (3, 1, 12.0)]
    np.testing.assert_array_equal(x, [[12.0] * 3, [4.0] * 3])


def test_what_is_put_goes_into_the_state_beside_what_is_remembered():
    carry, take = begin(CONFIG), lambda carry, *_: (carry, jnp.zeros(()))
    watch = Watch(callback=lambda *told: {"latents": 0 * told[2]["latents"]})
    after = watch.drive(take, carry._replace(memory=jnp.ones(2)), [5])
    assert isinstance(after, Carry)
    assert not np.any(after.state.x[0])
    np.testing.assert_array_equal(after.state.x[1], carry.state.x[1])
    np.testing.assert_array_equal(after.memory, 1)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"latents": np.zeros((2, 3))}, r"gave latents of shape \(2, 3\), want \(1, 3\)"),
        ({"prompt_embeds": 1}, "a dict with latents, got also 'prompt_embeds'"),
        (7, "gives None, or other latents as a dict with latents, got int"),
    ],
)
def test_what_is_no_answer_is_one_line(answer, line):
    with pytest.raises(UserError, match=line):
        steps_of(Watch(callback=lambda *_: answer), 4)


def test_what_is_held_is_told_late_and_all_at_the_end():
    told = []
    watch = Watch(lambda *news: told.append(news[1]))
    for _ in range(3):
        watch.hold(Taken(1, jnp.zeros(())))
    assert told == [1]
    watch.settle()
    assert told == [1, 2, 3]

"""Rows through one program: how they are cut, filled up, asked for, and how many fit."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.pipelines import painting
from dicode_jax.runtime import memory


def counting(count, log):
    for i in range(count):
        log.append(i)
        yield {"x": np.full(2, i, np.float32), "seed": np.uint32(i)}


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 1), (5, 2), (6, 3), (2, 4)])
def test_rows_come_back_in_order_from_batches_of_one_shape(count, size):
    seen = []

    def run(batch, clips):
        assert clips <= size
        seen.append(jax.tree.map(np.asarray, batch))
        yield batch["x"] * 10, batch["seed"]

    found = list(painting.paint(run, counting(count, []), size))
    assert [int(seed) for _, seed in found] == list(range(count))
    np.testing.assert_array_equal([x for x, _ in found], 10 * np.arange(count)[:, None] + [0, 0])
    assert {batch["x"].shape for batch in seen} == {(size, 2)}
    filled = np.concatenate([batch["seed"] for batch in seen])
    np.testing.assert_array_equal(filled, np.minimum(np.arange(len(filled)), count - 1))


def test_a_batch_runs_while_the_one_before_is_read_and_no_further():
    asked, ran, size = [], [], 2
    run = lambda batch, clips: [ran.append(1) or batch]  # noqa: E731
    for i, _ in enumerate(painting.paint(run, counting(99, asked), size)):
        batch = i // size
        assert len(ran) == min(batch + 2, 50)  # its own, and the next
        assert len(asked) == min((batch + 3) * size, 99)  # and the rows behind that


def test_clips_at_once_are_a_number_or_auto():
    assert painting.check_clips(np.int64(3)) == 3
    assert painting.check_clips("auto") is None
    for wrong in (0, -1, 2.5, None, True, "many", "3"):
        with pytest.raises(UserError, match=r'^clips_per_batch: want .*; or "auto"$'):
            painting.check_clips(wrong)


def fitting(monkeypatch, free, platform="gpu"):
    run = painting.program(lambda rows: jnp.exp(rows["x"]).sum(1))  # 4000 bytes for each row
    monkeypatch.setattr(memory, "available", lambda _: free)
    device = collections.namedtuple("Device", "platform")(platform)
    row = {"x": np.zeros(1000, np.float32)}
    return painting.clips_that_fit(run, row, ((), ()), device, shared=())


@pytest.mark.parametrize(
    ("free", "clips"), [(0, 1), (11_000, 1), (12_000, 2), (30_000, 4), (10**9, painting.MOST)]
)
def test_a_power_of_two_that_fits_in_free_memory_is_painted_at_once(monkeypatch, free, clips):
    assert fitting(monkeypatch, (free, 10**9)) == clips


def test_where_memory_is_not_known_one_clip_is_painted_and_a_cpu_takes_what_is_fast(monkeypatch):
    assert fitting(monkeypatch, None) == 1
    assert fitting(monkeypatch, None, "cpu") == painting.ON_CPU

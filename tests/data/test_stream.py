"""Batches: their order, their share per process, broken examples, and going on where one was."""

import dataclasses
import functools
import json
import logging

import numpy as np
import pytest

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.stream import BatchStream, open_stream
from dicode_jax.errors import UserError

LENGTH, BATCH = 10, 4


def draw(index, rng):
    return {"index": np.int64(index), "noise": rng.normal(size=3)}


def stream(make=draw, length=LENGTH, batch_size=BATCH, **options):
    options = {"process_index": 0, "process_count": 1, "prefetch": 2} | options
    return BatchStream(make, length, names=str, batch_size=batch_size, **options)


def take(one, count):
    batches = [next(one) for _ in range(count)]
    one.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_each_epoch_holds_everything_once_in_another_order():
    indices = take(stream(seed=1), 10)["index"].reshape(4, LENGTH)
    assert (np.sort(indices) == np.arange(LENGTH)).all()
    assert len({tuple(epoch) for epoch in indices}) == 4
    other = take(stream(seed=2), 10)["index"].reshape(4, LENGTH)
    assert (other != indices).any()


def test_without_shuffling_the_order_is_that_of_the_data():
    got = take(stream(shuffle=False), 5)
    assert got["index"].tolist() == [i % LENGTH for i in range(5 * BATCH)]
    assert got["ids"].tolist() == [str(i % LENGTH) for i in range(5 * BATCH)]


def test_randomness_goes_by_seed_and_place():
    got = take(stream(seed=7), 6)
    wanted = [np.random.default_rng((7, place)).normal(size=3) for place in range(6 * BATCH)]
    np.testing.assert_array_equal(got["noise"], wanted)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_a_batch_without_overlap(count):
    whole = [next(one) for one in [stream(seed=3)] for _ in range(5)]
    parts = [stream(seed=3, process_index=p, process_count=count) for p in range(count)]
    for batch in whole:
        rows = [next(part) for part in parts]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), batch[name])


@pytest.mark.parametrize("prefetch", [1, 5])
def test_a_restored_stream_goes_on_exactly(prefetch):
    whole = stream(seed=3)
    batches = [next(whole) for _ in range(7)]
    first = stream(seed=3, prefetch=prefetch)
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.state()))
    assert state == {"next_batch": 3, "broken": {}}
    halves = [stream(seed=3, process_index=p, process_count=2) for p in range(2)]
    for half in halves:
        half.restore(state)
    first.restore(state)
    for batch in batches[3:]:
        np.testing.assert_array_equal(next(first)["noise"], batch["noise"])
        rows = np.concatenate([next(half)["noise"] for half in halves])
        np.testing.assert_array_equal(rows, batch["noise"])


def break_some(index, rng, broken=(2, 5)):
    if index in broken:
        raise BrokenRecord(f"{index}: is no good")
    return draw(index, rng)


def test_a_broken_example_is_replaced_and_named_once(caplog):
    options = {"length": 20, "max_broken": 0.5, "seed": 3}
    one = stream(break_some, **options)
    with caplog.at_level(logging.WARNING):
        batches = [next(one) for _ in range(25)]
    assert sorted(r.getMessage() for r in caplog.records) == [
        f"left out: {i}: is no good" for i in (2, 5)
    ]
    seen = np.concatenate([batch["index"] for batch in batches])
    assert not {2, 5} & set(seen)
    counts = one.state()["broken"]
    assert set(counts) == {"2", "5"}
    assert all(count >= 5 for count in counts.values())  # five epochs
    # The others keep their places, and a stream that goes on makes the same replacements.
    untouched = take(stream(draw, length=20, seed=3), 25)
    kept = ~np.isin(untouched["index"], [2, 5])
    np.testing.assert_array_equal(seen[kept], untouched["index"][kept])
    again = stream(break_some, **options)
    again.restore({"next_batch": 10, "broken": {}})
    assert (next(again)["index"] == batches[10]["index"]).all()
    parts = [stream(break_some, process_index=p, process_count=2, **options) for p in range(2)]
    for batch in batches:
        rows = np.concatenate([next(part)["ids"] for part in parts])
        assert rows.tolist() == batch["ids"].tolist()


def test_too_many_broken_examples_stop_the_run_and_are_named():
    one = stream(functools.partial(break_some, broken=(0, 1, 2)), length=20, max_broken=0.1)
    with pytest.raises(UserError, match=r"reads failed, more than max_broken=0\.1 allow") as error:
        take(one, 100)
    assert {"0", "1", "2"} <= set(str(error.value).replace(",", " ").replace(";", " ").split())
    read = one.state()["next_batch"] * BATCH
    assert 80 <= read <= 104  # about 100 reads before a share is believed


def test_names_of_broken_examples_are_cut(monkeypatch):
    one = stream(functools.partial(break_some, broken=range(3)), max_broken=0.0, shuffle=False)
    one._rows = dataclasses.replace(one._rows, names=lambda i: f"{i}\x1b" + "x" * 4000)
    with pytest.raises(UserError, match="4 of 8 reads failed") as error:
        next(one)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_no_broken_example_is_allowed_when_none_may_be():
    one = stream(break_some, max_broken=0.0, shuffle=False)
    with pytest.raises(UserError, match="1 of 5 reads failed"):
        next(one)


def test_a_data_set_of_broken_examples_stops_at_once():
    one = stream(functools.partial(break_some, broken=range(LENGTH)), max_broken=1.0)
    with pytest.raises(
        UserError, match=r"100 examples in a row cannot be read; the last one: \d: "
    ):
        next(one)


def test_a_mistake_of_the_user_is_no_broken_example():
    def make(index, rng):
        raise UserError("the vocabulary cannot spell this")

    with pytest.raises(UserError, match="cannot spell"):
        next(stream(make))


def test_a_bug_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        next(stream(lambda index, rng: {"x": 1 / 0}))
    with pytest.raises(ValueError, match=r"x has shapes \[\(0,\), \(1,\), .* in one batch of"):
        next(stream(lambda index, rng: {"x": np.zeros(index)}, shuffle=False))


def test_what_cannot_be_batched_is_refused():
    with pytest.raises(UserError, match="batch_size 4 does not divide among 3 processes"):
        stream(process_count=3)
    with pytest.raises(UserError, match="no examples"):
        stream(length=0)


def test_workers_change_no_batch():
    batches = {}
    for workers in (0, 2):
        cfg = DataConfig(num_frames=2, num_workers=workers, prefetch=3)
        source = open_source(cfg, seed=4)
        make = functools.partial(clips.read_clip, cfg=cfg, frame_size=8)
        one = open_stream(
            source,
            lambda r, g, make=make: make(r, rng=g),
            cfg,
            batch_size=2,
            seed=4,
            process_index=0,
            process_count=1,
        )
        if workers:
            one.restore({"next_batch": 2, "broken": {}})
        else:
            next(one), next(one)
        batches[workers] = [next(one) for _ in range(4)]
        assert one.state()["next_batch"] == 6
        one.close()
    for first, second in zip(batches[0], batches[2], strict=True):
        assert first["ids"].tolist() == second["ids"].tolist()
        np.testing.assert_array_equal(first["video"], second["video"])
        np.testing.assert_array_equal(first["fps"], second["fps"])

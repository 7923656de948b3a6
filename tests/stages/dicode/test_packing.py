"""Packing: every video in one row, first fit, and rows that say what stands where."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicode_jax.data.rows import plan_rows
from dicode_jax.stages.dicode.packing import pack_row, video_length

LENGTHS = st.lists(st.integers(1, 12), max_size=60)


def first_fit(lengths, row_length, order):
    """By the definition: the first row with room, else a new one."""
    rows = []
    for index in order:
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= row_length:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@given(lengths=LENGTHS, row_length=st.integers(12, 30), seed=st.integers(0, 9))
def test_plan_is_first_fit_over_a_seeded_order(lengths, row_length, seed):
    rows = plan_rows(lengths, row_length, seed=seed)
    order = np.random.default_rng(seed).permutation(len(lengths))
    assert [row.tolist() for row in rows] == first_fit(lengths, row_length, order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_a_video_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="video 1 needs 9 positions, a row has 8"):
        plan_rows([3, 9], 8, seed=0)


def test_a_row_is_laid_out_as_its_videos_stand_alone():
    texts = [np.array([1, 2, 9], np.int32), np.array([3, 9, 9], np.int32)]
    tokens = [np.full((k, 2, 4), 10.0 * k, np.float32) for k in (2, 1)]
    row = pack_row(texts, tokens, row_length=18, max_frames=4, image_id=7, pad_id=9)
    x = 9  # where a deep token goes, and behind the last video
    ids = [1, 2, 9, 7, x, x, 7, x, x, 3, 9, 9, 7, x, x, x, x, x]
    assert row["input_ids"].tolist() == ids
    assert row["segment_ids"].tolist() == [1] * 9 + [2] * 6 + [0] * 3
    assert row["positions"].tolist() == [*range(9), *range(6), 0, 0, 0]
    slots = [4, 5, 7, 8, 13, 14]
    assert np.flatnonzero(row["token_mask"]).tolist() == slots
    assert row["frame_segments"].tolist() == [1, 1, 2, 0]
    assert row["tokens"][:, 0, 0].tolist() == [20, 20, 10, 0]
    assert video_length(2, text_length=3, num_tokens=2) == 9


def test_a_row_may_be_full():
    text, tokens = np.array([1, 2, 3, 4], np.int32), np.ones((2, 2, 4), np.float32)
    row = pack_row([text] * 2, [tokens] * 2, row_length=20, max_frames=4, image_id=7, pad_id=9)
    assert row["input_ids"].tolist() == [1, 2, 3, 4, 7, 9, 9, 7, 9, 9] * 2
    assert row["segment_ids"].tolist() == [1] * 10 + [2] * 10
    assert row["frame_segments"].tolist() == [1, 1, 2, 2]


def test_more_than_a_row_holds_is_refused():
    text, tokens = np.zeros(3, np.int32), np.zeros((2, 2, 4), np.float32)
    options = {"image_id": 7, "pad_id": 9}
    with pytest.raises(ValueError, match="2 videos need 18 positions and 4 keyframes"):
        pack_row([text] * 2, [tokens] * 2, row_length=17, max_frames=4, **options)
    with pytest.raises(ValueError, match="the row has 30 and 3"):
        pack_row([text] * 2, [tokens] * 2, row_length=30, max_frames=3, **options)


@given(lengths=LENGTHS, most=st.integers(1, 4))
def test_a_row_takes_no_more_sequences_than_it_has_room_for(lengths, most):
    rows = plan_rows(lengths, 30, seed=0, most=most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) <= most and sum(lengths[i] for i in row) <= 30 for row in rows)

"""Damaged files at each door, always the same: a result, or a refusal in one line."""

import pytest

from fuzz.doors import DOORS
from fuzz.trial import try_door


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "count"), [(0, 30), pytest.param(30, 70, marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.torch if n == "torch" else ()) for n in DOORS]
)
def test_damaged_files_are_read_or_refused(name, first, count):
    if name == "torch":
        pytest.importorskip("torch")
    outcomes, faults = try_door(name, seed=0, first=first, count=count)
    assert faults == []
    assert outcomes.total() == count
    assert outcomes["refused"] > 0

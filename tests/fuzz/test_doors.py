"""A hundred damaged files at each door, always the same: a result, or a refusal in one line."""

import pytest

from fuzz.doors import DOORS
from fuzz.trial import try_door

COUNT = 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.torch if n == "torch" else ()) for n in DOORS]
)
def test_damaged_files_are_read_or_refused(name):
    if name == "torch":
        pytest.importorskip("torch")
    outcomes, faults = try_door(name, seed=0, first=0, count=COUNT)
    assert faults == []
    assert outcomes.total() == COUNT
    assert outcomes["refused"] > 0

"""Sizes that are read off the keys of a checkpoint."""

import numpy as np
import pytest

from convert.engine.found import MAX_BLOCKS, Keys
from dicode_jax.errors import UserError


def test_blocks_are_counted_to_the_first_gap_and_no_file_may_name_any_number():
    keys = [f"a.h.{i}.x" for i in (*range(MAX_BLOCKS), MAX_BLOCKS + 1)]
    source = dict.fromkeys(keys, np.zeros(1))
    assert Keys(source, "a.").count("h.") == MAX_BLOCKS
    source[f"a.h.{MAX_BLOCKS}.x"] = np.zeros(1)
    with pytest.raises(UserError, match=rf"202 of a\.h\.\*, more than {MAX_BLOCKS}"):
        Keys(source, "a.").count("h.")

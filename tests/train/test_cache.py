"""Examples that are encoded once and read from disk afterwards."""

import numpy as np
import pytest

from dicode_jax.errors import UserError
from train.cache import Cache


class Numbers:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {"x": np.full(3, index, np.float32)}


def encode(examples):
    x = np.stack([example["x"] for example in examples])
    return {"double": 2 * x, "index": x[:, 0].astype(np.int32)}


def test_cache_keeps_the_first_examples_and_their_types(tmp_path):
    cache = Cache(tmp_path / "c.npz", Numbers(), encode, count=7, batch_size=3)
    assert len(cache) == 7
    assert cache[5]["double"].dtype == np.float16
    assert cache[5]["index"].dtype == np.int32
    np.testing.assert_array_equal(cache[5]["double"], [10, 10, 10])


def test_cache_is_read_and_not_encoded_again(tmp_path):
    Cache(tmp_path / "c.npz", Numbers(), encode, count=4, batch_size=2)
    again = Cache(tmp_path / "c.npz", Numbers(), None, count=4, batch_size=2)
    assert again[3]["index"] == 3


def test_cache_of_another_size_is_refused(tmp_path):
    Cache(tmp_path / "c.npz", Numbers(), encode, count=4, batch_size=2)
    with pytest.raises(UserError, match="holds 4 examples, the config wants 6"):
        Cache(tmp_path / "c.npz", Numbers(), encode, count=6, batch_size=2)


def test_cache_that_is_not_whole_leaves_no_file(tmp_path):
    calls = []

    def fail(examples):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return encode(examples)

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "c.npz", Numbers(), fail, count=6, batch_size=2)
    assert not list(tmp_path.iterdir())

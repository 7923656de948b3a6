"""Examples that are encoded once and read from disk afterwards."""

import numpy as np
import pytest

from dicode_jax.data.stream import BatchStream
from dicode_jax.errors import UserError
from train.cache import Cache


def stream(batch_size=3):
    return BatchStream(
        lambda index, _: {"x": np.full(3, index, np.float32)},
        100,
        names=lambda index: f"clip {index}",
        batch_size=batch_size,
        shuffle=False,
    )


def encode(batch):
    return {"double": 2 * batch["x"], "index": batch["x"][:, 0].astype(np.int32)}


def test_cache_keeps_the_first_examples_with_types_and_names(tmp_path):
    cache = Cache(tmp_path / "c.npz", stream(), encode, count=7)
    assert cache.arrays["double"].shape == (7, 3)
    assert cache.arrays["double"].dtype == np.float16
    assert cache.arrays["index"].dtype == np.int32
    np.testing.assert_array_equal(cache.arrays["double"][5], [10, 10, 10])
    assert cache.names[5] == "clip 5"


def test_cache_is_read_and_not_encoded_again(tmp_path):
    Cache(tmp_path / "c.npz", stream(), encode, count=4)
    again = Cache(tmp_path / "c.npz", stream(), None, count=4)
    assert again.arrays["index"][3] == 3


def test_cache_of_another_size_is_refused(tmp_path):
    Cache(tmp_path / "c.npz", stream(), encode, count=4)
    with pytest.raises(UserError, match="holds 4 examples, the config wants 6"):
        Cache(tmp_path / "c.npz", stream(), encode, count=6)


def test_cache_that_is_not_whole_leaves_no_file(tmp_path):
    calls = []

    def fail(batch):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "c.npz", stream(), fail, count=6)
    assert not list(tmp_path.iterdir())

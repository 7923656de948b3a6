import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.nn.kv_cache import KVCache, write
from dicode_jax.nn.masks import causal_mask, key_mask, positions_from_valid

SIZES = {"num_layers": 2, "batch": 3, "size": 7, "num_heads": 4, "head_dim": 5}


def test_empty_cache_has_static_shapes_in_both_forms():
    loop, stacked = KVCache.empty(**SIZES), KVCache.empty(**SIZES, stacked=True)
    assert [k.shape for k in loop.k] == [(3, 7, 4, 5)] * 2
    assert stacked.k.shape == (2, 3, 7, 4, 5)
    assert loop.size == stacked.size == 7
    assert loop.length == 0


def test_write_fills_the_slots_behind_the_length():
    new = jax.random.normal(jax.random.key(0), (3, 2, 4, 5))
    slots = write(jnp.zeros((3, 7, 4, 5)), new, jnp.asarray(4))
    np.testing.assert_array_equal(slots[:, 4:6], new)
    assert not slots[:, :4].any()
    assert not slots[:, 6:].any()


def test_cache_is_a_scan_carry():
    cache = KVCache.empty(**SIZES)

    def step(cache, x):
        k = tuple(write(slots, x, cache.length) for slots in cache.k)
        return KVCache(k=k, v=cache.v, length=cache.length + 1), None

    xs = jax.random.normal(jax.random.key(0), (6, 3, 1, 4, 5))
    cache, _ = jax.lax.scan(step, cache, xs)
    assert cache.length == 6
    np.testing.assert_array_equal(jnp.moveaxis(cache.k[1][:, :6], 1, 0), xs[:, :, 0])


def test_a_full_cache_says_so():
    cache = KVCache.empty(**SIZES)
    cache.check_room(7)
    with pytest.raises(ValueError, match="8 new positions do not fit in a cache of 7"):
        cache.check_room(8)
    used = KVCache(k=cache.k, v=cache.v, length=jnp.asarray(6))
    with pytest.raises(ValueError, match="7 slots and 6 are used"):
        used.check_room(2)


def test_causal_mask_with_an_offset_is_a_slice_of_the_whole():
    whole = causal_mask(6)
    np.testing.assert_array_equal(whole[0, 0], np.tril(np.ones((6, 6), bool)))
    np.testing.assert_array_equal(causal_mask(2, 6, offset=3), whole[:, :, 3:5])


def test_positions_count_valid_tokens_only():
    valid = jnp.asarray([[False, False, True, True, True], [True, True, True, False, False]])
    np.testing.assert_array_equal(positions_from_valid(valid), [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    assert key_mask(valid).shape == (2, 1, 1, 5)

"""What a pipeline is given, and what it gives, is looked at once: numbers, and finite ones."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.pipelines import checks


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        ([1.0, np.nan], None, "NaN or infinite numbers"),
        (np.array([[np.inf]], np.float16), None, "NaN or infinite numbers"),
        ([1e39], np.float32, "NaN or infinite numbers"),
        ([[1, 2], [3]], None, r"\[\[1, 2\], \[3\]\]"),
        ("seven", np.float32, "'seven'"),
        ({"a": 1}, np.float32, "{'a': 1}"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_is_no_array_of_numbers_is_refused(value, dtype, said):
    with pytest.raises(UserError, match=f"^want weights, got {said}$"):
        checks.as_array(value, "want weights", dtype)


@pytest.mark.parametrize(
    ("value", "dtype", "wanted"),
    [
        ([[1, 255]], None, np.array([[1, 255]])),
        (np.array([7], np.uint8), None, np.array([7], np.uint8)),
        ([0.5, -3e38], np.float32, np.array([0.5, -3e38], np.float32)),
        (jnp.ones(2), None, np.ones(2, np.float32)),
    ],
)
def test_numbers_are_taken_as_they_are(value, dtype, wanted):
    got = checks.as_array(value, "want weights", dtype)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_spoils_tokens_and_its_own_video_alone(value):
    tokens = np.zeros((2, 3, 4), np.float32)
    assert checks.finite_tokens(tokens, "tokenizer") is tokens
    tokens[1, 2, 3] = value
    with pytest.raises(UserError, match=r"^the tokenizer gave NaN or infinite numbers as deep"):
        checks.finite_tokens(tokens, "tokenizer")
    pixels = jnp.zeros((3, 2, 4, 5, 3)).at[1, 1, 3, 4, 2].set(value)
    shown, is_finite = checks.quantize(pixels)
    assert shown.dtype == jnp.uint8
    assert is_finite.tolist() == [True, False, True]
    sampling = types.SimpleNamespace(guidance_scale=7.5)
    checks.check_painted(is_finite[0], 0, "the decoder", sampling)
    with pytest.raises(UserError, match=r"^sample 1 came out .* of the decoder, at .* 7\.5 and"):
        checks.check_painted(is_finite[1], 1, "the decoder", sampling)

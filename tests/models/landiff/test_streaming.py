"""Long videos: which latents a window has, and what the language model sees of a long video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_module

from dicode_jax.models.landiff import streaming
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.generate import generate
from dicode_jax.models.landiff.language_model import (
    RELEASED_BODY,
    LanguageModel,
    LanguageModelConfig,
)
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.rngs import ShapeRngs, fold

BODY = LlamaConfig(
    **vars(RELEASED_BODY)
    | {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "mlp_dim": 10}
    | {"vocab_size": 12, "max_seq_len": 60}
)
LM = LanguageModelConfig(
    body=BODY, frames=FrameTokens(iframe=3, pframe=1, segment=2), codebook_size=5, text_dim=6,
    micro_dim=7, sinusoid_dim=4,
)  # fmt: skip
TEXT = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 6)), jnp.float32)
KEYS = jax.random.split(jax.random.key(3), 1)


def cut(*args, **kwargs):
    return [(w.start, w.known, w.size) for w in streaming.windows(*args, **kwargs)]


def test_clips_are_windows_of_which_each_further_one_has_a_prefix():
    assert [4 * (streaming.num_latents(n, 13, 7) - 1) + 1 for n in (1, 2, 19)] == [49, 73, 481]
    assert [4 * (streaming.num_latents(n, 5, 3) - 1) + 1 for n in (1, 2, 5)] == [17, 25, 49]
    assert cut(13, 13, 7) == [(0, 0, 13)]
    assert cut(25, 13, 7) == [(0, 0, 13), (6, 7, 13), (12, 7, 13)]
    assert cut(9, 5, 3, given=1) == [(0, 1, 5), (2, 3, 5), (4, 3, 5)]
    assert cut(15, 13, 7) == [(0, 0, 13), (6, 7, 9)]  # a video of another length
    assert cut(7, 13, 7) == [(0, 0, 7)]
    assert cut(1, 13, 7) == [(0, 0, 1)]


def test_every_latent_is_painted_once_or_given():
    for total in range(1, 30, 2):
        for given in (0, *range(1, min(5, total - 1) + 1)):
            made = streaming.windows(total, 9, 5, given)
            painted = [i for w in made for i in range(w.start + w.known, w.stop)]
            assert painted == list(range(given, total))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((12, 13, 7), "num_latents must be odd"),
        ((13, 12, 7), "window must be odd"),
        ((13, 13, 6), "prefix must be odd"),
        ((13, 13, 13), "leaves nothing of a window"),
        ((13, 13, 7, 8), "want at most 7"),
        ((3, 13, 7, 3), "want at most 2"),
    ],
)
def test_impossible_windows_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        streaming.windows(*args)


@pytest.fixture(scope="module")
def lm():
    made = random_module(lambda: LanguageModel(LM, rngs=ShapeRngs()))
    for kernel in (made.text_in.kernel, made.body.token_embed.embedding, made.body.head.kernel):
        kernel[...] *= 20
    return made


def test_a_video_that_fits_is_written_as_one(lm):
    options = {"num_frames": 5, "keys": KEYS, "temperature": 2.0}
    whole = generate(lm, TEXT, **options)
    for most in (None, 3, 4):
        parts = list(streaming.write_segments(lm, TEXT, max_segments=most, **options))
        assert [part.shape[1] for part in parts] == [4, 4, 3]
        np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), whole)


def test_a_longer_one_is_gone_on_with_from_its_last_segments(lm):
    options = {"keys": KEYS, "temperature": 2.0}
    parts = list(streaming.write_segments(lm, TEXT, num_frames=7, max_segments=2, **options))
    assert [part.shape[1] for part in parts] == [4, 4, 4, 3]
    first = generate(lm, TEXT, num_frames=4, **options)
    np.testing.assert_array_equal(jnp.concatenate(parts[:2], axis=1), first)
    before = parts[1]
    for number, part in ((2, parts[2]), (3, parts[3])):
        keys = fold(KEYS, streaming.SLID + number)
        want = generate(lm, TEXT, num_frames=4, keys=keys, temperature=2.0, given=before)[:, 4:]
        np.testing.assert_array_equal(part, want[:, : part.shape[1]])
        before = want
    alone = list(streaming.write_segments(lm, TEXT, num_frames=4, max_segments=1, **options))
    np.testing.assert_array_equal(alone[0], generate(lm, TEXT, num_frames=2, **options))
    assert len(alone) == 2


@pytest.mark.parametrize("known", [2, 3, 4])
def test_more_may_be_given_than_the_model_has_before_it(lm, known):
    options = {"keys": KEYS, "temperature": 2.0}
    there = generate(lm, TEXT, num_frames=known, **options)
    made = streaming.write_segments(lm, TEXT, num_frames=5, max_segments=1, given=there, **options)
    parts = list(made)
    assert [part.shape[1] for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1)[:, : there.shape[1]], there)
    for number in range(known // 2, 3):  # drawn by itself, behind what is given of it
        options["keys"] = fold(KEYS, streaming.SLID + number)
        behind = there[:, 4 * number :] if 2 * number < known else None
        want = generate(lm, TEXT, num_frames=2, given=behind, **options)
        np.testing.assert_array_equal(parts[number], want[:, : parts[number].shape[1]])
    options["given"] = generate(lm, TEXT, num_frames=5, **options)
    with pytest.raises(ValueError, match=r"5 frames are given, .* give fewer"):
        list(streaming.write_segments(lm, TEXT, num_frames=5, max_segments=1, **options))

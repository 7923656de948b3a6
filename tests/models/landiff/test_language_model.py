"""LanDiff's language model: where tokens lie, what is drawn, and what a batch or a segment changes.

Numbers of the release's own code are in tests/golden/landiff/lm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module

from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.generate import generate, stream_segments, stream_tokens
from dicode_jax.models.landiff.language_model import (
    NO_TOKEN,
    RELEASED_BODY,
    LanguageModel,
    LanguageModelConfig,
)
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.rngs import ShapeRngs

BODY = LlamaConfig(
    **vars(RELEASED_BODY)
    | {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "mlp_dim": 10}
    | {"vocab_size": 12, "max_seq_len": 60}
)
TINY = LanguageModelConfig(
    body=BODY,
    frames=FrameTokens(iframe=4, pframe=2, segment=3),
    codebook_size=5,
    text_dim=6,
    micro_dim=7,
    sinusoid_dim=4,
)
EOS, BOS, START_I, END_I, START_P, END_P = range(5, 11)
TEXT = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
KEYS = jax.random.split(jax.random.key(3), 2)
run = nnx.jit(lambda lm, *args: lm(*args))
DRAW = {"guidance_scale": 3.0, "temperature": 2.0}


@pytest.fixture(scope="module")
def lm():
    """Scores far apart, so that what is drawn does not hang on rounding."""
    made = random_module(lambda: LanguageModel(TINY, rngs=ShapeRngs()))
    for kernel in (made.text_in.kernel, made.text_out.kernel, made.body.token_embed.embedding):
        kernel[...] *= 10
    made.body.blocks[0].attn.out.kernel[...] *= 10
    made.body.final_norm.bias[...] *= 0
    made.body.head.kernel[...] *= 20
    return made


def test_a_frame_stands_between_marks_and_a_segment_starts_anew():
    layout = TINY.layout(5).tolist()
    iframe, pframe = [START_I, *[-1] * 4, END_I], [START_P, -1, -1, END_P]
    assert layout == [*iframe, *pframe, *pframe, *iframe, *pframe]
    released = LanguageModelConfig()
    assert len(released.layout(13)) == 1244
    assert (released.layout(121) == -1).sum() == 9 * 1218 + 330 + 3 * 74
    assert released.mark("pad") == 2054


@pytest.mark.parametrize("frames", [1, 2, 13, 14, 26, 121])
def test_counts_of_tokens_tell_the_frames(frames):
    tokens = FrameTokens()
    assert tokens.num_frames(tokens.count(frames)) == frames
    assert sum(tokens.segments(frames)) == frames


@pytest.mark.parametrize("count", [0, 329, 331, 1218 + 1, 1218 + 74])
def test_a_count_of_no_video_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} tokens make no video"):
        FrameTokens().num_frames(count)


def test_sequences_to_learn_are_laid_out_and_padding_of_a_caption_changes_nothing(lm):
    codes = jnp.asarray([[0, 1, 2, 3, 4, 0], [1, 1, 2, 2, 3, 3]])
    motion = jnp.asarray([0.1, 0.5])
    made = lm.lay_out(TEXT, codes, motion_score=motion)
    behind = [START_I, 0, 1, 2, 3, END_I, START_P, 4, 0, END_P, EOS]
    assert made.tokens[0].tolist() == [BOS, *[NO_TOKEN] * 6, *behind]
    assert made.is_learned[0].tolist() == [False] * 7 + [True] * 11
    padded = lm.lay_out(
        jnp.pad(TEXT, ((0, 0), (3, 0), (0, 0)), constant_values=9.0),
        codes,
        motion_score=motion,
        text_valid=jnp.arange(7)[None] >= jnp.full((2, 1), 3),
    )
    got = run(lm, padded.features, padded.valid)
    np.testing.assert_allclose(got[:, 6:], run(lm, made.features)[:, 3:], atol=2e-5)
    nulls = lm.lay_out(TEXT, codes, motion_score=motion, dropped=jnp.asarray([True, False]))
    np.testing.assert_array_equal(nulls.features[0, 3:7], np.tile(lm.null_text[...], (4, 1)))
    np.testing.assert_array_equal(nulls.features[1], made.features[1])
    np.testing.assert_array_equal(nulls.features[:, :3], made.features[:, :3])


def test_greedy_tokens_are_the_likeliest_of_whole_guided_sequences(lm):
    options = {"guidance_scale": 3.0, "do_sample": False, "motion_score": 0.4}
    runs = list(stream_tokens(lm, TEXT, num_frames=5, **options))
    tokens = jnp.concatenate([x for _, x in runs], axis=1)
    layout = np.concatenate([x for x, _ in runs])
    assert layout.tolist() == TINY.layout(5).tolist()
    numbers = jnp.full((2,), 5.0), jnp.full((2,), 0.4)
    scores = [
        run(
            lm,
            jnp.concatenate(
                [lm.embed_prompt(TEXT, *numbers, dropped), lm.body.embed_tokens(tokens)], axis=1
            ),
        )[:, 6:-1]
        for dropped in (None, jnp.ones(2, bool))
    ]
    guided = scores[1] + 3.0 * (scores[0] - scores[1])
    want = np.where(layout < 0, guided.argmax(-1), layout)
    np.testing.assert_array_equal(tokens, want)
    codes = generate(lm, TEXT, num_frames=5, **options)
    np.testing.assert_array_equal(codes, np.minimum(tokens[:, layout < 0], 4))
    assert len(np.unique(codes)) > 1


def test_a_caption_draws_the_same_whatever_is_beside_it_and_however_it_is_padded(lm):
    want = generate(lm, TEXT, num_frames=4, keys=KEYS, **DRAW)
    assert want.min() >= 0
    assert want.max() < 5
    short = jnp.asarray([[False, False, True, True], [True] * 4])
    mixed = generate(lm, TEXT, num_frames=4, keys=KEYS, text_valid=short, **DRAW)
    np.testing.assert_array_equal(mixed[1], want[1])
    cut = generate(lm, TEXT[:1, 2:], num_frames=4, keys=KEYS[:1], **DRAW)
    np.testing.assert_array_equal(mixed[0], cut[0])


def test_given_frames_come_back_and_are_seen(lm):
    whole = generate(lm, TEXT, num_frames=4, keys=KEYS, **DRAW)
    given = whole[:, :6]  # two frames
    got = list(stream_segments(lm, TEXT, num_frames=4, keys=KEYS, given=given, **DRAW))
    assert [x.shape[1] for x in got] == [8, 4]
    np.testing.assert_array_equal(jnp.concatenate(got, axis=1), whole)  # draws are by place
    longer = generate(lm, TEXT, num_frames=5, keys=KEYS, **DRAW)
    runs = list(stream_segments(lm, TEXT, num_frames=5, keys=KEYS, given=longer[:, :12], **DRAW))
    np.testing.assert_array_equal(jnp.concatenate(runs, axis=1), longer)  # more than a segment
    other = generate(lm, TEXT, num_frames=4, keys=KEYS, given=4 - given, **DRAW)
    np.testing.assert_array_equal(other[:, :6], 4 - given)
    assert (other[:, 6:] != whole[:, 6:]).any()


def test_the_likeliest_tokens_alone_are_drawn_when_asked_for(lm):
    greedy = generate(lm, TEXT, num_frames=2, do_sample=False, guidance_scale=1.0)
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):
        options = {"keys": KEYS, "guidance_scale": 1.0, "temperature": 9.0} | limit
        np.testing.assert_array_equal(generate(lm, TEXT, num_frames=2, **options), greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sampling needs keys"),
        ({"keys": KEYS[:1]}, "1 keys for 2 captions"),
        ({"keys": KEYS, "temperature": 0.0}, "temperature must be at least"),
        ({"keys": KEYS, "guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"keys": KEYS, "text_valid": jnp.zeros((2, 4), bool)}, "padded on the left"),
        ({"keys": KEYS, "num_frames": 10**9}, "ask for fewer frames"),
        ({"keys": KEYS, "given": jnp.full((2, 4), 5)}, "codes from 0 to 4, got 5"),
        ({"keys": KEYS, "top_k": 3, "top_p": 0.5}, "exclude each other"),
        ({"keys": KEYS, "top_k": 13}, "top_k must be from 1 to 12"),
        ({"keys": KEYS, "top_p": 0.0}, "top_p must be above 0"),
        ({"keys": KEYS, "num_frames": 0}, "at least one semantic frame"),
        ({"keys": KEYS, "num_frames": 20}, "positions, but the model has 60"),
        ({"keys": KEYS, "given": jnp.zeros((2, 12), int)}, "4 frames are given, .* has 4"),
        ({"keys": KEYS, "given": jnp.zeros((2, 5), int)}, "5 tokens make no video"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(lm, options, message):
    with pytest.raises(ValueError, match=message):
        stream_segments(lm, TEXT, **{"num_frames": 4} | options)


def test_half_precision_scores_in_float32():
    half = random_module(lambda: LanguageModel(TINY, dtype=jnp.bfloat16, rngs=ShapeRngs()))
    prompt = half.embed_prompt(TEXT, jnp.ones(2), jnp.zeros(2))
    assert half(prompt).dtype == jnp.float32
    assert half.body.init_cache(batch=1, size=2).k[0].dtype == jnp.bfloat16


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="6 codes and 7 marks need 13"):
        LanguageModelConfig(body=BODY, codebook_size=6)
    with pytest.raises(ValueError, match="iframe must be from 1"):
        FrameTokens(iframe=0)
    with pytest.raises(ValueError, match="activation must be one of silu, tanh_gelu"):
        LlamaConfig(activation="relu")
    with pytest.raises(ValueError, match="last_norm must be one of"):
        LlamaConfig(last_norm="batch")

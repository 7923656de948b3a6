"""Clips as they are painted: the same as all at once, and nothing piles up."""

import jax
import numpy as np
import pytest
from compilations import compilations
from tiny import NUM_FRAMES, NUM_TOKENS, TOKEN_DIM, tiny_pipeline, with_value

from dicode_jax.errors import UserError
from dicode_jax.models.dicode import generate
from dicode_jax.pipelines import dicode as pipelines_dicode
from dicode_jax.pipelines.dicode import DiCoDePipeline

PROMPTS = [
    "a red circle moves right on a black background",
    "a blue cross grows on a gray background",
]
CLIPS = 9  # more than the six keyframes that the tables hold


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def tokens(pipe):
    return pipe.generate_tokens(PROMPTS, num_clips=CLIPS, seed=3)


@pytest.fixture(scope="module")
def videos(pipe, tokens):
    return pipe.decode(tokens, seed=3).reshape(2, CLIPS, NUM_FRAMES, 16, 16, 3)


def close(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.fixture
def written(monkeypatch):
    """Keyframes that the language model has been asked for, as they are."""
    log = []

    def spy(*args, **options):
        for run in generate.stream_keyframes(*args, **options):
            log.append(run)
            yield run

    monkeypatch.setattr(pipelines_dicode, "stream_keyframes", spy)
    return log


def test_a_stream_is_the_videos_clip_by_clip_from_the_same_bits_of_tokens(
    pipe, tokens, videos, written
):
    clips = list(pipe.stream(PROMPTS, num_clips=CLIPS, seed=3))
    assert [clip[:2] for clip in clips] == [(s, i) for s in range(2) for i in range(CLIPS)]
    assert clips[0].frames.dtype == np.uint8
    assert close(np.stack([clip.frames for clip in clips]), videos.reshape(-1, *videos.shape[2:]))
    found = np.concatenate(written, axis=1).reshape(tokens.shape)
    np.testing.assert_array_equal(found, tokens)


def test_keyframes_are_written_and_kept_only_as_far_as_the_next_clips_need(pipe, written):
    live, clips = [], pipe.stream(PROMPTS[0], num_clips=60, clips_per_batch=1)
    for clip in clips:
        assert len(written) == min(clip.index + 4, 61)
        written[:] = [None] * len(written)
        live.append(sum(x.nbytes for x in jax.live_arrays()))
    # From the second window on, where all programs have been compiled.
    assert max(live[40:]) <= max(live[10:40])


@pytest.mark.parametrize("clips_per_batch", [1, 4])
def test_clips_do_not_depend_on_how_many_are_painted_at_once(pipe, tokens, videos, clips_per_batch):
    options = {"seed": 3, "clips_per_batch": clips_per_batch}
    clips = list(pipe.decode_stream(tokens[:, :4], **options))
    painted = np.stack([clip.frames for clip in clips]).reshape(2, 3, *videos.shape[2:])
    assert close(painted, videos[:, :3])
    alone = pipe.decode(tokens[1, :4], **options | {"seed": 4})
    assert close(alone.reshape(painted[1].shape), videos[1, :3])


def test_tokens_of_a_video_begin_those_of_a_longer_one_and_compile_nothing(pipe, tokens):
    generate._begin.clear_cache()
    generate._go_on.clear_cache()
    with compilations("_begin") as begun, compilations("_go_on") as gone_on:
        for clips in (1, 4, CLIPS):
            short = pipe.generate_tokens(PROMPTS[0], num_clips=clips, seed=3)
            np.testing.assert_array_equal(short[0], tokens[0, : clips + 1])
    assert len(begun) == 2  # behind the text, and behind some keyframes
    assert len(gone_on) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clips": 0}, "num_clips: want a whole number from 1 to 1000000"),
        ({"num_clips": None}, "num_clips: "),
        ({"clips_per_batch": 0}, "clips_per_batch: "),
        ({"seed": -1}, "seed: "),
        ({"num_frames": 3}, "num_frames must be even"),
        ({"steps": 3}, "there is no option steps"),
        ({"prompt": ""}, "empty"),
    ],
)
def test_mistakes_are_told_at_the_call(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe.stream(**{"prompt": PROMPTS[0]} | options)


def test_a_stream_names_the_sample_that_is_no_picture(pipe):
    tokens = np.zeros((2, 3, NUM_TOKENS, TOKEN_DIM), np.float32)
    tokens[1, 2] = 3e38
    clips = pipe.decode_stream(tokens, clips_per_batch=1)
    assert [next(clips).index for _ in range(3)] == [0, 1, 0]
    with pytest.raises(UserError, match=r"^sample 1 came out as NaN"):
        next(clips)
    parts = pipe.parts | {"language_model": with_value(pipe.language_model, np.nan)}
    bad = DiCoDePipeline(**parts, text=pipe.text, config=pipe.config)
    with pytest.raises(UserError, match="weights of language_model and decoder"):
        next(bad.stream(PROMPTS[0]))

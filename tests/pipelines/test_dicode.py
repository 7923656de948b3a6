"""DiCoDePipeline: what depends on what, round trips, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import NUM_FRAMES, NUM_TOKENS, TOKEN_DIM, tiny_pipeline

from dicode_jax.errors import UserError
from dicode_jax.pipelines.dicode import DiCoDePipeline

PROMPTS = [
    "a red circle moves right on a black background",
    "a small blue cross grows on a gray background",
    "a white square stays still on a navy background",
]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def videos(pipe):
    return pipe(PROMPTS, num_clips=2, seed=3)


def close(a, b):
    """Equal up to one level: sums run in another order in another batch size."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_video_has_all_clips_of_all_prompts(videos):
    assert videos.shape == (3, 2 * NUM_FRAMES, 16, 16, 3)
    assert videos.dtype == np.uint8
    assert videos.std() > 0


def test_sample_does_not_depend_on_the_batch_around_it(pipe, videos):
    assert close(pipe(PROMPTS[:1], num_clips=2, seed=3)[0], videos[0])
    assert close(pipe(PROMPTS[:2], num_clips=2, seed=3)[1], videos[1])


def test_first_clip_does_not_depend_on_how_many_follow(pipe, videos):
    assert close(pipe(PROMPTS[0], num_clips=1, seed=3)[0], videos[0, :NUM_FRAMES])


def test_same_seed_repeats_and_another_seed_differs(pipe, videos):
    again = pipe(PROMPTS, num_clips=2, seed=3)
    np.testing.assert_array_equal(again, videos)
    assert not close(pipe(PROMPTS, num_clips=2, seed=4), videos)


def test_saved_pipeline_gives_the_same_video(pipe, videos, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiCoDePipeline.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(loaded(PROMPTS, num_clips=2, seed=3), videos)


def test_weights_are_kept_in_the_type_that_is_asked_for(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    half = DiCoDePipeline.from_pretrained(
        tmp_path / "model", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    for module in half.parts.values():
        types = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(module))}
        assert types == {"bfloat16"}
    video = half(PROMPTS[0], seed=3)
    assert video.shape == (1, NUM_FRAMES, 16, 16, 3)


def test_video_of_any_size_is_encoded_and_painted_again(pipe):
    video = np.random.default_rng(0).integers(0, 256, (7, 20, 30, 3), dtype=np.uint8)
    tokens = pipe.encode(video, keyframes=[0, 3, 6])
    assert tokens.shape == (3, NUM_TOKENS, TOKEN_DIM)
    assert pipe.decode(tokens).shape == (2 * NUM_FRAMES, 16, 16, 3)
    assert pipe.reconstruct(video).shape == (NUM_FRAMES, 16, 16, 3)


def test_keyframes_are_encoded_each_alone(pipe):
    video = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    tokens = pipe.encode(video, keyframes=[0, 1, 2, 3])
    np.testing.assert_allclose(pipe.encode(video, keyframes=[2, 0]), tokens[[2, 0]], atol=1e-6)


def test_guidance_and_steps_change_the_video(pipe, videos):
    tokens = pipe.generate_tokens(PROMPTS[0], seed=3)[0]
    default = pipe.decode(tokens)
    assert not close(pipe.decode(tokens, num_inference_steps=3), default)
    assert not close(pipe.decode(tokens, guidance_scale=1.0), default)


def test_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match=r"has 40 tokens; the model reads the first 14"):
        pipe.generate_tokens(" ".join(["red"] * 40))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(""), "empty"),
        (lambda p: p("a red circle ☃"), "never seen"),
        (lambda p: p(PROMPTS[0], num_clips=0), "num_clips must be at least 1, got 0"),
        (lambda p: p(PROMPTS[0], num_frames=3), "num_frames must be even, got 3"),
        (lambda p: p(PROMPTS[0], num_inference_steps=0), "num_inference_steps must be at least 1"),
        (lambda p: p(PROMPTS[0], num_inference_steps=501), "501"),
        (lambda p: p.encode(np.zeros((1, 8, 8, 3), np.uint8)), "two keyframes"),
        (lambda p: p.encode(np.zeros((4, 8, 8, 3), np.float32)), "uint8"),
        (lambda p: p.decode(np.zeros((2, 5, 8), np.float32)), r"shape \(2, 5, 8\)"),
        (
            lambda p: p.decode(np.full((2, NUM_TOKENS, TOKEN_DIM), np.nan, np.float32)),
            "NaN or infinite",
        ),
        (lambda p: DiCoDePipeline.from_pretrained("no such model"), "no model 'no such model'"),
    ],
)
def test_mistake_is_one_clear_line(pipe, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(pipe)
    assert "\n" not in str(caught.value)

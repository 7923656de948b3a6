"""Videos of a tiny AR-Diffusion: what a class, a lag and given frames mean."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_ar_diffusion import DIT, VAE, make

import dicode_jax
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE
from dicode_jax.pipelines.ar_diffusion import ARDiffusionConfig, ARDiffusionPipeline


@pytest.fixture(scope="module")
def pipe():
    return make()


def test_videos_depend_on_class_and_seed_alone(pipe):
    both = pipe(["Crawling", 0], seed=[7, 8])
    assert both.shape == (2, 5, 8, 8, 3)
    assert both.dtype == np.uint8
    for prompt in (" crawling", "2", 2, np.int64(2)):
        np.testing.assert_array_equal(pipe(prompt, seed=7)[0], both[0])
    np.testing.assert_array_equal(pipe("archery", seed=8)[0], both[1])
    assert not np.array_equal(pipe("Archery", seed=7)[0], both[0])


def test_frames_leave_in_order_and_as_soon_as_they_are_done(pipe):
    whole = pipe("Archery", seed=1)
    clips = list(pipe.stream("Archery", seed=1))
    assert [(clip.sample, clip.index) for clip in clips] == [(0, i) for i in range(5)]
    np.testing.assert_array_equal(np.concatenate([clip.frames for clip in clips]), whole[0])


def test_given_frames_come_back_bit_for_bit(pipe):
    video = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    plain = pipe(0, video=video, num_frames=4)
    noisy = pipe(0, video=video, num_frames=4, history_noise=400)
    for got in (plain, noisy):
        np.testing.assert_array_equal(got[0, :2], video)
    assert not np.array_equal(plain[0, 2:], noisy[0, 2:])
    np.testing.assert_array_equal(pipe(0, image=video[0], num_frames=3)[0, 0], video[0])
    assert pipe(0, image=np.zeros((10, 14, 3), np.uint8), num_frames=3).shape == (1, 3, 8, 8, 3)


def test_a_reconstruction_is_the_vae_s_of_each_frame_by_itself(pipe):
    video = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = pipe.reconstruct(video)
    assert found.shape == video.shape
    vae = pipe.parts["vae"]
    latents = unit(vae.encode(jnp.asarray(video[None, 1:2], jnp.float32) / 255))
    wanted = np.clip(np.round(np.asarray(vae.decode(latents))[0, 0] * 255), 0, 255)
    assert np.abs(found[1] - wanted).max() <= 1  # rounding
    with pytest.raises(UserError, match="a video is uint8"):
        pipe.reconstruct(video[0])


def test_a_saved_pipeline_gives_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = dicode_jax.load(tmp_path / "model")
    assert isinstance(loaded, ARDiffusionPipeline)
    assert loaded.config == pipe.config
    np.testing.assert_array_equal(loaded(1, lag=0, num_frames=4), pipe(1, lag=0, num_frames=4))


def test_a_model_without_classes_takes_no_prompt():
    pipe = make(num_classes=0)
    assert pipe(num_frames=2, lag=6).shape == (1, 2, 8, 8, 3)
    with pytest.raises(UserError, match="takes no prompt, got 'Archery'"):
        pipe("Archery")


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("Diving", {}, "from 0 to 2 or a name, such as Archery"),
        (3, {}, "from 0 to 2"),
        (None, {}, "from 0 to 2"),
        (0, {"lag": 1}, r"4 \* lag must reach the 6 steps, so lag 2 at least"),
        (0, {"lag": 7}, "from 0 to the 6 steps"),
        (0, {"lag": 2.5}, "lag"),
        (0, {"num_inference_steps": 501}, "501"),
        (0, {"history_noise": 1000}, "history_noise"),
        (0, {"image": np.zeros((8, 8, 3))}, "uint8"),
        (0, {"video": np.zeros((5, 8, 8, 3), np.uint8)}, "5 frames are given"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(pipe, prompt, options, words):
    with pytest.raises(UserError, match=words):
        pipe.stream(prompt, **options)


def test_parts_that_do_not_fit_are_refused():
    parts = {"denoiser": Denoiser(DenoiserConfig(dit=DIT), rngs=nnx.Rngs(0))}
    other = dataclasses.replace(VAE, num_tokens=2)
    parts["vae"] = FrameVAE(other, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="3 tokens of 4 numbers"):
        ARDiffusionPipeline(parts, config=ARDiffusionConfig())

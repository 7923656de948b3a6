"""Videos of a tiny AR-Diffusion: what a class, a lag and given frames mean."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import dicode_jax
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig, DiTConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.pipelines.ar_diffusion import (
    ARDiffusionConfig,
    ARDiffusionPipeline,
    FrameSamplingConfig,
)

SIDE = QueryTransformerConfig(patch_size=4, embed_dim=12, num_layers=1, num_heads=3)
VAE = FrameVAEConfig(
    image_size=8,
    num_tokens=3,
    token_dim=4,
    codebook_size=7,
    encoder=SIDE,
    decoder=SIDE,
    pixel_decoder=MaskGITDecoderConfig(
        z_channels=6, channels=4, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=2
    ),
)
DIT = DiTConfig(
    num_frames=4,
    num_tokens=3,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    context_len=2,
    context_dim=5,
)
SAMPLING = FrameSamplingConfig(num_frames=5, num_inference_steps=6, lag=2)


def alive(module, seed):
    """The module with every parameter drawn, so that no branch is zero."""
    graph, state = nnx.split(module)
    rng = np.random.default_rng(seed)
    draw = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return nnx.merge(graph, nnx.map_state(lambda _, v: v.replace(draw(v[...])), state))


def make(num_classes=3, **config):
    denoiser = DenoiserConfig(dit=DIT, num_classes=num_classes)
    parts = {
        "denoiser": alive(Denoiser(denoiser, rngs=nnx.Rngs(0)), 0),
        "vae": alive(FrameVAE(VAE, rngs=nnx.Rngs(1)), 1),
    }
    if num_classes:
        config = {"class_names": ("Archery", "Basketball", "Crawling")} | config
    return ARDiffusionPipeline(parts, config=ARDiffusionConfig(sampling=SAMPLING, **config))


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

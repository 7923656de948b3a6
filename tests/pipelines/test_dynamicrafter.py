"""DynamiCrafterPipeline: what enters the video, what does not, and what is refused."""

import dataclasses

import numpy as np
import pytest
from tiny import random_module, with_value

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.dynamicrafter import PARTS, DynamiCrafterConfig, DynamiCrafterPipeline
from dicode_jax.storage import weights
from dicode_jax.text import clip as clip_text

FRAMES, TOKENS, WIDTH, TEXT = 4, 3, 8, 5
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
VOCAB = 512 + len(MERGES) + 2
CONFIGS = {
    "unet": UNet3DConfig(
        in_channels=8,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        temporal_attention=False,
        temporal_conv=False,
        init_attention=False,
        head_dim=8,
        context_dim=WIDTH,
        text_context_len=TEXT,
        context_rule="length",
        image_tokens_per_frame=TOKENS,
        num_groups=4,
    ),
    "autoencoder": AutoencoderKLConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4, mid_attention=False
    ),
    "text_tower": CLIPTextConfig(
        max_seq_len=TEXT, vocab_size=VOCAB, embed_dim=WIDTH, num_layers=2, num_heads=2, output_dim=6
    ),
    "image_tower": CLIPVisionConfig(
        image_size=16, patch_size=8, embed_dim=12, num_layers=1, num_heads=2, output_dim=6
    ),
    "resampler": ResamplerConfig(
        dim=16,
        depth=1,
        head_dim=8,
        num_heads=2,
        num_queries=TOKENS,
        embed_dim=12,
        output_dim=WIDTH,
        video_length=FRAMES,
    ),
}


def make(*, interpolation=False):
    parts = {
        name: random_module(lambda kind=kind, name=name: kind(CONFIGS[name], rngs=ShapeRngs()))
        for name, (kind, _) in PARTS.items()
    }
    return DynamiCrafterPipeline(
        parts,
        text=clip_text.ClipTokenizer(clip_text.build(MERGES), VOCAB),
        config=DynamiCrafterConfig(
            frame_size=(8, 16),
            interpolation=interpolation,
            schedule=NoiseSchedule(zero_terminal_snr=True, parameterization="v", base_scale=0.7),
            sampling=SamplingConfig(
                num_frames=FRAMES, num_inference_steps=2, spacing="uniform_trailing"
            ),
        ),
    )


@pytest.fixture(scope="module")
def pipe():
    return make()


@pytest.fixture(scope="module")
def between():
    return make(interpolation=True)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def latents(pipe, images):
    return np.asarray(pipe.sample_latents(images, ["cat", "dog"], seed=3))


def apart(a, b):
    """Largest difference, of each frame."""
    return np.abs(np.asarray(a) - np.asarray(b)).max(axis=(0, 2, 3, 4))


def test_a_video_for_every_image(pipe, images):
    videos = pipe(["cat", "dog"], image=images, seed=3)
    assert videos.shape == (2, FRAMES, 8, 16, 3)
    assert videos.dtype == np.uint8
    assert np.asarray(videos).std() > 0


def test_sample_of_a_batch_is_that_image_alone_with_its_own_seed(pipe, images, latents):
    for i, prompt in enumerate(["cat", "dog"]):
        alone = pipe.sample_latents(images[i], prompt, seed=3 + i)
        # Another size of the batch rounds otherwise, and guidance multiplies that.
        assert (apart(alone, latents[i : i + 1]) < 1e-4).all()
    swapped = pipe.sample_latents(images[::-1], ["dog", "cat"], seed=[4, 3])
    assert (apart(swapped[::-1], latents) < 1e-4).all()
    videos = np.asarray(pipe(["cat", "dog"], image=images, seed=3), int)
    assert np.abs(pipe("dog", image=images[1], seed=4)[0] - videos[1]).max() <= 1


def test_same_seed_repeats_and_another_differs(pipe, images, latents):
    again = pipe.sample_latents(images, ["cat", "dog"], seed=3)
    np.testing.assert_array_equal(again, latents)
    assert (apart(pipe.sample_latents(images, ["cat", "dog"], seed=4), latents) > 0.1).all()


def test_image_and_prompt_both_enter_every_frame(pipe, images, latents):
    other = pipe.sample_latents(images[[1, 1]], ["cat", "dog"], seed=3)
    assert (apart(other[:1], latents[:1]) > 1e-3).all()
    np.testing.assert_array_equal(other[1], latents[1])
    other = pipe.sample_latents(images, ["dog", "dog"], seed=3)
    assert (apart(other[:1], latents[:1]) > 1e-5).all()
    np.testing.assert_array_equal(other[1], latents[1])


def test_fs_enters(pipe, images, latents):
    other = pipe.sample_latents(images, ["cat", "dog"], seed=3, fs=24)
    assert (apart(other, latents) > 1e-5).all()


@pytest.mark.long
def test_the_sampler_changes_the_video(pipe, images):
    ddim, dpm = (
        pipe.sample_latents(images[0], "cat", num_inference_steps=4, eta=0.0, sampler=sampler)
        for sampler in ("ddim", "dpm++")
    )
    assert (apart(dpm, ddim) > 1e-3).all()


def test_only_its_own_frame_holds_the_last_image(between, images):
    """This UNet has no layer over time, and the last image has no tokens: only its frame tells."""
    options = {"seed": 3, "guidance_scale": 1.0}  # rescaled guidance would join the frames
    first = between.sample_latents(images[:1], "cat", last_image=images[:1], **options)
    other = between.sample_latents(images[:1], "cat", last_image=images[1:], **options)
    changed = apart(first, other)
    assert changed[-1] > 1e-3
    assert (changed[:-1] == 0).all()


def test_empty_prompt_needs_no_vocabulary(pipe, images):
    wordless = clip_text.ClipTokenizer(None, VOCAB)
    bare = DynamiCrafterPipeline(pipe.parts, text=wordless, config=pipe.config)
    want = pipe.sample_latents(images, "", seed=1)
    np.testing.assert_array_equal(bare.sample_latents(images, "", seed=1), want)
    with pytest.raises(UserError, match="without CLIP's vocabulary"):
        bare("cat", image=images[0])


def test_saved_pipeline_gives_the_same_video(pipe, images, latents, tmp_path):
    pipe.metadata = {"unet": {"origin": "dynamicrafter"}}
    pipe.save_pretrained(tmp_path / "model")
    loaded = DynamiCrafterPipeline.from_pretrained(tmp_path / "model")
    assert loaded.config == pipe.config
    assert loaded.metadata["unet"] == {"origin": "dynamicrafter"}
    np.testing.assert_array_equal(loaded.sample_latents(images, ["cat", "dog"], seed=3), latents)
    assert "image-to-video" in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize("size", [(8, 16), (16, 32), (31, 20), (4, 40)])
def test_images_of_any_size_are_covered_without_bars(pipe, size):
    fitted = np.asarray(pipe._fit(np.full((*size, 3), 200, np.uint8), "image"))
    assert fitted.shape == (1, 8, 16, 3)
    np.testing.assert_allclose(fitted, 200 / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((8, 16, 3), np.float32)}, "image is uint8"),
        ({"image": np.zeros((0, 8, 16, 3), np.uint8)}, "image: the list is empty"),
        (
            {"prompt": list("abc"), "image": [np.zeros((8, 16, 3), np.uint8)] * 2},
            r"3 prompts, 2 image\(s\): give one for each, or one for all",
        ),
        ({"image": None}, "goes on from an image; give one as image="),
        ({"num_clips": 2}, "does not know num_clips; beside prompt and seed it takes guidance_s"),
        ({"video": "in.mp4"}, "does not know video"),
        ({"output_type": "tokens"}, "does not know tokens"),
        ({"prompt": np.zeros((8, 16, 3), np.uint8)}, "a prompt is text, .* a picture as image="),
        ({"last_image": np.zeros((8, 16, 3), np.uint8)}, "last_image is for interpolation"),
        ({"image": [[1, 2], [3]]}, "image is uint8"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": 3}, "a prompt is text"),
        ({"num_inference_steps": 0}, "num_inference_steps: want .* from 1 to 1000, got 0"),
        ({"num_inference_steps": 2000}, "2000"),
        ({"sampler": "euler"}, r"sampler: want ddim or dpm\+\+ or unipc, got 'euler'"),
        ({"eta": 2.0}, "eta: want .* of at most 1, got 2"),
        ({"num_frames": 0}, "num_frames: want a whole number from 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .* got nan"),
        ({"guidance_scale": -1}, "guidance_scale: "),
        ({"guidance_rescale": "half"}, "guidance_rescale: .* got 'half'"),
        ({"fs": 1.5}, "fs: want a whole number"),
        ({"seed": 2**32}, "seed: "),
        ({"seed": [1, 2]}, r"seed: 2 seeds for 1 sample\(s\)"),
    ],
)
def test_mistake_is_one_clear_line(pipe, options, message):
    with pytest.raises(UserError, match=message) as caught:
        pipe(**({"image": np.zeros((8, 16, 3), np.uint8)} | options))
    assert "\n" not in str(caught.value)


def test_interpolation_wants_its_last_image(between, images):
    with pytest.raises(UserError, match="pass last_image"):
        between(image=images[0])
    with pytest.raises(UserError, match=r"1 prompts, 3 image\(s\), 2 last image"):
        between(image=[images[0]] * 3, last_image=images[:2])


def test_parts_that_do_not_fit_are_refused(pipe):
    config = dataclasses.replace(pipe.config, frame_size=(7, 16))
    with pytest.raises(UserError, match="frame_size must divide by 2"):
        DynamiCrafterPipeline(pipe.parts, text=pipe.text, config=config)
    with pytest.raises(UserError, match="needs unet"):
        DynamiCrafterPipeline({}, text=pipe.text, config=pipe.config)


@pytest.mark.parametrize("part", list(PARTS))
def test_weights_that_are_no_numbers_are_refused_at_load(pipe, tmp_path, part):
    parts = pipe.parts | {part: with_value(pipe.parts[part], np.inf)}
    bad = DynamiCrafterPipeline(parts, text=pipe.text, config=pipe.config)
    with pytest.MonkeyPatch.context() as patch:  # as other programs write
        patch.setattr(weights, "not_finite", lambda arrays: None)
        bad.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"weights of {part} hold NaN or infinite"):
        DynamiCrafterPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "autoencoder", "image_tower"])
def test_what_overflows_on_the_way_is_no_video(pipe, images, part):
    parts = pipe.parts | {part: with_value(pipe.parts[part], 3e38)}
    bad = DynamiCrafterPipeline(parts, text=pipe.text, config=pipe.config)
    with pytest.raises(UserError, match="no picture: look at the weights of"):
        bad("cat", image=images[0])

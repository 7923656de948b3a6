"""CLIPSIM of a tiny CLIP with words, against its towers called by hand."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import random_module
from tiny_clip import CONFIG

from convert.parts import clip as open_clip
from dicode_jax.errors import UserError
from dicode_jax.evaluation import text
from dicode_jax.media.transforms import CLIP_MEAN, CLIP_STD
from dicode_jax.models.clip import CLIP, CLIPVision
from dicode_jax.storage import weights
from dicode_jax.text.clip import ClipTokenizer, build

TOKENIZER = build(["r e", "re d</w>"])
VOCABULARY = TOKENIZER.get_vocab_size()


@pytest.fixture(scope="module")
def cfg():
    return open_clip.config_from_original(
        CONFIG
        | {"vision_cfg": CONFIG["vision_cfg"] | {"layers": 1}}
        | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": VOCABULARY}}
    )


@pytest.fixture
def folder(cfg, tmp_path):
    model = random_module(lambda: CLIP(cfg, rngs=nnx.Rngs(0)))
    weights.save_module(tmp_path / "clip", model, cfg)
    ClipTokenizer(TOKENIZER, VOCABULARY).save(tmp_path / "clip/text")
    return tmp_path / "clip"


def test_a_video_is_as_near_to_its_prompt_as_the_towers_say(folder, cfg):
    model, _ = weights.load_module(folder, CLIP, type(cfg))
    frames = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), np.uint8)
    towers = text.load(folder)
    images, (red, blue) = towers.images(frames), towers.texts(["a red dog", "blue"])
    ids = ClipTokenizer(TOKENIZER, VOCABULARY)(["a red dog", "blue"], cfg.text.max_seq_len)
    pixels = (frames / 255 - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD)
    logits = model(jnp.asarray(pixels, jnp.float32), jnp.asarray(ids)) / np.exp(
        model.logit_scale[...]
    )
    row = text.measured(images, red, blue)
    np.testing.assert_allclose(row["clipsim"], logits[:, 0], atol=1e-5)
    np.testing.assert_allclose(row["other"], logits[:, 1], atol=1e-5)
    np.testing.assert_allclose(
        row["consistency"], [a @ b for a, b in itertools.pairwise(images)], atol=1e-6
    )


def test_frames_come_to_the_tower_as_open_clip_prepares_them():
    frames = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 3), np.uint8)
    got = text.preprocessed(frames, 6)
    whole = Image.fromarray(frames[1]).resize((10, 6), Image.Resampling.BICUBIC)  # shorter side
    cut = np.asarray(whole)[:, 2:8] / 255  # and the centre
    want = (cut - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD)
    np.testing.assert_allclose(got[1], want, atol=2 / 255 / min(CLIP_STD))


def test_sums_over_videos_are_of_their_means():
    rows = [
        {"clipsim": np.array(a), "other": np.array(b), "consistency": np.array([c])}
        for a, b, c in (([0.2, 0.4], [0.1, 0.1], 0.9), ([-0.2, 0.2], [0.3, 0.3], 0.7))
    ]
    means = {name: x.mean for name, x in text.summary(rows).items()}
    assert means == pytest.approx(
        {
            "CLIPSIM": 0.15,
            "CLIP score": 20.0,
            "CLIPSIM of another prompt": 0.2,
            "prompts told apart": 0.5,
            "frame consistency": 0.8,
        }
    )
    (plot,) = text.plots(rows)
    assert [x.mean for x in plot.lines["with its prompt"]] == pytest.approx([0.0, 0.3])
    alone = text.summary([{"clipsim": np.array([0.5]), "consistency": np.array([])}])
    assert alone.keys() == {"CLIPSIM", "CLIP score"}


def test_each_prompt_has_the_next_other_one():
    assert text.others(["a", "a", "b", "c"]) == [2, 2, 3, 0]
    assert text.others(["a", "a"]) == [None, None]
    assert text.others(["b", "a", "a"]) == [1, 0, 0]
    assert text.others([]) == []


def test_a_clip_without_words_or_without_a_text_tower_is_named(folder, cfg, monkeypatch):
    vision = random_module(lambda: CLIPVision(cfg.vision, rngs=nnx.Rngs(0)))
    weights.save_module(folder / "vision", vision, cfg.vision)
    with pytest.raises(UserError, match="clip_vision"):
        text.load(folder / "vision")
    (folder / "text/tokenizer.json").unlink()
    monkeypatch.setattr(text, "installed_vocabulary", lambda size: None)
    with pytest.raises(UserError, match="has no vocabulary"):
        text.load(folder)

"""A pipeline of what LanDiff's four trainings leave, and parts that make none."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import random_module
from tiny_landiff_training import LM_CONFIG, TEXT, VAE, write_cache

from dicode_jax import config as config_lib
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D
from dicode_jax.models.landiff.language_model import LanguageModel
from dicode_jax.models.t5 import T5Encoder
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.landiff import LanDiffPipeline
from dicode_jax.stages.landiff import assembly, diffusion
from dicode_jax.storage import weights
from dicode_jax.text.t5 import learn_words


def _write_of_other_frames(folder):
    """A language model that writes more tokens a frame than the tokenizer has."""
    frames = dataclasses.replace(LM_CONFIG.model.frames, iframe=30)
    cfg = dataclasses.replace(LM_CONFIG.model, frames=frames)
    model = random_module(lambda: LanguageModel(cfg, rngs=ShapeRngs()))
    weights.save_module(folder / "language_model", model, cfg)
    encoder = random_module(lambda: T5Encoder(TEXT, rngs=ShapeRngs()))
    weights.save_module(folder / "text_encoder", encoder, TEXT)
    learn_words(all_captions()).save(folder / "text_encoder")


def test_what_is_written_is_a_pipeline_when_all_parts_are_named(named, models, tmp_path):
    shutil.copytree(models, tmp_path / "lm" / "model")
    root = tmp_path / "lm" / "model"
    for name, kind, cfg in (
        ("language_model", LanguageModel, LM_CONFIG.model),
        ("vae", AutoencoderCausal3D, VAE),
    ):
        module = random_module(lambda kind=kind, cfg=cfg: kind(cfg, rngs=ShapeRngs()))
        weights.save_module(root / name, module, cfg)
    config_lib.to_json(dataclasses.replace(LM_CONFIG, segments=3), root.parent / "config.json")
    config = dataclasses.replace(
        named,
        vae=str(root),
        text_encoder=str(root),
        text_guidance=3.0,
        text_temperature=0.6,
        motion_score=0.4,
        sample_steps=7,
    )
    painter = random_module(lambda: diffusion.Painter(config, rngs=ShapeRngs()))
    diffusion.export(config, painter, tmp_path / "out")
    pipe = LanDiffPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.config.max_segments, pipe.config.text_length) == (3, 14)
    assert (pipe.config.prefix_latents, pipe.config.sampling.ramp) == (1, "smooth")
    assert pipe.config.sampling.guidance_scale == 3.0
    assert pipe.config.sampling.temperature == 0.6
    assert pipe.config.sampling.motion_score == 0.4
    assert pipe.config.sampling.num_inference_steps == 7
    kernel = pipe.parts["denoiser"].dit.embed.text.kernel
    np.testing.assert_array_equal(kernel[...], painter.denoiser.dit.embed.text.kernel[...])
    early = tmp_path / "early"  # what the painter read by, when the language model went on
    read_by = random_module(lambda: T5Encoder(TEXT, rngs=ShapeRngs()))
    read_by.final_norm.scale[...] = 3.0
    weights.save_module(early / "text_encoder", read_by, TEXT)
    shutil.copy(root / "text_encoder" / "tokenizer.json", early / "text_encoder")
    both = dataclasses.replace(config, text_encoder=str(early), language_model=str(root))
    diffusion.export(both, painter, tmp_path / "both")
    pair = LanDiffPipeline.from_pretrained(tmp_path / "both")
    assert pair.config == pipe.config
    for name, other in (("painter_text", read_by), ("text_encoder", pipe.parts["text_encoder"])):
        ours, theirs = (nnx.state(x, nnx.Param) for x in (pair.parts[name], other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    cached = dataclasses.replace(config, data=write_cache(tmp_path / "cache"))
    for wrong, message in (
        ({"sample_steps": 1}, "sample_steps is 1: .*must be in 2..1000, got 1"),
        ({"num_known": 2}, "prefix_latents odd, got 14 and 2"),
        ({"text_guidance": -1.0}, "guidance_scale"),
        ({"text_temperature": 0.0}, "temperature"),
        ({"motion_score": -1.0}, "motion_score"),
    ):
        with pytest.raises(UserError, match=message):
            diffusion.settle(dataclasses.replace(cached, **wrong))
    path = root / "language_model" / "config.json"  # of a release that named no kinds
    stored = path.read_text()
    path.write_text(json.dumps({k: x for k, x in json.loads(stored).items() if k != "kind"}))
    diffusion.settle(cached)
    path.write_text(stored)
    _write_of_other_frames(root.parent / "other")
    other = dataclasses.replace(cached, language_model=str(root.parent / "other"))
    with pytest.raises(UserError, match="do not fit: frames of the language model and of the tok"):
        diffusion.settle(other)
    shutil.copytree(root, tmp_path / "copied")
    with pytest.warns(UserWarning, match="reads 512 text tokens and goes on behind all segments"):
        assert (
            assembly.settings(
                dataclasses.replace(config, text_encoder=str(tmp_path / "copied"))
            ).text_length
            == 512
        )
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    from_pipe = dataclasses.replace(config, text_encoder=str(tmp_path / "again"))
    assert assembly.settings(from_pipe).max_segments == 3
    shutil.rmtree(root / "language_model")
    with pytest.raises(UserError, match=r"no language_model in .*, which the pipeline needs"):
        diffusion.settle(dataclasses.replace(config, data=write_cache(tmp_path / "cache")))

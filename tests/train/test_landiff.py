"""Runs of LanDiff's language model and denoiser that stop and go on, by their commands' parts."""

import dataclasses

import numpy as np
import pytest
from tiny import random_module
from tiny_landiff_training import DIFFUSION_CONFIG, LM_CONFIG, SEMANTIC, VAE, write_cache

from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.landiff import language_model
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.optim import OptimConfig
from train import landiff_diffusion, landiff_lm, loop

SGD = OptimConfig(optimizer="sgd", lr=0.1, warmup_steps=0, schedule="constant")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the other trainings leave, with a text encoder as the language model's exports it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = random_module(lambda: SemanticTokenizer(SEMANTIC, rngs=ShapeRngs()))
    weights.save_module(root / "tokenizer", tokenizer, SEMANTIC)
    vae = random_module(lambda: AutoencoderCausal3D(VAE, rngs=ShapeRngs()))
    weights.save_module(root / "vae", vae, VAE)
    writer = random_module(lambda: language_model.Writer(LM_CONFIG, rngs=ShapeRngs()))
    build_stage(LM_CONFIG).export(writer, root)
    return root


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lm", "diffusion"])
def test_a_run_that_stops_goes_on_to_the_same_bits(kind, models, tmp_path):
    hashes = {name: weights.hash_module(models / name) for name in ("tokenizer", "vae")}
    data = write_cache(tmp_path / "c", **hashes)
    folders = {"semantic_tokenizer": str(models)}
    task, config, part = landiff_lm, LM_CONFIG, "language_model"
    if kind == "diffusion":
        task, config, part = landiff_diffusion, DIFFUSION_CONFIG, "denoiser"
        folders |= {"text_encoder": str(models), "vae": str(models)}
    config = dataclasses.replace(
        config, data=data, optim=SGD, num_steps=4, batch_size=2, validation_examples=2, **folders
    )

    def train(name, steps, **changes):
        options = loop.RunOptions(workdir=tmp_path / name, steps=steps, checkpoint_every=2)
        loop.run(task.build(dataclasses.replace(config, **changes), tmp_path / name), options)

    train("whole", 4)
    again = {"vae": None} if kind == "diffusion" else {}  # sheets draw from no stream of a training
    train("parts", 2, **again)
    train("parts", 4, **again)
    one, two = (
        weights.read_arrays(tmp_path / name / "model" / part / "model.safetensors")
        for name in ("whole", "parts")
    )
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], name)
    assert (tmp_path / "whole/samples/000004.png").exists() == (kind == "diffusion")

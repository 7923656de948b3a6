"""What trainings of LanDiff's painter go on from, at a few numbers."""

import dataclasses

import pytest
from tiny import random_module
from tiny_landiff_training import DIFFUSION_CONFIG, SEMANTIC, TEXT

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.models.landiff.dit import Denoiser
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer
from dicode_jax.models.t5 import T5Encoder
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.storage import weights
from dicode_jax.text.t5 import learn_words


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders as trainings leave them: a denoiser, a semantic tokenizer, a text encoder."""
    root, cfg = tmp_path_factory.mktemp("models"), DIFFUSION_CONFIG.model
    made = {
        "denoiser": (lambda: Denoiser(cfg, rngs=ShapeRngs()), cfg),
        "tokenizer": (lambda: SemanticTokenizer(SEMANTIC, rngs=ShapeRngs()), SEMANTIC),
        "text_encoder": (lambda: T5Encoder(TEXT, rngs=ShapeRngs()), TEXT),
    }
    for name, (make, sizes) in made.items():
        weights.save_module(root / name, random_module(make), sizes)
    learn_words(all_captions()).save(root / "text_encoder")
    return str(root)


@pytest.fixture(scope="module")
def named(models):
    return dataclasses.replace(DIFFUSION_CONFIG, semantic_tokenizer=models, text_encoder=models)

"""Every config file builds its models, by shapes alone."""

import math
import pathlib

import jax
import pytest
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.models.autoencoder_kl import AutoencoderKL
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import is_constant
from dicode_jax.models.dicode.representation import RepresentationModel
from dicode_jax.models.dicode.stages import configs as kinds
from dicode_jax.nn.rngs import ShapeRngs
from train.decoder import VideoTokenizer

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(p for p in FOLDER.glob("*.py") if "get_config" in p.read_text())


def build(config):
    rngs = ShapeRngs()
    if isinstance(config, kinds.AutoencoderTrainConfig):
        return AutoencoderKL(config.model, rngs=rngs)
    if isinstance(config, kinds.RepresentationTrainConfig):
        return RepresentationModel(config.model, rngs=rngs)
    if isinstance(config, kinds.TokenizerTrainConfig):
        return VideoTokenizer(config, rngs=rngs)
    return DiCoDeLM(config.model, rngs=rngs)


def count(module):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module)))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_builds_under_eval_shape_and_survives_json(path, tmp_path):
    config = config_lib.load_config_file(path)
    assert count(nnx.eval_shape(lambda: build(config))) > 100_000
    config_lib.to_json(config, tmp_path / "config.json")
    assert config_lib.from_json(type(config), tmp_path / "config.json") == config


def test_a_body_that_was_stored_without_its_kind_is_gpt2():
    config = config_lib.load_config_file(FOLDER / "gpt2_large.py").model
    data = config_lib.to_dict(config)
    assert data["body"].pop("kind") == "gpt2"
    assert config_lib.from_dict(DiCoDeLMConfig, data) == config


def test_tokenizer_256_has_the_released_parameter_counts():
    config = config_lib.load_config_file(FOLDER / "tokenizer_256.py")
    model = nnx.eval_shape(lambda: build(config))
    assert count(model.decoder.unet) == 1_438_843_476
    assert count(model.decoder.autoencoder) == 83_653_863
    assert count(model.tokenizer.resampler) == 48_541_696
    # The release's 683,800,065 also count the unused text embeddings beside the image tower:
    # 49,408 x 1,024 words, 77 x 1,024 positions, a norm of 2 x 1,024, a projection of 1,024 x 1,024
    # and the logit scale.
    unused = 49_408 * 1024 + 77 * 1024 + 2 * 1024 + 1024 * 1024 + 1
    assert count(model.tokenizer.vision) == 683_800_065 - unused
    constants = [p for p, _ in nnx.to_flat_state(nnx.state(model.decoder)) if is_constant(p)]
    assert len(constants) == 2


def test_gpt2_large_has_the_released_parameter_counts():
    config = config_lib.load_config_file(FOLDER / "gpt2_large.py")
    model = nnx.eval_shape(lambda: build(config))
    assert count(model.body) == 774_114_560
    assert count(model.input_mlp) == 2_951_680
    assert count(model.output_mlp) == 43_635_984
    assert math.prod(model.frame_embed.shape) + math.prod(model.place_embed.shape) == 61_440


@pytest.mark.parametrize(
    ("name", "published", "width"),
    [("llama_1b", 1_235_814_400, 2048), ("llama_3b", 3_212_749_824, 3072)],
)
def test_llama_has_the_published_parameter_counts_and_66_more_rows(name, published, width):
    config = config_lib.load_config_file(FOLDER / f"{name}.py")
    model = nnx.eval_shape(lambda: build(config))
    parts = (model.body, model.input_mlp, model.output_mlp)
    counts = [published + 66 * width, *(count(part) for part in parts[1:]), 48 * width]
    assert count(model.body) == counts[0]
    assert count(model) == sum(counts)
    for number in (count(model), *counts):
        assert f"{number:,}" in (FOLDER / f"{name}.py").read_text()

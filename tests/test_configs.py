"""Every config file builds its training, by shapes alone."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import is_constant
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.registry import build_stage

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(p for p in FOLDER.glob("*.py") if "get_config" in p.read_text())
NAMES = {path.stem for path in FILES}


def load(name, tmp_path):
    """The config, with stored configs of the earlier runs that it asks for."""
    config = config_lib.load_config_file(FOLDER / f"{name}.py")
    if isinstance(config, ARTrainConfig) and config.tokenizer is None:
        return dataclasses.replace(config, data=DataConfig(path="cache", kind="cache"))
    if isinstance(config, ARTrainConfig):
        reader = config_lib.load_config_file(FOLDER / f"{name.split('_')[0]}_tokenizer.py")
        (tmp_path / "tokenizer").mkdir()
        config_lib.to_json(reader.tokenizer, tmp_path / "tokenizer" / "config.json")
        config = dataclasses.replace(config, tokenizer=str(tmp_path))
    if getattr(config, "autoencoder", None):
        head = config.decoder.latent_head if hasattr(config, "decoder") else config.model.head
        c = head.output_shape[-1] if head else 4
        stored = AutoencoderKLConfig(num_groups=8, z_channels=c, embed_dim=c)
        config_lib.to_json(stored, tmp_path / "config.json")
        config = dataclasses.replace(config, autoencoder=str(tmp_path))
    return config


def build(config):
    stage = build_stage(config)
    return stage, nnx.eval_shape(lambda: stage.create(ShapeRngs()))


def count(module):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module)))


def test_the_papers_range_is_there():
    wanted = {"gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl", "llama_1b", "llama_3b"}
    shapes = {f"shapes_{x}" for x in ("autoencoder", "representation", "path", "tokenizer", "ar")}
    assert wanted | shapes | {"tokenizer_256"} <= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_config_survives_json(name, tmp_path):
    config = load(name, tmp_path)
    config_lib.to_json(config, tmp_path / "run.json")
    assert config_lib.from_json(type(config), tmp_path / "run.json") == config


# As others that are tried, in another size.
LARGER = ("gpt2_medium", "gpt2_xl", "llama_3b", "tokenizer_256")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.long if x in LARGER else ()) for x in sorted(NAMES)]
)
def test_the_loss_has_a_gradient_for_all_that_is_trained(name, tmp_path):
    stage, model = build(load(name, tmp_path))
    graph, trained, frozen = nnx.split(model, stage.is_trained, ...)
    assert count(trained) > 100_000

    def loss(trained, frozen, batch):
        return stage.loss_fn(nnx.merge(graph, trained, frozen), batch, jax.random.key(0))

    step = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), grads = jax.eval_shape(step, trained, frozen, stage.batch_shapes(2))
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert all(metric.shape == () for metric in metrics.values())
    # Whatever the computation runs in, parameters and so their gradients are float32.
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, trained))} == {jnp.dtype("float32")}


def test_a_body_that_was_stored_without_its_kind_is_gpt2():
    config = config_lib.load_config_file(FOLDER / "gpt2_large.py").model
    data = config_lib.to_dict(config)
    assert data["body"].pop("kind") == "gpt2"
    assert config_lib.from_dict(DiCoDeLMConfig, data) == config


def test_a_mistyped_override_names_the_nearest_field(capsys, tmp_path):
    config = load("gpt2_small", tmp_path)
    with pytest.raises(SystemExit):
        config_lib.from_args(type(config), ["--optim.lrr=1e-4"], default=config, prog="train.ar")
    assert "--optim.lr" in capsys.readouterr().err
    changed = config_lib.from_args(type(config), ["--optim.lr=1e-4"], default=config)
    assert changed == dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-4))


def test_probes_are_refused_on_data_without_labels(tmp_path):
    config = load("shapes_representation", tmp_path)
    (tmp_path / "videos").mkdir()
    videos = dataclasses.replace(config.data, path=str(tmp_path / "videos"))
    with pytest.raises(UserError, match="give --probe-weight 0"):
        build_stage(dataclasses.replace(config, data=videos))
    stage = build_stage(dataclasses.replace(config, data=videos, probe_weight=0.0))
    assert set(stage.batch_shapes(2)) == {"image"}


def test_tokenizer_256_has_the_released_parameter_counts():
    config = config_lib.load_config_file(FOLDER / "tokenizer_256.py")
    _, model = build(config)
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
    config = load("gpt2_large", FOLDER)
    model = build(config)[1].lm
    assert count(model.body) == 774_114_560
    assert count(model.input_mlp) == 2_951_680
    assert count(model.output_mlp) == 43_635_984
    assert math.prod(model.frame_embed.shape) + math.prod(model.place_embed.shape) == 61_440


@pytest.mark.parametrize("name", ["gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"])
def test_a_config_names_its_number_of_parameters(name):
    path = FOLDER / f"{name}.py"
    model = build(load(path.stem, FOLDER))[1].lm
    assert f"{count(model):,} parameters" in path.read_text()


@pytest.mark.parametrize(
    ("name", "published", "width"),
    [("llama_1b", 1_235_814_400, 2048), ("llama_3b", 3_212_749_824, 3072)],
)
def test_llama_has_the_published_parameter_counts_and_66_more_rows(name, published, width):
    config = load(name, FOLDER)
    model = build(config)[1].lm
    parts = (model.body, model.input_mlp, model.output_mlp)
    counts = [published + 66 * width, *(count(part) for part in parts[1:]), 48 * width]
    assert count(model.body) == counts[0]
    assert count(model) == sum(counts)
    for number in (count(model), *counts):
        assert f"{number:,}" in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize(("name", "length"), [("llama_1b", 2020), ("gpt2_small", 1024)])
def test_a_packed_row_is_as_long_as_the_run_needs(name, length, tmp_path):
    config = dataclasses.replace(load(name, tmp_path), packed=True)
    assert config.packed_length == length  # 4 (80 + 25 x 17), and all that GPT-2 reads
    assert config.packed_keyframes == (length - 80) // 17
    with pytest.raises(ValueError, match=r"rows of 131072 .* mask of 16.0 GiB .* to 32768 or less"):
        dataclasses.replace(config, row_length=131_072)

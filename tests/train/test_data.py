"""What a training's files read: batches as the stage describes them, and what is held out."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from dicode_jax import config as config_lib
from dicode_jax.data.clips import read_clip
from dicode_jax.data.config import DataConfig
from dicode_jax.data.examples import SpanReader
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.sources.shapes import frame_labels
from dicode_jax.errors import UserError
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode import tokenizer_loss
from dicode_jax.stages.dicode.configs import (
    ARTrainConfig,
    RepresentationTrainConfig,
    TokenizerTrainConfig,
)
from dicode_jax.stages.dicode.representation_model import RepresentationConfig
from dicode_jax.stages.dicode.trainable import TrainableParts
from dicode_jax.storage import weights
from train import ar, autoencoder, tokenizer

RUN = {"batch_size": 2, "frame_size": 16, "data": DataConfig(num_frames=4)}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A config of each training, with the parts of earlier runs that it needs."""
    pipe = tiny_pipeline()
    folder = tmp_path_factory.mktemp("parts")
    weights.save_module(folder / "tokenizer", pipe.tokenizer, pipe.tokenizer.cfg)
    config_lib.to_json(pipe.decoder.cfg.autoencoder, folder / "config.json")
    head = dataclasses.replace(
        pipe.tokenizer.cfg.resampler, embed_dim=8, num_queries=4, output_shape=(8, 8, 4)
    )
    representation = RepresentationConfig(
        tokenizer=pipe.tokenizer.cfg, head=head, probe_classes=(8, 4, 4)
    )
    return {
        "autoencoder": AutoencoderTrainConfig(model=pipe.decoder.cfg.autoencoder, **RUN),
        "representation": RepresentationTrainConfig(
            model=representation, autoencoder=str(folder), **RUN
        ),
        "spans": RepresentationTrainConfig(
            model=representation, autoencoder=str(folder), between_weight=1.0, **RUN
        ),
        "tokenizer": TokenizerTrainConfig(
            tokenizer=pipe.tokenizer.cfg, decoder=pipe.decoder.cfg, **RUN
        ),
        "ar": ARTrainConfig(
            model=pipe.language_model.cfg,
            tokenizer=str(folder),
            text_length=14,
            num_keyframes=2,
            **RUN,
        ),
    }


BUILD = {
    "autoencoder": autoencoder.build,
    "representation": tokenizer.build,
    "spans": tokenizer.build,
    "tokenizer": tokenizer.build,
    "ar": ar.build,
}


@pytest.mark.parametrize("name", list(BUILD))
def test_batches_are_what_the_stage_says(name, configs, tmp_path):
    task = BUILD[name](configs[name], tmp_path)
    batch = next(task.batches)
    task.batches.close()
    assert len(set(batch.pop("ids"))) == 2
    given = {key: (array.shape, array.dtype) for key, array in batch.items()}
    wanted = {key: (x.shape, x.dtype) for key, x in task.stage.batch_shapes(2).items()}
    assert given == wanted


def test_spans_are_the_ends_of_a_clip_and_a_frame_between(configs):
    cfg, found = configs["spans"], set()
    scenes = open_source(cfg.data)
    read = SpanReader(data=cfg.data, frame_size=16, labels=True)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        span = read(scenes.record(seed), rng)
        clip = read_clip(scenes.record(seed), cfg.data, 16, np.random.default_rng(seed))["video"]
        between = round(3 * float(span["place"]))
        np.testing.assert_array_equal(span["image"], clip[[0, between, 3]])
        np.testing.assert_array_equal(span["labels"], frame_labels(scenes.record(seed).media))
        found.add(between)
    assert found == {1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"between_weight": -1.0}, "between_weight must not be negative, got -1.0"),
        ({"data": DataConfig(num_frames=2)}, "a frame between: data.num_frames is 2, not 3"),
    ],
)
def test_impossible_spans_are_refused(options, message, configs):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configs["spans"], **options)


def test_a_clip_decoder_is_validated_without_dropout_and_trained_with_it(
    configs, tmp_path, monkeypatch
):
    runs = []

    def denoising(*args, deterministic, **options):
        runs.append(deterministic)
        return 0.0, {"loss_simple": 0.0, "latent_std": 0.0}

    monkeypatch.setattr(tokenizer_loss, "tokenizer_loss", denoising)
    monkeypatch.setattr(tokenizer.data, "evaluation", lambda config, loss_fn, *_: loss_fn)
    config = configs["tokenizer"]
    frozen = dataclasses.replace(config, trainable=TrainableParts(unet=False))
    model = types.SimpleNamespace(decoder=types.SimpleNamespace(cfg=config.decoder), tokenizer=None)
    for run in (config, frozen):  # the original trains parts of a UNet in evaluation mode
        task = tokenizer.build(run, tmp_path)
        batch = next(task.batches)
        task.batches.close()
        for loss_fn in (task.evaluate, task.stage.loss_fn):
            loss_fn(model, batch, jax.random.key(0))
    assert runs == [True, False, True, True]


def test_a_data_set_too_small_to_hold_anything_out_says_so(configs, tmp_path, capsys):
    for i in range(2):
        Image.fromarray(np.full((20, 24, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
    data = dataclasses.replace(configs["autoencoder"].data, path=str(tmp_path))
    task = autoencoder.build(dataclasses.replace(configs["autoencoder"], data=data), tmp_path)
    assert "none of 2 is held out; validation and samples" in capsys.readouterr().out
    np.testing.assert_array_equal(np.unique(next(task.batches)["image"]), [0, 90])
    task.batches.close()
    with pytest.raises(UserError, match="there are no videos"):
        tokenizer.build(dataclasses.replace(configs["tokenizer"], data=data), tmp_path)


def test_without_a_decoder_there_are_no_sheets(configs, tmp_path):
    assert ar.build(configs["ar"], tmp_path).sample is None

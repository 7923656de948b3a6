"""Tokenizer training that starts from converted parts."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tiny import tiny_pipeline

from dicode_jax import weights
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.stages.configs import TokenizerTrainConfig
from train import tokenizer


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def config(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    pipe.save_pretrained(folder)
    return TokenizerTrainConfig(
        tokenizer=pipe.tokenizer.cfg, decoder=pipe.decoder.cfg, init=str(folder), frame_size=16
    )


def test_training_starts_from_the_stored_parts(pipe, config):
    model = tokenizer.load_start(config)
    for part in ("tokenizer", "decoder"):
        wanted = weights.named_arrays(getattr(pipe, part))
        arrays = weights.named_arrays(getattr(model, part))
        assert set(arrays) == set(wanted)
        for path, array in wanted.items():
            np.testing.assert_array_equal(arrays[path], array, path)


def test_options_that_change_no_shape_are_those_of_the_run(config):
    unet = dataclasses.replace(config.decoder.unet, dropout=0.3, remat=True)
    decoder = dataclasses.replace(config.decoder, unet=unet)
    model = tokenizer.load_start(dataclasses.replace(config, decoder=decoder))
    assert model.decoder.cfg.unet.remat
    assert model.decoder.unet.cfg.dropout == 0.3


def test_parts_of_other_sizes_are_refused(config, tmp_path):
    resampler = dataclasses.replace(config.tokenizer.resampler, num_queries=5)
    wider = dataclasses.replace(config.tokenizer, resampler=resampler)
    with pytest.raises(UserError, match=r"latents has shape \(3, 16\)"):
        tokenizer.load_start(dataclasses.replace(config, tokenizer=wider))
    with pytest.raises(UserError, match="no configuration"):
        tokenizer.load_start(dataclasses.replace(config, init=str(tmp_path)))


def test_scale_of_the_latents_is_the_stored_one(config):
    autoencoder = dataclasses.replace(config.decoder.autoencoder, scale_factor=0.5)
    decoder = dataclasses.replace(config.decoder, autoencoder=autoencoder)
    model = tokenizer.load_start(dataclasses.replace(config, decoder=decoder))
    assert model.decoder.autoencoder.cfg.scale_factor == config.decoder.autoencoder.scale_factor


def test_representation_says_that_the_tokenizer_stays_frozen(config, tmp_path):
    def trained(config):
        state = tokenizer.build_decoder(config, tmp_path).trained
        return {str(path[1]) for path, _ in nnx.to_flat_state(state)}

    assert "resampler" in trained(config)
    assert trained(dataclasses.replace(config, representation="runs/r/model")) == {"unet"}

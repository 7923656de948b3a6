"""Tokenizer training that starts from converted parts."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tiny import tiny_pipeline, with_latent_prior

from dicode_jax.errors import UserError
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights


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


def make(config):
    """The model by shapes, its stage, and what is loaded into it."""
    stage = build_stage(config)
    return nnx.eval_shape(lambda: stage.create(ShapeRngs())), stage, stage.load()


def test_training_starts_from_the_stored_parts(pipe, config):
    model, _, arrays = make(config)
    assert set(arrays) == {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    for part in ("tokenizer", "decoder"):
        for path, leaf in nnx.to_flat_state(nnx.state(getattr(pipe, part))):
            np.testing.assert_array_equal(arrays[part, *path], leaf[...], path)


def test_options_that_change_no_shape_are_those_of_the_run(config):
    unet = dataclasses.replace(config.decoder.unet, dropout=0.3, remat=True)
    decoder = dataclasses.replace(config.decoder, unet=unet)
    model, _, _ = make(dataclasses.replace(config, decoder=decoder))
    assert model.decoder.cfg.unet.remat
    assert model.decoder.unet.cfg.dropout == 0.3


def test_parts_of_other_sizes_are_refused(config, tmp_path):
    resampler = dataclasses.replace(config.tokenizer.resampler, num_queries=5)
    wider = dataclasses.replace(config.tokenizer, resampler=resampler)
    decoder = dataclasses.replace(config.decoder, num_tokens=5)
    with pytest.raises(UserError, match=r"null_tokens has shape \(3, 8\)"):
        make(dataclasses.replace(config, tokenizer=wider, decoder=decoder))
    with pytest.raises(UserError, match="no configuration"):
        make(dataclasses.replace(config, init=str(tmp_path)))


def test_scale_of_the_latents_is_the_stored_one(config):
    autoencoder = dataclasses.replace(config.decoder.autoencoder, scale_factor=0.5)
    decoder = dataclasses.replace(config.decoder, autoencoder=autoencoder)
    model, _, _ = make(dataclasses.replace(config, decoder=decoder))
    assert model.decoder.autoencoder.cfg.scale_factor == config.decoder.autoencoder.scale_factor


def trained(config, **options):
    """Paths of what is trained, with these `trainable` parts."""
    parts = dataclasses.replace(config.trainable, **options)
    model, stage, _ = make(dataclasses.replace(config, trainable=parts))
    flat = nnx.to_flat_state(nnx.state(model, stage.is_trained))
    return {".".join(map(str, path)) for path, _ in flat}


def test_representation_says_that_the_tokenizer_stays_frozen(config):
    assert {p.split(".")[1] for p in trained(config)} == {"unet", "resampler"}
    ready = dataclasses.replace(config, representation="runs/r/model")
    assert {p.split(".")[1] for p in trained(ready)} == {"unet"}


def test_subsets_of_the_unet_are_masks_over_paths(config):
    whole = {p for p in trained(config) if ".unet." in p}
    frozen = {"unet": False, "resampler": False}
    first = trained(config, **frozen, image_projections=False)
    images = trained(config, **frozen, first_block=False)
    assert {p.split(".")[2:4][0] for p in first} == {"down_stages"}
    assert {p.split(".")[3] for p in first} == {"0", "1"}
    assert images == {p for p in whole if p.split(".")[-2] in ("k_image", "v_image")}
    assert images
    assert trained(config, **frozen) == first | images


def test_low_rank_additions_train_alone_and_are_folded_at_export(config, tmp_path):
    options = {"unet": False, "first_block": False, "image_projections": False, "resampler": False}
    lora = dataclasses.replace(config.trainable, **options, lora_rank=2, lora_alpha=3.0)
    model, stage, arrays = make(dataclasses.replace(config, trainable=lora))
    paths = trained(config, **options, lora_rank=2)
    assert {p.split(".")[-1] for p in paths} == {"lora_down", "lora_up"}
    assert {p.split(".")[-2] for p in paths} == {"q", "k", "v", "k_image", "v_image", "out"}

    graph, abstract = nnx.split(model)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return leaf.replace(arrays.get(path, drawn))

    state = nnx.from_flat_state([(p, fill(p, v)) for p, v in nnx.to_flat_state(abstract)])
    expected = dict(arrays)
    for path, leaf in nnx.to_flat_state(state):
        if path[-1] == "lora_down":
            up = state
            for part in (*path[:-1], "lora_up"):
                up = up[part]
            kernel = (*path[:-1], "kernel")
            expected[kernel] = arrays[kernel] + 1.5 * np.asarray(leaf[...]) @ np.asarray(up[...])
    stage.export(nnx.merge(graph, state), tmp_path)
    again = dataclasses.replace(config, init=str(tmp_path))  # reads it as a plain decoder
    for path, array in make(again)[2].items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-5, atol=1e-5)
    changed = {p for p in arrays if not np.array_equal(arrays[p], expected[p])}
    assert len(changed) == len(paths) / 2


@pytest.mark.slow
def test_null_tokens_follow_a_resampler_that_has_learned(pipe, config, tmp_path):
    model, stage, arrays = make(config)
    graph, abstract = nnx.split(model)
    moved = {p: x + 0.1 if p[:2] == ("tokenizer", "resampler") else x for p, x in arrays.items()}
    state = nnx.from_flat_state([(p, v.replace(moved[p])) for p, v in nnx.to_flat_state(abstract)])
    whole = nnx.merge(graph, state)
    wanted = np.asarray(whole.tokenizer.null_tokens())
    stage.export(whole, tmp_path)
    stored = weights.read_arrays(tmp_path / "decoder" / weights.WEIGHTS_FILE)["null_tokens"]
    np.testing.assert_allclose(stored, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(stored - arrays["decoder", "null_tokens"]).max() > 1e-2


def test_what_cannot_train_is_refused(config):
    with pytest.raises(ValueError, match="needs a trained autoencoder"):
        dataclasses.replace(config, init=None, cached_clips=3)
    frozen = dataclasses.replace(config.trainable, resampler=False)
    with pytest.raises(ValueError, match="needs a tokenizer that is ready"):
        dataclasses.replace(config, init=None, trainable=frozen)
    decoder = dataclasses.replace(config.decoder, num_tokens=2)
    with pytest.raises(ValueError, match=r"makes 3 tokens .*, decoder\.num_tokens says 2"):
        dataclasses.replace(config, decoder=decoder)
    decoder = with_latent_prior(config.decoder)
    with pytest.raises(ValueError, match=r"must not be dropped: set loss\.uncond_prob to 0"):
        dataclasses.replace(config, decoder=decoder)
    with pytest.raises(ValueError, match="set unet to False"):
        dataclasses.replace(config.trainable, lora_rank=4)

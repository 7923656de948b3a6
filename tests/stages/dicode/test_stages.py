"""Stages: the type of the computation, and what a batch may be."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_pipeline

from dicode_jax.data.config import DataConfig
from dicode_jax.errors import UserError
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode import tokenizer as tokenizer_stage
from dicode_jax.stages.dicode import tokenizer_loss
from dicode_jax.stages.dicode.configs import (
    ARTrainConfig,
    TokenizerTrainConfig,
)
from dicode_jax.stages.registry import build_stage

# What a bfloat16 would spoil: norms, softmax, densities. Activations may stay in it.
DELICATE = {"exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "reduce_sum", "reduce_max", "cumsum"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def language_model(pipe, body):
    model = dataclasses.replace(pipe.language_model.cfg, body=body)
    cache = DataConfig(path="cache", kind="cache")
    return ARTrainConfig(model=model, data=cache, text_length=14, num_keyframes=2)


def tokenizer(pipe, **options):
    return TokenizerTrainConfig(
        tokenizer=pipe.tokenizer.cfg,
        decoder=pipe.decoder.cfg,
        frame_size=16,
        data=DataConfig(num_frames=4),
        **options,
    )


def config_of(kind, pipe):
    if kind == "gpt2":
        return language_model(pipe, pipe.language_model.cfg.body)
    if kind == "llama":
        vocab_size = pipe.language_model.cfg.body.vocab_size
        sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "mlp_dim": 10}
        return language_model(pipe, LlamaConfig(**sizes, max_seq_len=64, vocab_size=vocab_size))
    if kind == "tokenizer":
        return tokenizer(pipe)
    return AutoencoderTrainConfig(model=pipe.decoder.cfg.autoencoder, frame_size=16)


def count_types(jaxpr, counts):
    """(operation, type of an operand) -> how often, inner programs included."""
    for equation in jaxpr.eqns:
        for operand in equation.invars:
            dtype = getattr(getattr(operand, "aval", None), "dtype", None)
            counts[equation.primitive.name, str(dtype)] += 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count_types(inner, counts)
    return counts


@pytest.mark.parametrize("kind", ["gpt2", "llama", "tokenizer", "autoencoder"])
def test_bfloat16_multiplies_but_neither_norms_nor_sums(kind, pipe):
    config = dataclasses.replace(config_of(kind, pipe), dtype="bfloat16")
    stage = build_stage(config)
    graph, state = nnx.split(nnx.eval_shape(lambda: stage.create(ShapeRngs())))
    loss = lambda state, batch: stage.loss_fn(nnx.merge(graph, state), batch, jax.random.key(0))  # noqa: E731
    counts = count_types(
        jax.make_jaxpr(loss)(state, stage.batch_shapes(2)).jaxpr, collections.Counter()
    )
    assert counts["dot_general", "bfloat16"] + counts["conv_general_dilated", "bfloat16"] > 5
    assert not {name for name, dtype in counts if dtype == "bfloat16"} & DELICATE
    assert {name for name, dtype in counts if dtype == "float32"} & DELICATE


def test_a_resampler_learns_on_cached_clips_and_a_frozen_one_needs_tokens_only(pipe, monkeypatch):
    config = tokenizer(pipe, init="start", cached_clips=3)
    ready = dataclasses.replace(config, representation="ready")
    shapes = {}
    for name, cfg in (("joint", config), ("ready", ready)):
        shapes[name] = set(tokenizer_stage.batch_shapes(cfg, cfg.decoder, 2))
    assert shapes["joint"] == {"fs", "latents", "keyframes"}
    assert shapes["ready"] == {"fs", "latents", "tokens"}

    parts = (config.tokenizer, config.decoder)
    model = nnx.eval_shape(lambda: tokenizer_stage.VideoTokenizer(*parts, rngs=ShapeRngs()))
    graph, resampler, rest = nnx.split(model, lambda path, _: path[1] == "resampler", ...)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(scale=0.1, size=x.shape), x.dtype)  # noqa: E731
    resampler, rest = jax.tree.map(draw, resampler), jax.tree.map(draw, rest)
    batch = {
        "latents": rng.normal(size=(2, 4, 8, 8, 4)).astype(np.float16),
        "keyframes": rng.integers(256, size=(2, 2, 16, 16, 3)).astype(np.uint8),
        "fs": np.full(2, 6, np.int32),
    }
    batch = jax.tree.map(jnp.asarray, batch)

    # The UNet is left out, whose gradient takes long to compile.
    def from_tokens(decoder, latents, tokens, *args, **kwargs):
        metrics = dict.fromkeys(("loss_simple", "latent_std"), 0.0)
        return jnp.square(tokens).sum(), metrics

    monkeypatch.setattr(tokenizer_loss, "denoising_loss", from_tokens)

    @jax.jit
    def gradient(resampler):
        loss = lambda part: tokenizer_stage.loss_fn(  # noqa: E731
            config, nnx.merge(graph, part, rest), batch, jax.random.key(0), deterministic=True
        )
        return jax.grad(loss, has_aux=True)(resampler)[0]

    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradient(resampler))]
    assert sum(norm > 0 for norm in norms) > 0.8 * len(norms)


def test_an_autoencoder_whose_latents_are_one_number_is_not_scaled_to_infinity(pipe, tmp_path):
    config = config_of("autoencoder", pipe)
    model = nnx.clone(pipe.decoder.autoencoder)
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
    with pytest.raises(UserError, match="all latents of 64 frames of shapes are the same number"):
        build_stage(config).export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_perfect_reconstruction_has_a_finite_psnr(pipe):
    stage = build_stage(config_of("autoencoder", pipe))
    model = nnx.clone(pipe.decoder.autoencoder)
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
    model.decoder.conv_out.bias[...] = -jnp.ones(3)  # black
    keys = jax.random.split(jax.random.key(0), 1)
    _, metrics = stage.loss_fn(model, {"image": jnp.zeros((1, 16, 16, 3), jnp.uint8)}, keys)
    assert metrics["mse"] == 0
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4e10), rtol=1e-5)

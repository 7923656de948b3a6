"""Training of the language model that starts from a converted body."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face_folder import draw, write_folder
from tiny import tiny_pipeline

from convert.parts import hugging_face, llama
from dicode_jax import config as config_lib
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.errors import UserError
from dicode_jax.models.causal_lm import compare_bodies
from dicode_jax.models.llama import LlamaConfig, RotaryScaling
from dicode_jax.stages.dicode import language_model
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.text import gpt as text
from train import ar, loop

BASE = text.train_small(all_captions()).vocab_size - len(text.IMAGE_TOKENS)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """What `convert llama --for-dicode` makes of a tiny folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("llama")
    shapes = {"model.embed_tokens.weight": (BASE, 8), "model.norm.weight": (8,)}
    for i in range(2):
        layer = {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
        layer |= {f"self_attn.{name}_proj": (8, 8) for name in "qo"}
        layer |= {f"self_attn.{name}_proj": (4, 8) for name in "kv"}
        layer |= {"mlp.gate_proj": (10, 8), "mlp.up_proj": (10, 8), "mlp.down_proj": (8, 10)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    config = {
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "vocab_size": BASE,
    }
    write_folder(folder / "in", config, draw(shapes))
    argv = [str(folder / "in"), "--out", str(folder / "out"), "--for-dicode"]
    assert hugging_face.main(llama.FAMILY, argv) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def config(pipe, body, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    weights.save_module(folder / "tokenizer", pipe.tokenizer, pipe.tokenizer.cfg)
    sizes = LlamaConfig(
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=8,
        mlp_dim=10,
        max_seq_len=64,
        vocab_size=BASE + 66,
        rope_theta=1e4,
        rope_scaling=None,
        scan_layers=True,
        remat=True,
    )
    return ARTrainConfig(
        model=dataclasses.replace(pipe.language_model.cfg, body=sizes),
        tokenizer=str(folder),
        body_init=str(body),
        text_length=14,
        num_keyframes=2,
        frame_size=16,
        batch_size=2,
    )


def test_training_starts_from_a_converted_body_however_its_layers_are_kept(config, body):
    arrays = build_stage(config).load()
    got = {".".join(map(str, path[2:])): x for path, x in arrays.items() if path[1] == "body"}
    stored = weights.read_arrays(body / weights.WEIGHTS_FILE)
    np.testing.assert_array_equal(got["token_embed.embedding"], stored["token_embed.embedding"])
    for i in range(2):
        want = stored[f"blocks.{i}.attn.q.kernel"]
        np.testing.assert_array_equal(got["blocks.attn.q.kernel"][i], want)
    assert isinstance(got["blocks.attn.q.kernel"], np.ndarray)  # no device holds the whole model


def test_an_earlier_run_is_gone_on_from_whatever_its_dropout(pipe, config, tmp_path):
    weights.save_module(tmp_path, pipe.language_model, pipe.language_model.cfg)
    body = dataclasses.replace(pipe.language_model.cfg.body, dropout=0.1, remat="dots")
    model = dataclasses.replace(pipe.language_model.cfg, body=body)
    again = dataclasses.replace(config, model=model, init=str(tmp_path), body_init=None)
    arrays = build_stage(again).load()
    stored = weights.named_arrays(pipe.language_model)
    np.testing.assert_array_equal(arrays["lm", "frame_embed"], stored["frame_embed"])
    wider = dataclasses.replace(again, model=dataclasses.replace(model, num_mixtures=3))
    with pytest.raises(UserError, match="other sizes than --config's: its tokens or its head"):
        build_stage(wider).load()


def test_another_body_text_or_tokenizer_is_refused_with_the_difference(config):
    other = dataclasses.replace(config.model.body, rope_scaling=RotaryScaling())
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, body=other))
    with pytest.raises(UserError, match="holds another body than --config's: rope_scaling None"):
        build_stage(other).load()
    moved = dataclasses.replace(config.model, pad_token_id=3)
    with pytest.raises(UserError, match=r"pads with id \d+ .* config says 3 and"):
        language_model.load_text(dataclasses.replace(config, model=moved))
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, token_dim=9))
    with pytest.raises(UserError, match=r"3 tokens of width 8 .* says 3 of width 9"):
        build_stage(wide)
    with pytest.raises(ValueError, match="leave body_init out"):
        dataclasses.replace(config, init="runs/ar/model")


def test_validation_runs_without_dropout_and_input_noise(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ar.data, "evaluation", lambda config, loss_fn, *_: loss_fn)
    task = ar.build(dataclasses.replace(config, body_init=None, input_noise=0.5), tmp_path)
    batch = next(task.batches)
    task.batches.close()
    runs, tokens = [], jax.random.normal(jax.random.key(1), (2, 2, 30, 8))

    def loss(text_ids, tokens, *, frame_mask, inputs, deterministic, rngs):
        runs.append((inputs, deterministic))
        return types.SimpleNamespace(loss=0.0, weight=1.0)

    lm = types.SimpleNamespace(loss=loss)
    model = types.SimpleNamespace(lm=lm, tokenizer=lambda keyframes: tokens)
    for loss_fn in (task.evaluate, task.stage.loss_fn):
        loss_fn(model, batch, jax.random.key(0))
    assert runs[0] == (None, True)
    inputs, deterministic = runs[1]
    assert not deterministic
    valid = np.asarray(batch["frame_mask"])
    np.testing.assert_allclose((inputs - tokens)[valid].std(), 0.5, rtol=0.1)  # 960 draws at most


def test_sheets_show_the_first_clip_of_tokens_that_are_written_with_fixed_noise(
    pipe, config, monkeypatch
):
    config = dataclasses.replace(config, num_keyframes=3, text_length=6)
    ids = jnp.asarray(pipe.text.encode(["red"] * 2, 6).ids)
    config = dataclasses.replace(config, model=pipe.language_model.cfg)
    one, other = (
        language_model.generate_tokens(config, pipe.language_model, ids) for _ in range(2)
    )
    assert one.shape == (2, 3, 3, 8)
    np.testing.assert_array_equal(one, other)
    assert np.abs(one[0] - one[1]).max() > 1e-3  # a row has noise of its own

    def decode_clip(decoder, tokens, keys, sampling):
        np.testing.assert_array_equal(tokens, one[:, :2])
        assert (sampling.num_frames, sampling.guidance_scale, sampling.fs) == (4, 1.0, 3)
        return jnp.zeros((2, 4, 16, 16, 3))

    monkeypatch.setattr(language_model, "decode_clip", decode_clip)
    monkeypatch.setattr(language_model, "decode_latents", lambda decoder, latents: latents + 1)
    assert (language_model.show(config, pipe.decoder, one) == 255).all()


def test_how_a_body_is_run_is_no_difference(pipe, config):
    sizes = config.model.body
    assert compare_bodies(sizes, dataclasses.replace(sizes, scan_layers=False, remat=False)) is None
    assert compare_bodies(sizes, pipe.language_model.cfg.body) == "llama, not gpt2"


def test_help_config_lists_every_field(tmp_path, capsys):
    argv = ["--config", "configs/shapes_ar.py", "--workdir", str(tmp_path / "run"), "--help-config"]
    with pytest.raises(SystemExit, match="0"):
        loop.main("train.ar", ar.build, (ARTrainConfig,), argv)
    said = capsys.readouterr().out
    leaves = config_lib.leaves(
        config_lib.to_dict(config_lib.load_config_file("configs/shapes_ar.py"))
    )
    names = [name for name in leaves if not name.startswith("sharding.rules")]
    assert len(names) > 60
    assert not [name for name in names if f"--{name.replace('_', '-')}" not in said]
    assert not (tmp_path / "run").exists()

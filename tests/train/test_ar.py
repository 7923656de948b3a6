"""Training of the language model that starts from a converted body."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from hugging_face_folder import draw, write_folder
from tiny import tiny_pipeline

from convert import hugging_face, llama
from dicode_jax import weights
from dicode_jax.data import text
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.stages.configs import ARTrainConfig
from dicode_jax.models.language_model import compare_bodies
from dicode_jax.models.llama import LlamaConfig, RotaryScaling
from train import ar

BASE = text.train_small().vocab_size - len(text.IMAGE_TOKENS)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """What `convert.llama --for-dicode` makes of a tiny folder of Hugging Face."""
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


def test_training_starts_from_a_converted_body_however_its_layers_are_kept(config, body, tmp_path):
    task = ar.build(config, tmp_path)
    model = nnx.merge(task.graph, task.trained, task.frozen)
    stored = weights.read_arrays(body / weights.WEIGHTS_FILE)
    got = weights.named_arrays(model.lm.body)
    assert model.lm.body.cfg == config.model.body
    np.testing.assert_array_equal(got["token_embed.embedding"], stored["token_embed.embedding"])
    for i in range(2):
        want = stored[f"blocks.{i}.attn.q.kernel"]
        np.testing.assert_array_equal(got["blocks.attn.q.kernel"][i], want)


def test_another_body_or_text_is_refused_with_the_difference(config, tmp_path):
    other = dataclasses.replace(config.model.body, rope_scaling=RotaryScaling())
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, body=other))
    with pytest.raises(UserError, match="holds another body than --config's: rope_scaling None"):
        ar.build(other, tmp_path)
    moved = dataclasses.replace(config.model, pad_token_id=3)
    with pytest.raises(UserError, match=r"pads with id \d+ .* config says 3 and"):
        ar.build(dataclasses.replace(config, model=moved), tmp_path)
    with pytest.raises(ValueError, match="leave body_init out"):
        dataclasses.replace(config, init="runs/ar/model")


def test_how_a_body_is_run_is_no_difference(pipe, config):
    sizes = config.model.body
    assert compare_bodies(sizes, dataclasses.replace(sizes, scan_layers=False, remat=False)) is None
    assert compare_bodies(sizes, pipe.language_model.cfg.body) == "llama, not gpt2"

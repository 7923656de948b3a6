"""Names of the Hub in a training's config, and originals that become a body on the way."""

import dataclasses
import pathlib

import numpy as np
import pytest
from fake_hub import FakeHub
from hugging_face_folder import draw, write_folder
from tiny import tiny_pipeline

from dicode_jax import config as config_lib
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.errors import UserError
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.dicode.language_model import load_text
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.text import gpt as text
from train import loop
from train.sources import find_sources, prepare_sources

TEXT = text.train_small(all_captions())
BASE, WIDTH = TEXT.vocab_size - len(text.IMAGE_TOKENS), 8


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def original(folder, seed=0):
    """A tiny GPT-2 as Hugging Face keeps it, with its tokenizer."""
    shapes = {"wte.weight": (BASE, WIDTH), "wpe.weight": (64, WIDTH)}
    layer = {"ln_1": (8,), "ln_2": (8,), "attn.c_attn": (8, 24), "attn.c_proj": (8, 8)}
    layer |= {"mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
    for name, shape in layer.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": (8,), "ln_f.bias": (8,)}
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": WIDTH}
    config |= {"n_positions": 64, "vocab_size": BASE}
    TEXT.save(write_folder(folder, config, draw(shapes, seed)))
    return folder


@pytest.fixture
def fake(pipe, tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    pipe.save_pretrained(tmp_path / "someone")
    fake.repositories = {"gpt2": original(tmp_path / "hub"), "me/tokens": tmp_path / "someone"}
    return fake


@pytest.fixture
def config(pipe):
    body = GPT2Config(
        num_layers=1, num_heads=2, embed_dim=WIDTH, max_seq_len=64, vocab_size=BASE + 66
    )
    return ARTrainConfig(
        model=dataclasses.replace(pipe.language_model.cfg, body=body),
        tokenizer="me/tokens",
        body_init="gpt2",
        text_tokenizer="gpt2",
        text_length=14,
        num_keyframes=2,
        frame_size=16,
        batch_size=2,
    )


def test_a_body_is_converted_once_into_the_runs_folder(fake, config, tmp_path, capsys):
    ready = prepare_sources(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"{tmp_path / 'cache/gpt2'} is converted" in said
    assert "66 rows of the token table are new" in said
    assert (ready.tokenizer, ready.body_init) == (
        str(tmp_path / "cache/me--tokens"),
        str(tmp_path / "run/body"),
    )
    table = build_stage(ready).load()["lm", "body", "token_embed", "embedding"]
    stored = weights.read_arrays(tmp_path / "hub/model.safetensors")["wte.weight"]
    np.testing.assert_array_equal(table[:BASE], stored)
    assert load_text(ready).to_json() == TEXT.to_json()
    before = (tmp_path / "run/body/model.safetensors").stat()
    assert prepare_sources(config, tmp_path / "run") == ready
    assert prepare_sources(ready, tmp_path / "run") == ready
    assert (tmp_path / "run/body/model.safetensors").stat() == before
    assert capsys.readouterr().out == ""


def test_a_body_of_another_original_is_converted_anew(fake, config, tmp_path):
    folders = [original(tmp_path / f"original{i}", seed=i) for i in range(2)]
    for folder in folders:
        named = dataclasses.replace(config, body_init=str(folder))
        arrays = build_stage(prepare_sources(named, tmp_path / "run")).load()
        stored = weights.read_arrays(folder / "model.safetensors")["wte.weight"]
        np.testing.assert_array_equal(
            arrays["lm", "body", "token_embed", "embedding"][:BASE], stored
        )


def test_a_run_notes_the_folders_before_it_settles_what_they_say(
    fake, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(config_lib, "load_config_file", lambda _: config)
    built = []

    def build(config, workdir):
        """Builds nothing."""
        built.append(config)
        raise UserError("enough")

    argv = ["--config", "c.py", "--workdir", str(tmp_path / "run")]
    seen = []
    settle = lambda config, *_: seen.append(config.tokenizer) or config  # noqa: E731
    assert loop.main("train.ar", build, (ARTrainConfig,), argv, settle=settle) == 2
    assert seen == [built[0].tokenizer] == [str(tmp_path / "cache/me--tokens")]
    assert built[0].body_init == built[0].text_tokenizer == str(tmp_path / "cache/gpt2")
    assert str(tmp_path / "cache/gpt2") in (tmp_path / "run/config.json").read_text()


def test_a_folder_wins_and_what_is_nowhere_is_one_line(fake, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original(tmp_path / "gpt2", seed=3)
    assert find_sources(config).body_init == "gpt2"
    for change, line in (
        ({"tokenizer": "tokens"}, "there is nothing at tokens, and it is no name owner/name"),
        ({"tokenizer": "me/nothing"}, "there is no folder me/nothing, and no such model"),
        ({"text_tokenizer": "gpt-2"}, "there is no folder gpt-2, and no such model"),
    ):
        with pytest.raises(UserError, match=line):
            find_sources(dataclasses.replace(config, **change))
    write_folder(pathlib.Path("bert"), {"model_type": "bert"}, draw({"a": (2,)}))
    with pytest.raises(
        UserError, match="type 'bert', no body that is known; known are gpt2, llama"
    ):
        prepare_sources(dataclasses.replace(config, body_init="bert"), tmp_path / "run")

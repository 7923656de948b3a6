"""`python -m convert.dicode`, end to end on the tiny official checkpoint among the fixtures."""

import json
import pathlib

import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import convert
from convert import dicode_command
from dicode_jax import DiCoDePipeline
from dicode_jax.data import text
from dicode_jax.nn.layer_stack import with_scan_layers

SYSTEM = pathlib.Path(__file__).parents[1] / "golden" / "dicode" / "system"
AGENT = "llm_agent."


@pytest.fixture(scope="module")
def options():
    return json.loads((SYSTEM / "config.json").read_text())["system"]


@pytest.fixture(scope="module")
def weights():
    return load_file(SYSTEM / "weights.safetensors")


@pytest.fixture(scope="module")
def models(options, weights, tmp_path_factory):
    """The official layout, the language model's file with a copy of everything."""
    folder = tmp_path_factory.mktemp("models")
    main = {k: v for k, v in weights.items() if not k.startswith(AGENT)}
    save_file(main, folder / "pytorch_model.safetensors")
    save_file(weights, folder / "gpt2_large.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k.startswith(AGENT)}, folder / "agent.safetensors"
    )
    (folder / "gpt2-large").mkdir()
    tokens = [*sorted(ByteLevel.alphabet()), text.END_OF_TEXT]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "gpt2-large" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "gpt2-large" / "merges.txt").write_text("#version: 0.2\n")
    sizes = {k: v for k, v in options["gpt2"].items() if k != "vocab_size"}
    body = sizes | {"vocab_size": 257, "model_type": "gpt2"}
    (folder / "gpt2-large" / "config.json").write_text(json.dumps(body))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"params": options}}))
    return folder


def run(*args):
    return dicode_command.main([str(arg) for arg in args])


def same_parameters(got, want):
    for (path, a), (other, b) in zip(
        nnx.to_flat_state(nnx.state(got)), nnx.to_flat_state(nnx.state(want)), strict=True
    ):
        assert path == other
        if path[-1] in ("text_context", "null_tokens"):  # computed, one block at a time
            np.testing.assert_allclose(a[...], b[...], atol=1e-5)
        else:
            np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_the_official_layout_becomes_a_pipeline(models, options, weights, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert run("--models", models, "--yaml", models / "config.yaml", "--out", out,
               "--report", report) == 0  # fmt: skip
    pipe = DiCoDePipeline.from_pretrained(out)
    want = convert.from_torch("dicode", weights, options)
    same_parameters(pipe.tokenizer, want.tokenizer)
    same_parameters(pipe.decoder, want.decoder)
    body = with_scan_layers(pipe.language_model.body, False)
    same_parameters(body, want.lm.body)
    assert pipe.decoder.cfg == want.decoder.cfg
    assert pipe.config.frame_size == 32
    data = json.loads(report.read_text())
    assert data == json.loads((out / "conversion.json").read_text())
    assert len(data["sources"]["pytorch_model.safetensors"]) == 64
    used = sum(part["used"] + len(part["skipped"]) for part in data["parts"].values())
    text_tower = sum(key.startswith("cond_stage_model.") for key in weights)
    beside = len(data["skipped"])
    agent = sum(key.startswith(AGENT) for key in weights)
    assert used + text_tower + beside - 2 == len(weights)  # two constants are computed
    assert data["parts"]["language_model"]["source_keys"] == agent

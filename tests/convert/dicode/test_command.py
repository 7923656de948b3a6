"""`python -m convert.dicode`, end to end on the tiny official checkpoint among the fixtures."""

import copy
import json
import pathlib

import numpy as np
import pytest
import yaml
from fake_hub import FakeHub
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import convert
from convert.dicode import command as dicode_command
from dicode_jax import DiCoDePipeline
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.storage.weights import load_module
from dicode_jax.text import gpt as text

SYSTEM = pathlib.Path(__file__).parents[2] / "golden" / "dicode" / "system"
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


def test_a_name_of_the_hub_stands_for_the_layout_and_for_the_text(models, tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    fake.repositories = {"someone/dicode": models, "gpt2": models / "gpt2-large"}
    found = [
        dicode_command.find_files(dicode_command.parser().parse_args([*argv, "--out", "x"]))
        for argv in (
            ["someone/dicode"],
            ["--lm", str(models / "agent.safetensors"), "--text", "gpt2"],
        )
    ]
    cache = tmp_path / "cache/someone--dicode"
    assert found[0].tokenizer == cache / "pytorch_model.safetensors"
    assert (found[0].lm, found[0].text) == (cache / "gpt2_large.safetensors", cache / "gpt2-large")
    assert fake.files("someone/dicode") == {
        *("pytorch_model.safetensors", "gpt2_large.safetensors", "gpt2-large/config.json"),
        *("gpt2-large/vocab.json", "gpt2-large/merges.txt"),
    }
    assert found[1].text == tmp_path / "cache/gpt2"


def same_parameters(got, want):
    for (path, a), (other, b) in zip(
        nnx.to_flat_state(nnx.state(got)), nnx.to_flat_state(nnx.state(want)), strict=True
    ):
        assert path == other
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_the_official_layout_becomes_a_pipeline(models, options, weights, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert run(models, "--yaml", models / "config.yaml", "--out", out, "--report", report) == 0
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
    for config in (out / "config.json", out / "decoder" / "config.json"):
        notes = json.loads(config.read_text())
        assert notes["_sources"] == data["sources"]
        assert notes["_converter"] == data["converter"]
    reports = [*data["parts"].values(), data["empty_prompt"]]
    used = sum(part["used"] + len(part["skipped"]) for part in reports)
    assert used + len(data["skipped"]) - 2 == len(weights)  # two constants are computed
    assert data["language_model"]["skipped"].keys() == {k for k in weights if AGENT not in k}


def refused(capsys, out, *args):
    """The one line of a conversion that fails and writes nothing."""
    before = sorted(out.parent.iterdir())
    assert run("--out", out, *args) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert sorted(out.parent.iterdir()) == before
    return line


def test_parts_are_converted_alone(models, weights, options, tmp_path):
    want = convert.from_torch("dicode", weights, options).lm
    got = []
    for name in ("gpt2_large", "agent"):
        out = tmp_path / name
        args = ("--lm", models / f"{name}.safetensors", "--text", models / "gpt2-large")
        assert run(*args, "--out", out, "--dtype", "bfloat16") == 0
        module, cfg = load_module(out / "language_model", DiCoDeLM, DiCoDeLMConfig)
        assert (cfg.num_mixtures, cfg.token_dim, cfg.max_keyframes) == (3, 32, 24)
        assert (cfg.image_token_id, cfg.pad_token_id) == (258, 256)
        got.append(module.input_mlp.up.kernel[...])
        assert not (out / "config.json").exists()
    want = np.asarray(want.input_mlp.up.kernel[...].astype("bfloat16"), np.float32)
    np.testing.assert_array_equal(got, [want, want])


def test_clip_comes_from_its_own_file_where_the_checkpoint_has_none(models, weights, tmp_path):
    image, text_tower = "embedder.model.", "cond_stage_model.model."
    towers = (image, text_tower, AGENT)
    clip = {k.removeprefix(text_tower): v for k, v in weights.items() if k.startswith(text_tower)}
    visual = image + "visual."
    clip |= {k.removeprefix(image): v for k, v in weights.items() if k.startswith(visual)}
    save_file(clip, tmp_path / "clip.safetensors")
    rest = {k: v for k, v in weights.items() if not k.startswith(towers)}
    save_file(rest, tmp_path / "rest.safetensors")
    out = tmp_path / "out"
    files = ("--tokenizer", tmp_path / "rest.safetensors", "--clip", tmp_path / "clip.safetensors")
    assert run(*files, "--yaml", models / "config.yaml", "--out", out) == 0
    pipe = DiCoDePipeline.from_pretrained(out)
    assert pipe.language_model is None
    np.testing.assert_array_equal(
        pipe.tokenizer.vision.class_embed[...], weights[visual + "class_embedding"]
    )
    sources = json.loads((out / "conversion.json").read_text())["sources"]
    assert set(sources) == {"rest.safetensors", "clip.safetensors"}


CHANGES = {
    "a key is missing": (
        lambda w: w.pop("model.diffusion_model.out.2.bias"),
        "unfilled target: unet.conv_out.bias (from model.diffusion_model.out.2.bias)",
    ),
    "a key is unknown": (
        lambda w: w.update({"discriminator.weight": np.ones(2, np.float32)}),
        "unused source key: discriminator.weight",
    ),
    "the schedule is another": (
        lambda w: w.update({"betas": w["betas"] * 2}),
        "betas: the noise schedule in the checkpoint is another one",
    ),
    "a size contradicts the YAML": (
        lambda w: w.update({"image_proj_model.latents": np.ones((1, 5, 32), np.float16)}),
        "decoder.num_tokens: 5 by the weights, 4 by",
    ),
    "a weight is NaN": (
        lambda w: w.update({"image_proj_model.proj_in.bias": np.full(32, np.nan, np.float16)}),
        "holds NaN or infinite numbers",
    ),
    "it is another model": (
        lambda w: [w.pop(key) for key in list(w) if key.startswith("model.")],
        "the checkpoint has no model.diffusion_model.* (its first key is ",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused(case, models, weights, tmp_path, capsys):
    change, message = CHANGES[case]
    tensors = {k: v for k, v in weights.items() if not k.startswith(AGENT)}
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    args = ("--tokenizer", tmp_path / "x.safetensors", "--yaml", models / "config.yaml")
    assert message in refused(capsys, tmp_path / "out", *args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("unet_config", "num_res_blocks", 10**9),
            "num_res_blocks must be at most 100,",
        ),
        (("unet_config", "num_head_channels", "8"), "is no configuration of DiCoDe"),
        ((None, "timesteps", 10**12), "num_timesteps must be at most 100000"),
        ((None, "unet_config", [1]), "is no configuration of DiCoDe"),
        ((None, "first_stage_config", {"params": {"ddconfig": {"ch_mult": {}}}}), "is no config"),
    ],
)
def test_the_weights_are_believed_before_the_originals_config(
    change, message, models, options, tmp_path, capsys
):
    part, name, value = change
    claims = copy.deepcopy(options)
    (claims if part is None else claims[part].get("params", claims[part]))[name] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"params": claims}}))
    args = ("--tokenizer", models / "pytorch_model.safetensors", "--yaml", tmp_path / "c.yaml")
    assert message in refused(capsys, tmp_path / "out", *args)


def test_two_different_diffusion_models_are_refused(models, weights, tmp_path, capsys):
    for name in ("pytorch_model.safetensors", "gpt2-large"):
        (tmp_path / name).symlink_to(models / name)
    key = "model.diffusion_model.out.2.bias"
    save_file(weights | {key: weights[key] + 1}, tmp_path / "gpt2_large.safetensors")
    args = (tmp_path, "--yaml", models / "config.yaml")
    line = refused(capsys, tmp_path / "out", *args)
    assert f"hold different diffusion models (first at {key})" in line


def test_wrong_arguments_are_explained(models, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    main = models / "pytorch_model.safetensors"
    for args, message in (
        ((), "name what to convert"),
        ((tmp_path / "no",), "there is nothing at"),
        ((tmp_path / "empty",), "lacks pytorch_model.bin, gpt2_large.bin, gpt2-large/"),
        ((models, "--lm", main), "SOURCE stands for all parts"),
        (("--tokenizer", main), "no multiple of heads of 64: give the configuration"),
        (("--tokenizer", main, "--yaml", tmp_path / "none.yaml"), "none.yaml cannot be read"),
        (("--lm", main), "the checkpoint has no llm.transformer.wte.weight"),
    ):
        assert message in refused(capsys, out, *args)


def test_out_may_lie_beside_the_models_and_in_none_of_them(models, tmp_path, capsys):
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for out in (tmp_path, tmp_path / "gpt2-large", tmp_path / "gpt2-large" / "new"):
        assert run(tmp_path, "--out", out, "--overwrite") == 2
        assert "which is read; name another folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in models.iterdir())

"""`python -m convert landiff`: the release's folder in, models out, strict both ways."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from safetensors.numpy import save_file
from tiny import random_module
from tiny_landiff import TINY, TINY_VAE

from convert.engine.found import Found
from convert.landiff import command, dit, language_model, semantic_tokenizer, vae
from convert.parts import t5
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import (
    RELEASED_BODY,
    LanguageModel,
    LanguageModelConfig,
)
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.storage import weights

BODY = dataclasses.replace(
    RELEASED_BODY,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    embed_dim=128,
    mlp_dim=10,
    vocab_size=12,
)
LM = LanguageModelConfig(body=BODY, codebook_size=5, text_dim=6, micro_dim=7, sinusoid_dim=4)
TOKENIZER = SemanticTokenizerConfig(
    frames=FrameTokens(iframe=3, pframe=2), feature_dim=5, embed_dim=64, num_layers=1, num_heads=1,
    token_dim=6, codebook_size=5, code_dim=4,
)  # fmt: skip
TEXT = T5EncoderConfig(num_layers=1, num_heads=2, embed_dim=6, head_dim=4, mlp_dim=7, vocab_size=90)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WORDS = pathlib.Path(__file__).parents[2] / "text/small_spiece.model"
ORIGINAL = {
    "num_layers": 1, "num_heads": 2, "d_model": 6, "d_kv": 4, "d_ff": 7, "vocab_size": 90,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


@pytest.fixture
def release(tmp_path):
    """The folder as it is published, without the painter; flan-T5 beside it."""
    root = tmp_path / "LanDiff"
    made = {
        "llm": (LanguageModel, LM, language_model.RULES),
        "tokenizer": (SemanticTokenizer, TOKENIZER, semantic_tokenizer.RULES),
        command.PAINTER_TEXT: (T5Encoder, TEXT, t5.RULES),
        "../flan": (T5Encoder, TEXT, t5.RULES),
    }
    for name, (kind, cfg, rules) in made.items():
        folder = root / name
        folder.mkdir(parents=True)
        model = random_module(lambda kind=kind, cfg=cfg: kind(cfg, rngs=ShapeRngs()))
        save_file(state_dict(model, rules), folder / "model.safetensors")
        if kind is T5Encoder:
            (folder / "config.json").write_text(json.dumps(ORIGINAL))
            (folder / "spiece.model").write_bytes(WORDS.read_bytes())
    return root


def convert(release, tmp_path, *more):
    out = tmp_path / "out"
    args = [str(release), "--flan-t5", str(tmp_path / "flan"), "--out", str(out), *more]
    return command.main([*args, "--dtype", "float32"]), out


def test_the_release_becomes_models_that_load(release, tmp_path, capsys):
    status, out = convert(release, tmp_path)
    assert status == 0
    assert "Theia is not in SOURCE" in capsys.readouterr().out
    for name, kind, cfg in (
        ("language_model", LanguageModel, LM),
        ("semantic_tokenizer", SemanticTokenizer, TOKENIZER),
        ("text_encoder", T5Encoder, TEXT),
        ("painter_text", T5Encoder, TEXT),
    ):
        assert weights.load_module(out / name, kind, type(cfg))[1] == cfg
    for name in ("text_encoder", "painter_text"):
        assert (out / name / "spiece.model").read_bytes() == WORDS.read_bytes()
    report = json.loads((out / "conversion.json").read_text())
    assert report["parts"]["language_model"]["used"] == 24


def test_without_a_painter_its_text_encoder_is_not_needed(release, tmp_path, capsys):
    shutil.rmtree(release / command.BASE)
    status, out = convert(release, tmp_path)
    assert status == 0
    assert f"the painter is not in SOURCE: want {', '.join(command.PAINTER_PARTS)}" in (
        capsys.readouterr().out
    )
    assert not (out / "painter_text").exists()
    assert (out / "text_encoder/spiece.model").is_file()


def test_what_paints_is_there_whole_or_not_at_all(release, tmp_path, capsys):
    shutil.rmtree(release / command.PAINTER_TEXT)
    for name in command.PAINTER[1:]:
        (release / name).mkdir(parents=True)
    assert convert(release, tmp_path)[0] == 2
    missing = f"{command.DIFFUSION}, {command.PAINTER_TEXT} is missing"
    assert missing in capsys.readouterr().err


@pytest.mark.torch
def test_the_painter_is_converted_from_its_three_files(release, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(dit, "find_config", lambda _: Found(TINY, {}))  # sizes are fixed there
    of_dit = state_dict(random_module(lambda: Denoiser(TINY, rngs=ShapeRngs())), dit.rules(TINY))
    of_dit |= {k.removeprefix("model."): v for k, v in dit.unused_norm(TINY).items()}
    levels = {"encoder_mult": (1, 1, 2), "decoder_mult": (1, 1, 2), "time_factor": 4}
    cfg = dataclasses.replace(TINY_VAE, **levels)
    autoencoder = random_module(lambda: AutoencoderCausal3D(cfg, rngs=ShapeRngs()))
    of_vae = state_dict(autoencoder, vae.RULES)
    main = {dit.ALONE + k.removeprefix(dit.MAIN): v for k, v in of_dit.items() if dit.MAIN in k}
    control = {"model." + k: v for k, v in of_dit.items() if dit.MAIN not in k}
    for folder, tensors in ((command.TRANSFORMER, main), (command.DIFFUSION, control)):
        (release / folder / "7").mkdir(parents=True)
        (release / folder / "latest").write_text("7")
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
        torch.save({"module": tensors}, release / folder / "7" / command.DEEPSPEED)
    status, out = convert(release, tmp_path)
    assert status == 2
    assert "CogVideoX-2b-sat/vae/3d-vae.pt is missing" in capsys.readouterr().err
    (release / command.AUTOENCODER).parent.mkdir()
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in of_vae.items()}
    torch.save({"state_dict": tensors}, release / command.AUTOENCODER)
    status, out = convert(release, tmp_path)
    assert status == 0
    denoiser, stored = weights.load_module(out / "denoiser", Denoiser, DenoiserConfig)
    assert stored == TINY
    key = f"{dit.CONTROL}semantic_conditioner.conv_out.bias"
    np.testing.assert_array_equal(denoiser.semantic.to_latents.bias[...], of_dit[key])
    assert weights.load_module(out / "vae", AutoencoderCausal3D, type(cfg))[1] == cfg


def test_the_painter_s_copy_of_the_tokenizer_wins_and_is_spoken_of(release):
    own = command.open_source(release / "tokenizer")
    copy = {key: tensor.numpy() for key, tensor in own.items()}
    copy[semantic_tokenizer.CODES] = copy[semantic_tokenizer.CODES] + 1
    prefix = f"model.control_model.diffusion_model.{semantic_tokenizer.COPY}"
    chosen, note = command.choose_tokenizer(own, {prefix + k: v for k, v in copy.items()})
    assert chosen.keys() == copy.keys()
    assert "differs from tokenizer/ in 1 of 50 tensors (quantizer._codebook.embed)" in note
    halves = {prefix + k: tensor.numpy().astype(np.float16) for k, tensor in own.items()}
    chosen, note = command.choose_tokenizer(own, halves)
    assert note is None
    assert chosen[semantic_tokenizer.CODES].dtype == np.float16
    assert command.choose_tokenizer(own, {"model.other": copy}) == (own, None)


def test_latest_names_a_folder_beside_it_and_nothing_else(tmp_path):
    (tmp_path / "latest").write_text("1\n")
    assert command.iteration(tmp_path) == tmp_path / "1" / command.DEEPSPEED
    for name in ("../other", "..", ""):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(UserError, match="names no folder beside it"):
            command.iteration(tmp_path)


def test_what_is_missing_is_named(release, tmp_path, capsys):
    assert command.main([str(release), "--out", str(tmp_path / "out")]) == 2
    assert "name its folder by --flan-t5" in capsys.readouterr().err
    (tmp_path / "flan/spiece.model").unlink()
    assert convert(release, tmp_path)[0] == 2
    assert "no spiece.model in" in capsys.readouterr().err
    (release / "llm/model.safetensors").unlink()
    assert convert(release, tmp_path)[0] == 2
    assert "no checkpoint in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["flan", f"LanDiff/{command.PAINTER_TEXT}"])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (POINTER, "spiece.model is a Git LFS pointer and not the file itself: run git lfs pull"),
        (b"words", "spiece.model does not hold a readable vocabulary of T5's kind"),
        (None, "has 90 words, its table 80 rows"),
    ],
)
def test_words_that_no_pipeline_could_load_are_refused(
    release, tmp_path, capsys, folder, words, line
):
    if words is not None:
        (tmp_path / folder / "spiece.model").write_bytes(words)
    else:
        (tmp_path / folder / "config.json").write_text(json.dumps(ORIGINAL | {"vocab_size": 80}))
    status, out = convert(release, tmp_path)
    assert (status, out.exists()) == (2, False)
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1


def test_the_text_encoder_of_the_release_repeats_its_table():
    source = shapes_only(read_manifest("landiff_t5_xxl_encoder"))
    made = t5.KIND.plan(source, T5EncoderConfig())
    assert made.problems == []
    assert list(made.skipped) == ["encoder.embed_tokens.weight"]
    assert made.report()["parameters"] == 4_762_310_656

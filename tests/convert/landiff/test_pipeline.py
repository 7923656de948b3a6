"""A tiny release of LanDiff, converted whole, makes videos."""

import json

import numpy as np
import pytest
from convert_names import state_dict
from safetensors.numpy import save_file
from tiny_landiff_pipeline import CONFIGS, make

import dicode_jax
from convert.engine.found import Found
from convert.landiff import command, dit, language_model, semantic_tokenizer, theia, vae
from convert.parts import t5

VOCABULARY = "tests/text/small_spiece.model"


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.long
def test_a_converted_release_generates_and_reads_videos(tmp_path, monkeypatch, request):
    torch = pytest.importorskip("torch")
    words = (request.config.rootpath / VOCABULARY).read_bytes()
    # The released sizes are written in the table, so those of this one are told.
    configs = dict(CONFIGS)
    for module, name in (
        (dit, "denoiser"), (language_model, "language_model"), (vae, "vae"),
        (semantic_tokenizer, "semantic_tokenizer"), (theia, "features"),
    ):  # fmt: skip
        monkeypatch.setattr(module, "find_config", lambda _, name=name: Found(configs[name], {}))
    text = {"vocab_size": 90}
    configs["text_encoder"] = type(configs["text_encoder"])(**vars(configs["text_encoder"]) | text)
    pipe = make(configs=configs)
    monkeypatch.setattr(command, "LanDiffConfig", lambda: pipe.config)
    tables = {
        "language_model": language_model.RULES,
        "semantic_tokenizer": semantic_tokenizer.RULES,
        "vae": vae.RULES,
        "denoiser": dit.rules(configs["denoiser"]),
        "text_encoder": t5.RULES,
        "features": theia.KIND.rules(None, configs["features"]),
    }
    stored = {name: state_dict(pipe.parts[name], rules) for name, rules in tables.items()}
    stored["denoiser"] |= {
        k.removeprefix("model."): v for k, v in dit.unused_norm(configs["denoiser"]).items()
    }
    release, cfg = tmp_path / "LanDiff", configs["text_encoder"]
    original = {
        "num_layers": cfg.num_layers, "num_heads": cfg.num_heads, "d_model": cfg.embed_dim,
        "d_kv": cfg.head_dim, "d_ff": cfg.mlp_dim, "vocab_size": cfg.vocab_size,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    for name, part in (
        ("llm", "language_model"), ("tokenizer", "semantic_tokenizer"),
        (command.PAINTER_TEXT, "text_encoder"), ("../flan", "text_encoder"),
        ("../theia", "features"),
    ):  # fmt: skip
        folder = release / name
        folder.mkdir(parents=True)
        save_file(stored[part], folder / "model.safetensors")
        if part == "text_encoder":
            (folder / "config.json").write_text(json.dumps(original))
            (folder / "spiece.model").write_bytes(words)
    of_dit = stored["denoiser"]
    main = {dit.ALONE + k.removeprefix(dit.MAIN): v for k, v in of_dit.items() if dit.MAIN in k}
    control = {"model." + k: v for k, v in of_dit.items() if dit.MAIN not in k}
    for folder, tensors in ((command.TRANSFORMER, main), (command.DIFFUSION, control)):
        (release / folder / "1").mkdir(parents=True)
        (release / folder / "latest").write_text("1")
        module = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
        torch.save({"module": module}, release / folder / "1" / command.DEEPSPEED)
    (release / command.AUTOENCODER).parent.mkdir()
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in stored["vae"].items()}
    torch.save({"state_dict": tensors}, release / command.AUTOENCODER)
    out = tmp_path / "out"
    argv = [str(release), "--flan-t5", str(tmp_path / "flan"), "--theia", str(tmp_path / "theia")]
    assert command.main([*argv, "--out", str(out), "--dtype", "float32"]) == 0
    converted = dicode_jax.load(out)
    assert converted.config == pipe.config
    assert json.loads((out / "config.json").read_text())["kind"] == "landiff"
    made = np.asarray(converted("a red circle grows", seed=1))
    assert made.shape == (1, 17, 16, 24, 3)
    assert made.std() > 0
    assert converted.encode(made[0]).shape == (9,)
    report = json.loads((out / "conversion.json").read_text())
    assert not report["notes"]

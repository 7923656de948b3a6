"""`python -m convert.open_clip`: sizes found, heads known or given."""

import json

import numpy as np
import pytest
from fake_hub import FakeHub
from flax import nnx
from safetensors.numpy import save_file
from tiny_clip import CONFIG, checkpoint

from convert import to_torch
from convert.engine.plan import flat_shapes
from convert.open_clip import main
from convert.parts import clip as open_clip
from convert.to_torch import original_state_dict
from dicode_jax.models.clip import CLIP, CLIPConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import weights
from dicode_jax.text import clip


def run(*args):
    return main([str(arg) for arg in args])


def test_a_model_is_found_and_checked_against_its_config(tmp_path):
    source = checkpoint(CONFIG)
    file, out, config = tmp_path / "clip.safetensors", tmp_path / "out", tmp_path / "config.json"
    save_file(source, file)
    config.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    assert run(file, "--config", config, "--out", out) == 0
    towers, cfg = weights.load_module(out, CLIP, CLIPConfig)
    assert cfg == open_clip.config_from_original(CONFIG)
    np.testing.assert_array_equal(
        towers.vision.patch_embed.kernel[...], source["visual.conv1.weight"].transpose(2, 3, 1, 0)
    )
    back = tmp_path / "back.safetensors"
    assert to_torch.main([str(out), "--out", str(back)]) == 0
    assert back.read_bytes() != file.read_bytes()  # another order and header, the same numbers


def test_a_name_of_the_hub_brings_its_config(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    fake.repositories["laion/tiny"] = tmp_path / "hub"
    (tmp_path / "hub").mkdir()
    save_file(checkpoint(CONFIG), tmp_path / "hub/open_clip_model.safetensors")
    (tmp_path / "hub/open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    assert run("laion/tiny", "--out", tmp_path / "out") == 0  # alone, the heads would be refused
    _, cfg = weights.load_module(tmp_path / "out", CLIP, CLIPConfig)
    assert cfg == open_clip.config_from_original(CONFIG)


def test_a_vocabulary_goes_along_and_another_is_refused(tmp_path, capsys):
    small = clip.build(["r e", "re d</w>"])
    size = small.get_vocab_size()
    config = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(checkpoint(config), tmp_path / "clip.safetensors")
    clip.ClipTokenizer(small, size).save(tmp_path / "words")
    args = [tmp_path / "clip.safetensors", "--config", tmp_path / "config.json"]
    assert run(*args, "--vocab", tmp_path / "words", "--out", tmp_path / "out") == 0
    words = clip.ClipTokenizer.from_file(tmp_path / "out/text", size)
    assert words(["red"], 4).tolist() == [[size - 2, size - 3, size - 1, 0]]
    other = clip.build(["r e"])
    clip.ClipTokenizer(other, size - 1).save(tmp_path / "others")
    assert run(*args, "--vocab", tmp_path / "others", "--out", tmp_path / "b") == 2
    assert "not the vocabulary of this text tower" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no multiple of heads of 64"),
        ({"embed_dim": 6}, "text.output_dim: 5 by the weights, 6 by"),
        ({"custom_text": True}, "is no configuration of OpenCLIP"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, capsys, change, message):
    file, config = tmp_path / "clip.safetensors", tmp_path / "config.json"
    save_file(checkpoint(CONFIG), file)
    config.write_text(json.dumps(CONFIG | change))
    args = [file, "--out", tmp_path / "out"]
    status = run(*args, *(["--config", config] if change else []))
    line = capsys.readouterr().err
    assert status == 2
    assert line.count("\n") == 1
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_heads_of_the_published_sizes_are_known():
    base = {"embed_dim": 16, "text_cfg": {"width": 64, "layers": 1, "heads": 1, "vocab_size": 9}}
    for width, layers, head in ((1280, 32, 80), (1408, 40, 88), (1664, 48, 104), (768, 12, 64)):
        vision = {"width": width, "layers": layers, "head_width": head, "patch_size": 14}
        wanted = open_clip.config_from_original(base | {"vision_cfg": vision | {"image_size": 28}})
        assert open_clip.find_config(shapes(wanted)).config == wanted


def shapes(cfg):
    ours = flat_shapes(nnx.state(blank(CLIP, cfg)))
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in ours.items()}
    names = original_state_dict(zeros, cfg)
    return {key: np.broadcast_to(np.float32(0), shape) for key, (shape, _, _) in names.items()}


def test_a_ratio_that_a_config_rounds_is_understood():
    vision = {"width": 1664, "layers": 1, "head_width": 104, "patch_size": 14, "image_size": 28}
    text = {"width": 64, "layers": 1, "heads": 1, "vocab_size": 9}
    config = {"embed_dim": 16, "vision_cfg": vision | {"mlp_ratio": 4.9231}, "text_cfg": text}
    wanted = open_clip.config_from_original(config)
    assert open_clip.find_config(shapes(wanted), wanted).config == wanted
    alone = open_clip.find_config(shapes(wanted)).config.vision
    assert int(alone.mlp_ratio * 1664) == 8192


def test_the_layout_of_transformers_is_named(tmp_path, capsys):
    key = "text_model.encoder.layers.0.layer_norm1.weight"
    save_file({key: np.ones(2, np.float32)}, tmp_path / "clip.safetensors")
    assert run(tmp_path / "clip.safetensors", "--out", tmp_path / "out") == 2
    assert "CLIP as transformers writes it; take OpenCLIP's own file" in capsys.readouterr().err

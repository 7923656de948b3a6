"""LanDiff's semantic tokenizer and Theia at full size by shapes, tiny ones there and back."""

import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from flax import nnx
from tiny import random_module

from convert import from_torch, to_torch
from convert.engine.plan import flat_shapes
from convert.engine.sources import open_source
from convert.landiff import semantic_tokenizer, theia
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.models.vit import ViT, ViTConfig
from dicode_jax.nn.rngs import ShapeRngs, blank
from dicode_jax.storage import weights

TINY = SemanticTokenizerConfig(
    frames=FrameTokens(iframe=3, pframe=2),
    feature_dim=5,
    embed_dim=64,
    num_layers=1,
    num_heads=1,
    token_dim=6,
    codebook_size=9,
    code_dim=4,
)
VIT = ViTConfig(image_size=8, patch_size=4, embed_dim=64, num_layers=2, num_heads=1, mlp_dim=7)


def test_the_release_is_told_by_its_keys_consumed_and_filled():
    source = shapes_only(read_manifest("landiff_tokenizer"))
    assert len(source) == 319
    told = semantic_tokenizer.find_config(source)
    assert told.config == SemanticTokenizerConfig()
    assert {"num_heads", "grid", "frames.segment"} <= told.assumed.keys()
    made = semantic_tokenizer.KIND.plan(source, told.config)
    assert made.problems == []
    report = made.report()
    assert report["used"] + len(report["skipped"]) == 319
    skipped = [f"quantizer._codebook.{x}" for x in ("cluster_size", "embed_avg", "initted")]
    assert list(report["skipped"]) == ["mean", *skipped, "std"]
    codes = 2048 * 16  # a buffer of the original
    assert report["parameters"] - codes == 174_511_120
    for side, want in (("encoder", 86_512_128), ("decoder", 87_973_632)):
        shapes = [s for path, s in made.shapes.items() if path.startswith(side)]
        assert sum(map(np.prod, shapes)) == want


def back(folder, module, cfg):
    weights.save_module(folder / "part", module, cfg)
    out = folder / "back.safetensors"
    assert to_torch.main([str(folder / "part"), "--out", str(out)]) == 0
    return {key: tensor.numpy() for key, tensor in open_source(out).items()}


def test_a_tokenizer_comes_back_bit_for_bit(tmp_path):
    model = random_module(lambda: SemanticTokenizer(TINY, rngs=ShapeRngs()))
    source = state_dict(model, semantic_tokenizer.RULES)
    source |= semantic_tokenizer.stored_beside(TINY)
    source[semantic_tokenizer.AVERAGES] = source[semantic_tokenizer.CODES]
    assert semantic_tokenizer.find_config(source).config == TINY
    got = from_torch("landiff_semantic_tokenizer", source, TINY)
    written = back(tmp_path, got, TINY)
    assert written.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_theia_comes_back_but_for_its_translators(tmp_path):
    model = random_module(lambda: ViT(VIT, rngs=ShapeRngs()))
    source = state_dict(model, theia.RULES)
    assert source[f"{theia.BACKBONE}embeddings.cls_token"].shape == (1, 1, 64)
    extra = {"translator.backbone_adapter.weight": np.zeros((2, 2), np.float32)}
    assert theia.find_config(source | extra).config == VIT
    got = from_torch("landiff_theia", source | extra, VIT)
    written = back(tmp_path, got, VIT)
    assert written.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_a_vit_of_the_published_size_has_the_parameters_of_one():
    shapes = flat_shapes(nnx.state(blank(ViT, ViTConfig())))
    assert sum(map(np.prod, shapes.values())) == 85_798_656  # ViT-B/16 without head and pooler


def test_checkpoints_of_other_models_are_refused():
    for find in (semantic_tokenizer.find_config, theia.find_config):
        with pytest.raises(UserError, match="the checkpoint has no"):
            find({"wte.weight": np.zeros((2, 2))})

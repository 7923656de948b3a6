"""LanDiff's language model at full size by shapes, and a tiny one there and back by values."""

import numpy as np
import pytest
from convert_names import read_manifest, shapes_only, state_dict
from tiny import random_module

from convert import from_torch, to_torch
from convert.engine.rules import ConversionError
from convert.engine.sources import open_source
from convert.landiff import language_model
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.language_model import (
    RELEASED_BODY,
    LanguageModel,
    LanguageModelConfig,
)
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.storage import weights

BODY = LlamaConfig(
    **vars(RELEASED_BODY)
    | {"num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "embed_dim": 128, "mlp_dim": 10}
    | {"vocab_size": 12}
)
TINY = LanguageModelConfig(body=BODY, codebook_size=5, text_dim=6, micro_dim=7, sinusoid_dim=4)


def test_the_release_is_told_by_its_keys_consumed_and_filled():
    source = shapes_only(read_manifest("landiff_llm"))
    assert len(source) == 185
    told = language_model.find_config(source)
    assert told.config == LanguageModelConfig()
    assert {"body.num_heads", "frames"} <= told.assumed.keys()
    made = language_model.KIND.plan(source, told.config)
    assert made.problems == []
    report = made.report()
    assert (report["used"], report["skipped"]) == (185, {})
    assert report["parameters"] == 2_049_321_984
    counts = {
        "body.blocks.": 2_025_947_136,
        "body.final_norm.": 4_096,
        "body.head.": 4_208_640,
        "body.token_embed.": 4_208_640,
        ("text_in.", "text_out.", "null_text"): 12_589_056,
        ("num_frames.", "motion_score."): 2_364_416,
    }
    for names, want in counts.items():
        shapes = [s for path, s in made.shapes.items() if path.startswith(names)]
        assert sum(map(np.prod, shapes)) == want, names


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    model = random_module(lambda: LanguageModel(TINY, rngs=ShapeRngs()))
    source = state_dict(model, language_model.RULES)
    assert source["transformer.blocks.1.wqkv.weight"].shape == (384, 128)
    assert language_model.find_config(source).config == TINY
    got = from_torch("landiff_language_model", source, TINY)
    named = weights.named_arrays(model)
    for path, array in weights.named_arrays(got).items():
        np.testing.assert_array_equal(array, named[path], err_msg=path)
    weights.save_module(tmp_path / "lm", got, TINY)
    out = tmp_path / "back.safetensors"
    assert to_torch.main([str(tmp_path / "lm"), "--out", str(out)]) == 0
    back = open_source(out)
    assert back.keys() == source.keys()
    for key, value in source.items():
        np.testing.assert_array_equal(back[key].numpy(), value, err_msg=key)
    del source["transformer.blocks.0.wqkv.weight"]
    with pytest.raises(ConversionError) as caught:
        from_torch("landiff_language_model", source, TINY)
    assert len(caught.value.problems) == 3


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(UserError, match="no visual_embedding_model"):
        language_model.find_config({"wte.weight": np.zeros((2, 2))})

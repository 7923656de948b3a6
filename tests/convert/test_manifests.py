"""The key lists of the official files at full size: every key used, every target filled.

By shapes alone, so that no memory is needed. DynamiCrafter, Divot, GPT-2 and Llama are in their own
files.
"""

import collections
import json
import math

import pytest
from convert_names import read_manifest, shapes_only

from convert.dicode import command as dicode_command
from convert.dicode import found as dicode_found
from convert.dicode import modules as dicode
from convert.engine.plan import plan
from convert.parts import clip as open_clip
from convert.parts import deep_tokens
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS
from dicode_jax.models.clip import CLIPConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.models.gpt2 import GPT2Config


def with_schedule(tensors):
    """The buffers are compared by value, so they are the ones that the release must hold."""
    return tensors | {name: dicode_found.RELEASED.table(name) for name in PERSISTENT_BUFFERS}


@pytest.fixture(scope="module")
def system():
    return dicode_command.read_system(with_schedule(shapes_only(read_manifest("dicode_tokenizer"))))


@pytest.fixture(scope="module")
def language_model():
    return dicode_command.read_lm(shapes_only(read_manifest("dicode_llm_agent_only")))


def sizes(made, source):
    """Numbers in the keys that a plan uses, by module."""
    out = collections.Counter()
    keys = {part.key for parts in made.parts.values() for part in parts}
    for key in keys & set(source):
        out[dicode_parts(key)] += math.prod(source[key].shape)
    return out


def dicode_parts(key):
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "model" else parts[0]


def test_the_tokenizer_is_consumed_and_filled(system):
    assert system.problems == []
    manifest = shapes_only(read_manifest("dicode_tokenizer"))
    assert len(manifest) == 2535
    accounted = set(system.report["skipped"])
    counts = collections.Counter()
    for part in system.plans:
        accounted |= set(part.skipped) | {p.key for parts in part.parts.values() for p in parts}
        counts += sizes(part, manifest)
    assert accounted == set(manifest) | {"text_context", "null_tokens"}
    assert counts == {
        "model.diffusion_model": 1_438_843_476,
        "first_stage_model": 83_653_863,
        "cond_stage_model": 354_032_641 - 1,  # without the temperature
        "embedder": 632_076_800,  # the image tower; the rest is left over from a text tower
        "image_proj_model": 48_541_696,
    }
    dead = [k for k in system.plans.tokenizer.skipped if k.startswith("embedder.model.")]
    assert sum(math.prod(manifest[key].shape) for key in dead) == 683_800_065 - 632_076_800
    total = sum(math.prod(v.shape) for k, v in manifest.items() if k not in PERSISTENT_BUFFERS)
    assert total == 2_608_871_741


def test_the_configuration_of_the_release_is_found(system):
    cfg, report = system.config, system.report
    assert cfg.tokenizer == DeepTokenizerConfig(resize="stretch")
    assert cfg.decoder == ClipDecoderConfig()
    assert cfg.text == CLIPConfig().text
    assert "decoder.unet.dropout" in report["assumed"]
    sizes = [n for n in report["assumed"] if n.endswith(("dim", "queries", "channels", "layers"))]
    assert sizes == ["tokenizer.resampler.head_dim"]
    json.dumps(report)


def test_the_language_model_is_consumed_and_filled(language_model):
    cfg = language_model.config
    assert language_model.problems == []
    assert len(language_model.plans.source) == 498
    counts = language_model.plans.report()
    assert counts["used"] + len(counts["skipped"]) == 498
    skipped = {key.split(".")[0] for key in counts["skipped"]}
    assert skipped == {"llm", "pre_input_resampler"}
    assert counts["parameters"] == 774_114_560 + 2_951_680 + 43_635_984 + 61_440
    body = GPT2Config(
        num_layers=36, num_heads=20, embed_dim=1280, vocab_size=50323, dropout=0.1, scan_layers=True
    )
    assert cfg == DiCoDeLMConfig(body=body, mlp_dim=1280)
    assert language_model.report["assumed"]["body.num_heads"] == 20


def test_the_other_files_hold_the_same_keys_and_shapes(language_model):
    tokenizer = shapes_only(read_manifest("dicode_tokenizer"))
    wrapped = {"module": shapes_only(read_manifest("dicode_tokenizer_deepspeed")["module"])}
    assert dicode.unwrap(wrapped) == tokenizer
    agent = shapes_only(read_manifest("dicode_llm_agent_only"))
    whole = shapes_only(read_manifest("dicode_llm_gpt2_large"))
    assert len(whole) == 3033
    assert whole == tokenizer | {dicode.LANGUAGE_MODEL + key: v for key, v in agent.items()}
    made = dicode_command.read_lm(whole)
    assert made.problems == []
    assert made.config == language_model.config
    assert made.plans.shapes == language_model.plans.shapes


def test_clip_is_found_consumed_and_filled():
    source = shapes_only(read_manifest("openclip_vit_h_14"))
    told = open_clip.find_config(source)
    assert told.config == CLIPConfig()
    assert told.assumed["vision.num_heads"] == 16
    made = open_clip.TOWERS.plan(source, told.config)
    assert made.problems == []
    assert made.skipped == {}
    assert made.report()["parameters"] == 986_109_441


@pytest.mark.parametrize("key", ["model.diffusion_model.out.2.bias", "embedder.model.visual.proj"])
def test_one_missing_key_is_named(system, key):
    tensors = dict(system.plans.tokenizer.source) | dict(system.plans.decoder.source)
    assert key in tensors
    part = system.plans.decoder if key.startswith("model") else system.plans.tokenizer
    left = {k: v for k, v in part.source.items() if k != key}
    rules = deep_tokens.decoder_rules(left)
    rules = rules if part is system.plans.decoder else deep_tokens.TOKENIZER_RULES
    (line,) = plan(left, rules, part.shapes).problems
    assert line.startswith("unfilled target: ")
    assert f"(from {key}" in line

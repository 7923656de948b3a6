"""`python -m convert.llama`: Hugging Face folders to language-model bodies."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from convert_names import read_manifest, shapes_only
from hugging_face_folder import draw, write_folder

import convert
from convert.engine.plan import plan
from convert.engine.rules import ConversionError
from convert.parts import hugging_face, llama
from dicode_jax.models.causal_lm import BodyConfig, build_body
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.nn.rotary import RotaryScaling
from dicode_jax.storage import weights

SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
CONFIG = {  # as the hub's files have it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 9,
    "eos_token_id": 10,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 12,
    "initializer_range": 0.02,
    "intermediate_size": 10,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 11,
}
EXPECTED = LlamaConfig(
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    embed_dim=12,
    head_dim=4,
    mlp_dim=10,
    max_seq_len=64,
    vocab_size=11,
)


def checkpoint(prefix="model.", **changes):
    shapes = {f"{prefix}embed_tokens.weight": (11, 12), f"{prefix}norm.weight": (12,)}
    for i in range(2):
        layer = {
            "input_layernorm": (12,), "post_attention_layernorm": (12,),
            "self_attn.q_proj": (24, 12), "self_attn.k_proj": (8, 12), "self_attn.v_proj": (8, 12),
            "self_attn.o_proj": (12, 24), "mlp.gate_proj": (10, 12), "mlp.up_proj": (10, 12),
            "mlp.down_proj": (12, 10),
        }  # fmt: skip
        shapes |= {f"{prefix}layers.{i}.{k}.weight": shape for k, shape in layer.items()}
    return draw(shapes) | changes


def run(*args):
    return hugging_face.main(llama.FAMILY, [str(arg) for arg in args])


def load(folder):
    return weights.load_module(folder, build_body, BodyConfig)


@pytest.mark.parametrize(("prefix", "num_shards"), [("model.", 2), ("", 1)])
def test_every_layout_of_a_folder_converts(tmp_path, prefix, num_shards):
    tensors = {k: jnp.asarray(v, jnp.bfloat16) for k, v in checkpoint(prefix).items()}
    tensors = {k: np.asarray(v) for k, v in tensors.items()}
    extra = {
        "lm_head.weight": tensors[f"{prefix}embed_tokens.weight"],
        f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    folder = write_folder(tmp_path / "in", CONFIG, tensors | extra, num_shards=num_shards)
    assert run(folder, "--out", tmp_path / "out") == 0
    model, cfg = load(tmp_path / "out")
    assert cfg == EXPECTED
    got = weights.named_arrays(model)
    for path, key in (
        ("token_embed.embedding", "embed_tokens"),
        ("blocks.1.attn.k.kernel", "layers.1.self_attn.k_proj"),
        ("blocks.0.mlp.down.kernel", "layers.0.mlp.down_proj"),
        ("blocks.1.mlp_norm.scale", "layers.1.post_attention_layernorm"),
    ):
        want = tensors[f"{prefix}{key}.weight"].astype(np.float32)
        np.testing.assert_array_equal(got[path], want.T if path.endswith("kernel") else want)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert set(report["skipped"]) == set(extra)
    assert weights.read_metadata(tmp_path / "out")["origin"] == "llama"


def test_an_untied_head_is_taken_over_and_grown_too(tmp_path):
    head = draw({"h": (11, 12)}, seed=5)["h"]
    folder = write_folder(
        tmp_path / "in",
        CONFIG | {"tie_word_embeddings": False},
        checkpoint(**{"lm_head.weight": head}),
    )
    assert run(folder, "--out", tmp_path / "out", "--for-dicode") == 0
    model, cfg = load(tmp_path / "out")
    assert (cfg.tie_embeddings, cfg.vocab_size) == (False, 77)
    assert model.token_embed.embedding.shape == (77, 12)
    np.testing.assert_array_equal(model.head.kernel[...][:, :11], head.T)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_from_torch_fills_both_forms(scan_layers):
    tensors = checkpoint()
    config = LlamaConfig(**{**vars(EXPECTED), "scan_layers": scan_layers})
    model = convert.from_torch("llama", tensors, config)
    kernel = model.blocks.attn.q.kernel[1] if scan_layers else model.blocks[1].attn.q.kernel
    np.testing.assert_array_equal(kernel[...], tensors["model.layers.1.self_attn.q_proj.weight"].T)


def test_a_head_that_is_not_tied_as_the_config_says_is_refused():
    tensors = checkpoint(**{"lm_head.weight": np.zeros((11, 12), np.float32)})
    with pytest.raises(ConversionError, match="not tied"):
        convert.from_torch("llama", tensors, CONFIG)
    with pytest.raises(ConversionError, match=r"unfilled target: head\.kernel"):
        convert.from_torch("llama", checkpoint(), CONFIG | {"tie_word_embeddings": False})


def test_old_and_new_rope_options_say_the_same():
    new = {k: v for k, v in CONFIG.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = SCALING | {"rope_theta": 500000.0}
    assert llama.config_from_original(new) == llama.config_from_original(CONFIG) == EXPECTED
    plain = CONFIG | {"rope_scaling": None, "rope_theta": 10000.0}
    cfg = llama.config_from_original(plain)
    assert (cfg.rope_scaling, cfg.rope_theta) == (None, 10000.0)
    half = llama.config_from_original(CONFIG | {"rope_scaling": SCALING | {"factor": 8.0}})
    assert half.rope_scaling == RotaryScaling(factor=8.0)


def test_notes_of_other_tools_are_passed_over_and_told():
    notes = {"unsloth_fixed": True, "unsloth_version": "2025.1"}
    with pytest.warns(UserWarning, match="passed over: unsloth_fixed, unsloth_version"):
        assert llama.config_from_original(CONFIG | notes) == EXPECTED


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling 'linear'"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"num_experts": 8}, "unknown option.*num_experts"),
        ({"num_key_value_heads": 4}, r"num_kv_heads \(4\) must divide num_heads \(6\)"),
    ],
)
def test_options_that_would_change_the_result_are_refused(option, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        llama.config_from_original(CONFIG | option)
    folder = write_folder(tmp_path / "in", CONFIG | option, checkpoint())
    assert run(folder, "--out", tmp_path / "out") == 2
    assert "is not a config of Llama" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [
        ("llama-3.2-1b", (16, 32, 8, 64, 2048), 1_235_814_400),
        ("llama-3.2-3b", (28, 24, 8, 128, 3072), 3_212_749_824),
    ],
)
def test_published_models_convert_by_shapes_alone(name, sizes, parameters):
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    options = dict(zip((*names, "hidden_size"), sizes, strict=True))
    options |= {"intermediate_size": 8192, "vocab_size": 128_256, "max_position_embeddings": 131072}
    cfg = llama.config_from_original(CONFIG | options)
    assert cfg.head_dim is None  # it follows from the others
    keys = shapes_only(read_manifest(f"hf_{name}"))
    done = plan(keys, llama.rules(cfg), blank(build_body, cfg))
    assert done.problems == []
    assert done.skipped == {}
    assert done.report()["parameters"] == parameters

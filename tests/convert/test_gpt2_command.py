"""`python -m convert.gpt2`: Hugging Face folders to language-model bodies."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from convert_names import read_manifest, shapes_only
from fake_hub import FakeHub
from hugging_face_folder import draw, write_folder
from tokenizers import pre_tokenizers

from convert.engine.plan import plan
from convert.parts import gpt2, hugging_face
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.models.causal_lm import BodyConfig, build_body
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import weights
from dicode_jax.text import gpt as text

LAYERS, WIDTH, VOCAB = 2, 8, 11
CONFIG = {  # as the hub's files have it
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "bos_token_id": 10,
    "eos_token_id": 10,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 16,
    "n_embd": WIDTH,
    "n_head": 2,
    "n_layer": LAYERS,
    "n_positions": 16,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "vocab_size": VOCAB,
}


def checkpoint(prefix="", **changes):
    d = WIDTH
    shapes = {"wte.weight": (VOCAB, d), "wpe.weight": (16, d)}
    for i in range(LAYERS):
        layer = {
            "ln_1": (d,), "ln_2": (d,), "attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d),
            "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d),
        }  # fmt: skip
        for name, shape in layer.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    return {prefix + key: value for key, value in draw(shapes).items()} | changes


def run(*args):
    return hugging_face.main(gpt2.FAMILY, [str(arg) for arg in args])


def load(folder):
    return weights.load_module(folder, build_body, BodyConfig)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_layout_of_a_folder_converts(tmp_path, prefix, num_shards):
    tensors = checkpoint(prefix)
    extra = {
        "lm_head.weight": tensors[f"{prefix}wte.weight"],
        f"{prefix}h.0.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32)),
        f"{prefix}h.1.attn.masked_bias": np.asarray(-1e4, np.float32),
    }
    folder = write_folder(tmp_path / "in", CONFIG, tensors | extra, num_shards=num_shards)
    out = tmp_path / "out"
    assert run(folder, "--out", out) == 0
    model, cfg = load(out)
    assert cfg == GPT2Config(
        num_layers=2, num_heads=2, embed_dim=8, max_seq_len=16, vocab_size=VOCAB, dropout=0.1
    )
    got = weights.named_arrays(model)
    for path, key in (
        ("token_embed.embedding", "wte.weight"),
        ("blocks.1.attn.qkv.kernel", "h.1.attn.c_attn.weight"),
        ("blocks.0.mlp.down.bias", "h.0.mlp.c_proj.bias"),
    ):
        np.testing.assert_array_equal(got[path], tensors[prefix + key])
    report = json.loads((out / "conversion.json").read_text())
    assert set(report["skipped"]) == set(extra)
    assert report["used"] == len(tensors) == len(got)
    assert len(report["sources"]) == (1 if num_shards == 1 else 4)  # the index is one of them
    assert weights.read_metadata(out)["origin"] == "gpt2"


def test_rows_for_the_image_tokens_are_appended_always_the_same(tmp_path):
    small = text.train_small(all_captions(), vocab_size=300)
    count = small.vocab_size - len(text.IMAGE_TOKENS)
    table = draw({"t": (count, WIDTH)})["t"]
    folder = write_folder(
        tmp_path / "in",
        CONFIG | {"vocab_size": count, "initializer_range": 0.5},
        checkpoint(**{"wte.weight": table, "lm_head.weight": table}),
    )
    small.save(folder)
    tables = []
    for name in ("one", "two"):
        assert run(folder, "--out", tmp_path / name, "--for-dicode") == 0
        model, cfg = load(tmp_path / name)
        assert cfg.vocab_size == count + 66
        tables.append(np.asarray(model.token_embed.embedding[...]))
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[0][:count], table)
    assert np.std(tables[0][count:]) == pytest.approx(0.5, rel=0.1)  # 528 draws
    assert text.TextTokenizer.from_file(tmp_path / "one").vocab_size == cfg.vocab_size
    report = json.loads((tmp_path / "one" / "conversion.json").read_text())
    assert report["new_rows"] == {"count": 66, "normal_std": 0.5}


def gpt2_folder(path, num_rows, **added):
    """A byte vocabulary in GPT-2's files, tokens beside it, and a table of so many rows."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), text.END_OF_TEXT]
    table = draw({"t": (num_rows, WIDTH)})["t"]
    folder = write_folder(
        path, CONFIG | {"vocab_size": num_rows}, checkpoint(**{"wte.weight": table})
    )
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder, table


@pytest.mark.parametrize(
    ("num_rows", "wanted"), [(259, 259 + 66), (288, 259 + 66), (400, 400)], ids=str
)
def test_a_padding_token_and_a_padded_table_are_no_hindrance(tmp_path, num_rows, wanted):
    folder, table = gpt2_folder(tmp_path / "in", num_rows, PAD=257, SEP=258)
    assert run(folder, "--out", tmp_path / "out", "--for-dicode") == 0
    model, cfg = load(tmp_path / "out")
    assert cfg.vocab_size == wanted
    np.testing.assert_array_equal(model.token_embed.embedding[...][:num_rows], table)
    tokenizer = text.TextTokenizer.from_file(tmp_path / "out")
    assert (tokenizer.pad_id, tokenizer.image_start_id) == (256, 260)
    assert tokenizer.encode("PAD").lengths == (1,)


def test_added_tokens_that_do_not_follow_the_vocabulary_are_refused(tmp_path, capsys):
    folder, _ = gpt2_folder(tmp_path / "in", 300, PAD=280)
    assert run(folder, "--out", tmp_path / "out", "--for-dicode") == 2
    assert "gives 'PAD' the id 280; the next is 257" in capsys.readouterr().err


def test_options_that_change_nothing_pass_and_what_is_not_known_is_reported(tmp_path, capsys):
    labels = {"id2label": {"0": "A"}, "label2id": {"A": 0}, "_num_labels": 1, "is_decoder": False}
    forged = "my\x1b[2Jnote\nall is well"
    told_of = "my\\x1b[2Jnote all is well"
    for extra, told in ((labels, []), ({"my_note": 3}, ["my_note"]), ({forged: 3}, [told_of])):
        folder = write_folder(tmp_path / "in", CONFIG | extra, checkpoint())
        assert run(folder, "--out", tmp_path / "out", "--overwrite") == 0
        said = [f"options of the config that GPT-2 does not have are passed over: {name}"
                for name in told]  # fmt: skip
        assert capsys.readouterr().out.splitlines()[1:] == said
        assert json.loads((tmp_path / "out/conversion.json").read_text())["notes"] == said
    with pytest.warns(UserWarning, match="passed over: my_note"):
        gpt2.config_from_original(CONFIG | {"my_note": 3})
    for name in ("rope_theta", "qk_norm", "attn_bias", "mlp_act", "layer_types", "quantization"):
        write_folder(tmp_path / "in", CONFIG | {name: 1}, checkpoint())
        assert run(tmp_path / "in", "--out", tmp_path / "out", "--overwrite") == 2
        assert f"unknown option(s) of GPT-2: {name}" in capsys.readouterr().err


@pytest.mark.torch
def test_storage_types_and_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    folder = write_folder(tmp_path / "in", CONFIG, {"x": np.zeros(1, np.float32)})
    (folder / "model.safetensors").unlink()
    tensors = checkpoint("transformer.")
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / "pytorch_model.bin")
    assert run(folder, "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    stored = weights.read_arrays(tmp_path / "out" / weights.WEIGHTS_FILE)
    assert {array.dtype for array in stored.values()} == {jnp.dtype(jnp.bfloat16)}
    want = jnp.asarray(tensors["transformer.wpe.weight"], jnp.bfloat16)
    np.testing.assert_array_equal(stored["position_embed.embedding"], want)


def without(key):
    tensors = checkpoint()
    del tensors[key]
    return tensors


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (CONFIG, without("h.1.ln_2.bias"), "unfilled target: blocks.1.mlp_norm.bias"),
        (CONFIG, checkpoint(**{"extra.weight": np.zeros(2, np.float32)}), "extra.weight"),
        (CONFIG | {"n_embd": 10}, checkpoint(), "does not fit"),
        (
            CONFIG,
            checkpoint(**{"lm_head.weight": np.zeros((VOCAB, WIDTH), np.float32)}),
            "lm_head.weight is not tied to wte.weight",
        ),
        (CONFIG, checkpoint(**{"wpe.weight": np.full((16, WIDTH), np.nan, np.float32)}), "NaN"),
        ({"model_type": "llama"}, checkpoint(), "is not a config of GPT-2: model_type='llama'"),
        ({"n_embd": 8}, checkpoint(), "is not a config of GPT-2: no 'n_layer'"),
        (CONFIG | {"n_layer": "two"}, checkpoint(), "is not a config of GPT-2"),
        (CONFIG | {"n_layer": 2.0}, checkpoint(), "num_layers"),
        (CONFIG | {"n_layer": 10**9}, checkpoint(), "num_layers must be at most 1000"),
        (
            CONFIG | {"n_layer": 300},
            checkpoint(**{f"h.{i}.ln_1.bias": np.zeros(1, np.float32) for i in range(2, 300)}),
            "names 300 layers",
        ),
        (CONFIG | {"initializer_range": None}, checkpoint(), "initializer_range must be"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    tmp_path, capsys, config, tensors, message
):
    folder = write_folder(tmp_path / "in", config, tensors)
    assert run(folder, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_without_config_or_with_a_tokenizer_of_another_size_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--out", tmp_path / "out") == 2
    assert "no config.json in" in capsys.readouterr().err
    folder = write_folder(tmp_path / "in", CONFIG, checkpoint())
    text.train_small(all_captions()).save(folder)
    assert run(folder, "--out", tmp_path / "out", "--for-dicode") == 2
    assert "the token table 77 rows" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_of_the_hub_stands_for_its_folder(tmp_path, monkeypatch, capsys, name):
    folder = write_folder(tmp_path / "hub", CONFIG, checkpoint(), num_shards=2)
    for other in ("pytorch_model.bin", "onnx/config.json", "README.md", "tf_model.h5"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("not asked for")
    fake = FakeHub(tmp_path / "cache", monkeypatch)
    fake.repositories[name] = folder
    assert run(folder, "--out", tmp_path / "one") == run(name, "--out", tmp_path / "two") == 0
    one, two = (tmp_path / out / weights.WEIGHTS_FILE for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert {file.split("-")[0] for file in fake.files(name)} == {
        "config.json", "model", "model.safetensors.index.json"
    }  # fmt: skip
    asked = len(fake.asked)
    assert run(name, "--out", tmp_path / "two") == 2  # before anything is fetched
    assert "is already there" in capsys.readouterr().err
    assert len(fake.asked) == asked
    assert run("gpt-2", "--out", tmp_path / "three") == 2
    assert "no such model on the Hub" in capsys.readouterr().err


SIZES = {  # published parameter counts
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("published", [False, True])
def test_published_models_convert_by_shapes_alone(name, published):
    num_layers, num_heads, width, parameters = SIZES[name]
    keys = read_manifest(f"hf_{name}")
    if published:  # the hub's files: no prefix, no head, a mask in every block
        del keys["lm_head.weight"]
        keys = {key.removeprefix("transformer."): value for key, value in keys.items()}
        keys |= {f"h.{i}.attn.bias": [1, 1, 1024, 1024] for i in range(num_layers)}
    cfg = gpt2.config_from_original(
        CONFIG
        | {"n_layer": num_layers, "n_head": num_heads, "n_embd": width, "n_inner": 4 * width}
        | {"n_positions": 1024, "vocab_size": 50257}
    )
    done = plan(shapes_only(keys), gpt2.RULES, blank(build_body, cfg))
    assert done.problems == []
    assert set(done.skipped) == {
        k for k in keys if k.endswith(".attn.bias") or k == "lm_head.weight"
    }
    assert done.report()["parameters"] == parameters

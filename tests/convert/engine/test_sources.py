"""Checkpoints as lazy mappings: what is read, unwrapped, hashed, and refused on one line."""

import hashlib
import io
import json
import pickle
import re
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.engine import sources
from convert.engine.sources import open_source
from dicode_jax.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def state_dict():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "a.weight": draw(3, 4).half(),
        "a.bias": draw(4).bfloat16(),
        "scale": torch.tensor(2.5),
        "turned": draw(5, 6).t(),
        "ids": torch.arange(3),
        "empty": torch.zeros(0, 2),
    }


def assert_same(source, state_dict):
    assert set(source) == set(state_dict)
    for key, tensor in state_dict.items():
        got = source[key].numpy()
        assert got.dtype == source[key].dtype
        assert got.shape == source[key].shape == tuple(tensor.shape)
        assert got.dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(got.astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: {"state_dict": d, "epoch": 3},
        lambda d: {"module": {f"_forward_module.{k}": v for k, v in d.items()}},
        lambda d: {f"_forward_module.{k}": v for k, v in d.items()},
        lambda d: {"state_dict": {f"module.{k}": v for k, v in d.items()}},
        lambda d: {"model": {f"_orig_mod.{k}": v for k, v in d.items()}},
        lambda d: {f"module._orig_mod.module._forward_module.{k}": v for k, v in d.items()},
        lambda d: {
            f"_orig_mod.module.{k}".replace("a.", "a._fsdp_wrapped_module."): v
            for k, v in d.items()
        },
    ],
)
def test_torch_files_are_read_and_unwrapped(state_dict, wrap, tmp_path):
    torch.save(wrap(state_dict), tmp_path / "x.bin")
    source = open_source(tmp_path / "x.bin")
    assert_same(source, state_dict)
    assert list(source.left_out) == (["epoch"] if "epoch" in wrap(state_dict) else [])


def test_averages_beside_the_weights_are_left_out_with_a_reason(state_dict, tmp_path):
    average = {f"model_ema.{key}": torch.zeros(2) for key in state_dict}
    content = {"model": state_dict | average, "ema": state_dict, "optimizer": {}}
    torch.save(content, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert_same(source, state_dict)
    assert "average" in source.left_out["model_ema.*"]
    assert "average" in source.left_out["ema"]
    assert "no weights" in source.left_out["optimizer"]


def test_one_weight_under_two_prefixes_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1), "_orig_mod.a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="same weights under several prefixes"):
        open_source(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["float64", "float32", "int64", "bool"])
def test_plain_numpy_numbers_beside_the_weights_are_no_code(state_dict, tmp_path, kind):
    content = {"state_dict": state_dict, "epoch": np.ones((), kind)[()], "name": "x"}
    torch.save(content, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert_same(source, state_dict)
    assert set(source.left_out) == {"epoch", "name"}


def test_memory_maps_are_renewed_between_reads(state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_REOPEN", 20)
    torch.save({"state_dict": state_dict}, tmp_path / "x.pt")
    assert_same(open_source(tmp_path / "x.pt"), state_dict)


def test_safetensors_are_read_without_torch(tmp_path, monkeypatch):
    arrays = {
        "b": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "h": np.arange(4, dtype=np.float16),
        "f": np.array(1.5, np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    source = open_source(tmp_path / "x.safetensors")
    for key, array in arrays.items():
        assert source[key].dtype == array.dtype
        np.testing.assert_array_equal(source[key].numpy(), array)
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"need PyTorch 2\.10 or later"):
        open_source(tmp_path / "x.bin")


def test_a_header_of_many_names_is_refused_before_it_is_read(tmp_path):
    header = json.dumps({f"w{i:07}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                         for i in range(250_000)}).encode()  # fmt: skip
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=f"claims {len(header)} bytes for the names"):
        open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize("version", ["2.5.1+cpu", "2.9.1"])
def test_an_old_torch_is_refused(version, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    (tmp_path / "x.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"PyTorch {re.escape(version)} cannot read torch files"):
        open_source(tmp_path / "x.bin")


def test_hashes_are_those_of_the_files(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "x.bin")
    want = hashlib.sha256((tmp_path / "x.bin").read_bytes()).hexdigest()
    assert open_source(tmp_path / "x.bin").sha256() == {"x.bin": want}


def sharded(folder, places):
    for name in {*places.values()}:
        own = {
            key: np.full(2, i, np.float32) for i, (key, n) in enumerate(places.items()) if n == name
        }
        save_file(own, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_put_together(tmp_path):
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    source = open_source(tmp_path)
    assert {key: source[key].numpy()[0] for key in source} == {"a": 0, "b": 1, "c": 2}
    assert len(source.sha256()) == 3


def test_an_index_may_name_the_tied_head_that_no_shard_holds(tmp_path):
    index = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    places = {"module.a": "1.safetensors", "module.lm_head.weight": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": places | {"module.b": "2.safetensors"}}))
    source = open_source(tmp_path)
    assert set(source) == {"a", "b"}
    assert "tied" in source.left_out["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {"a": "1.safetensors"}}, "disagree about c"),
        ({"weight_map": {"a": "../1.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "1.safetensors", "c": "1.safetensors", "z": "1.safetensors"}},
         "z is not in 1.safetensors"),
        ({"weight_map": ["a"]}, "not an index"),
        ({"weight_map": {"a": 1}}, "not an index"),
        ({"weight_map": {"a": ".."}}, "outside its folder"),
        ({"weight_map": {"a": ""}}, "'', which is no checkpoint"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "which is no checkpoint"),
        ({"weight_map": {"a" * 400: "1.safetensors"}}, "a name of 400 characters"),
        ({}, "not an index"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards_is_refused(change, message, tmp_path):
    index = sharded(tmp_path, {"a": "1.safetensors", "c": "1.safetensors"})
    index.write_text(json.dumps(change))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_wants_code_is_refused_and_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"a": Attack(trap)}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"wants to run code \(.*open\)"):
        open_source(tmp_path / "x.bin")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Attack(trap)))
    with pytest.raises(UserError, match="not a torch file"):
        open_source(tmp_path / "y.pt")
    assert not trap.exists()


def rewritten(path, out, *, compress=False, change=lambda name, data: data):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            new.writestr(name, change(name, old.read(name)), kind)


def test_a_compressed_archive_is_refused_before_it_is_opened(state_dict, tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", tmp_path / "bomb.bin", compress=True)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match="compressed entries"):
        open_source(tmp_path / "bomb.bin")


def test_a_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="more than is stored"):
        open_source(tmp_path / "x.bin")


def test_every_lost_byte_is_noticed(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    for size in (0, 1, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            open_source(tmp_path / "cut.bin").sha256()
        assert "\n" not in str(error.value)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    values = torch.arange(1000, dtype=torch.float32)
    torch.save({"a": values}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    at = data.index(struct.pack("<3f", 500, 501, 502))
    data[at] ^= 4
    (tmp_path / "x.bin").write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum of x/data/0 is wrong"):
        open_source(tmp_path / "x.bin").sha256()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 3}, "'a' is a int, not a tensor"),
        ({3: torch.zeros(1)}, "not a tensor"),
        ([torch.zeros(1)], "holds a list, not a state dict"),
        ({}, "holds no tensors"),
        ({"a": torch.zeros(2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "dtype that is not supported"),
        ({"module.a": torch.zeros(1), "b": torch.zeros(1)}, "some keys start with module."),
    ],
)
def test_what_is_no_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.bin")


def test_foreign_forms_are_named_with_their_cure(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for path in (tmp_path, pointer):
        with pytest.raises(UserError, match=r"Git LFS pointer .* run git lfs pull"):
            open_source(path)
    pointer.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"PEFT adapter.*merge_and_unload"):
        open_source(tmp_path)
    save_file({"base_model.model.h.lora_A.weight": np.zeros(2, np.float32)}, pointer)
    with pytest.raises(UserError, match=r"PEFT adapter.*merge_and_unload"):
        open_source(pointer)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match=r"TorchScript program.*torch\.jit\.load"):
        open_source(tmp_path / "script.pt")


def test_of_a_folder_the_only_checkpoint_is_read_and_safetensors_before_others(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "x_512.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"not looked at")
    assert list(sources.open_source(tmp_path)) == ["a"]
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"several checkpoints: give one of x_512\.\w+, y"):
        sources.open_source(tmp_path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "b.npz").write_bytes(b"x")
    old = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    (tmp_path / "c.pth").write_bytes(old.getvalue())
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("hello.txt", "x")
    for name, message in (
        ("a.safetensors", "not a whole safetensors file"),
        ("b.npz", "neither .safetensors nor a torch file"),
        ("c.pth", "not a torch file of PyTorch 1.6 or later"),
        ("d.pt", "not one that torch.save wrote"),
        ("none.bin", "no checkpoint at"),
        ("", "not a whole safetensors file"),  # the one in it
    ):
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)

"""Torch files that attack: refused on one line, before torch reads their pickle. Others pass."""

import os
import re
import struct
import zipfile
from collections import Counter

import numpy as np
import pytest

from convert.engine.sources import open_source
from dicode_jax.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

STORAGE = b"\0" * 16


def text(string):
    data = string.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(number):
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def call(function, *arguments):
    return b"c" + function.encode() + b"\n(" + b"".join(arguments) + b"tR"


def mapping(key, value):
    return b"\x80\x02}" + key + value + b"s."


def tensor(shape, stride):
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(4)
    sizes = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, stride)]
    parts = [b"(" + storage + b"tQ", integer(0), *sizes, b"\x89", b"ccollections\nOrderedDict\n)R"]
    return call("torch._utils\n_rebuild_tensor_v2", *parts)


def archive(path, data, *extra):
    """A file as torch.save writes it, with any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        entries = ("data.pkl", data), ("version", "3\n"), ("data/0", STORAGE), *extra
        for name, content in entries:
            file.writestr(f"a/{name}", content)
    return path


def doubled(levels):
    """Two times two times ... the same tuple."""
    steps = [
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels)
    ]
    return b")q\0" + b"".join(steps)


VECTOR = tensor([4], [1])
HOSTILE = {
    "more than 1000 values": mapping(doubled(26), b"K\x01"),
    "a tuple of more than 1000": mapping(b")" + b"\x85" * 2000, b"K\x01"),
    r"code \(builtins.bytearray\)": mapping(text("w"), call("builtins\nbytearray", integer(1))),
    r"code \(torch.FloatTensor\)": mapping(text("w"), call("torch\nFloatTensor", integer(1))),
    r"code \(torch.UntypedStorage\)": mapping(
        text("w"), b"ctorch\nUntypedStorage\n" + integer(1) + b"\x85\x81"
    ),
    r"code \(_codecs.encode to punycode\)": mapping(
        text("w"), call("_codecs\nencode", text("x"), text("punycode"))
    ),
    r"code \(torch.Tensor\)": mapping(
        text("w"),
        call("torch._tensor\n_rebuild_from_type_v2", b"ctorch\nTensor\n" * 2, b")", b"N"),
    ),
    r"code \(numpy.ndarray\)": mapping(text("w"), call("numpy\nndarray", integer(2**40))),
    r"code \(numpy.core.multiarray.system\)": mapping(
        text("w"), call("numpy.core.multiarray\nsystem", text("true"))
    ),
    r"code \(os.system\)": mapping(
        text("w"),
        call(
            "numpy._core.multiarray\n_reconstruct",
            *(call("os\nsystem", text("touch here")), integer(0) + b"\x85", text("b")),
        ),
    ),
    r"code \(posix.system\)": mapping(
        text("w"),
        call("numpy._core.multiarray\n_reconstruct", b"cposix\nsystem\n", b")", text("b"))
        + b"cposix\nsystem\n" + text("true") + b"\x85Rb",
    ),
    "holds STACK_GLOBAL": mapping(text("w"), text("os") + text("getcwd") + b"\x93)R"),
    "holds SETITEM for what takes no items": mapping(text("w"), VECTOR + text("k") + b"K\x01s"),
    "holds APPEND for what takes no items": mapping(text("w"), b"}K\x01a"),
    "sparse, quantised": mapping(text("w"), call("torch._utils\n_rebuild_qtensor", b"K\x01")),
    "takes what it has not put": mapping(text("w"), b"h\x07"),
    "goes on and on": b"\x80\x02}q\0" + text("model") + b"h\0s.",
    "name of 70000 characters, which no weight has: K{100}": mapping(text("K" * 70_000), VECTOR),
    "'K{100}' is a int": mapping(text("K" * 70_000), b"K\x01"),
    "'a tuple' is a int": mapping(b"K\x01\x85", b"K\x01"),
    "more than is stored": mapping(text("w"), tensor([5], [0])),
}  # fmt: skip


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_pickle_is_refused_on_one_line(message, tmp_path):
    path = archive(tmp_path / "x.pt", HOSTILE[message])
    with pytest.raises(UserError, match=message) as raised:
        open_source(path)
    assert len(str(raised.value).replace(str(path), "")) < 250


def test_tensors_that_share_their_numbers_are_not_written_out_many_times(tmp_path):
    stored = torch.zeros(1000)
    torch.save({"table": stored, "head": stored}, tmp_path / "tied.pt")
    assert len(open_source(tmp_path / "tied.pt")) == 2
    torch.save({f"w{i}": stored for i in range(100)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="claims 400000 bytes of tensors, more than is stored"):
        open_source(tmp_path / "x.pt")


def test_attributes_do_not_stand_in_for_methods(tmp_path):
    attributes = b"}" + b"".join(text(name) + b"K\x01s" for name in ("items", "get", "keys"))
    data = b"\x80\x02ccollections\nOrderedDict\n)R" + attributes + b"b" + text("w") + VECTOR + b"s."
    source = open_source(archive(tmp_path / "x.pt", data))
    np.testing.assert_array_equal(source["w"].numpy(), np.zeros(4))


def lightning(steps=1):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model.state_dict(), {
        "epoch": 3,
        "global_step": np.int64(12),
        "pytorch-lightning_version": "1.9.3",
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "_last_lr": (1e-4,)}],
        "loops": {"state": {}, "done": None, "rate": 0.5, "large": 2**40},
        "rng": torch.get_rng_state(),
        "python": (3, tuple(range(625)), None),
        "seen": Counter("ab"),
        "shape": torch.Size([2, 3]),
        "names": {"a", "b"},
        "bytes": b"\xff\x00",
        "type": torch.float16,
        "device": torch.device("cpu"),
    }


def test_checkpoints_of_trainings_are_read(tmp_path):
    state_dict, beside = lightning()
    torch.save({"state_dict": state_dict, **beside}, tmp_path / "x.ckpt")
    source = open_source(tmp_path / "x.ckpt")
    assert set(source.left_out) == set(beside)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(source[key].numpy(), value.numpy())


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_a_state_of_numpy_s_randomness_beside_the_weights_is_passed_over(tmp_path, core):
    written = tmp_path / "mp_rank_00_model_states.pt"
    state = np.random.RandomState(0).get_state()
    torch.save({"module": {"w": torch.arange(3.0)}, "np_rng_state": state}, written)
    with zipfile.ZipFile(written) as file:
        folder = file.namelist()[0].split("/")[0]
        data = file.read(f"{folder}/data.pkl")
    assert b"_reconstruct" in data
    storage = np.arange(3, dtype=np.float32).tobytes()
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        for name, content in {
            "data.pkl": re.sub(rb"numpy\._?core\.", core, data), "version": "3\n",
            "byteorder": "little", "data/0": storage,
        }.items():  # fmt: skip
            file.writestr(f"a/{name}", content)
    for path in (written, tmp_path / "x.pt"):
        source = open_source(path)
        assert set(source.left_out) == {"np_rng_state"}
        np.testing.assert_array_equal(source["w"].numpy(), np.arange(3.0))


def test_parameters_with_attributes_and_new_types_are_read(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.numel = 1  # hides the method
    content = {
        "a": parameter,
        "b": torch.arange(3).to(torch.uint16),
        "c": torch.zeros(2).bfloat16(),
    }
    torch.save(content, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert {key: tensor.dtype.name for key, tensor in source.items()} == {
        "a": "float32",
        "b": "uint16",
        "c": "bfloat16",
    }
    np.testing.assert_array_equal(source["a"].numpy(), [0, 1, 2])


def test_a_pickle_that_torch_finds_elsewhere_is_looked_through_all_the_same(tmp_path):
    """Two tables of contents: `zipfile` takes the one before the end, torch the one pointed to."""
    good = archive(tmp_path / "good.pt", mapping(text("w"), VECTOR)).read_bytes()
    evil = archive(tmp_path / "evil.pt", HOSTILE[r"code \(builtins.bytearray\)"]).read_bytes()

    def without_end(data):
        count, size, at = struct.unpack("<8xHHII", data[-22:-2])[1:]
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
        return data[:-22], end

    first, first_end = without_end(evil)
    second, second_end = without_end(good)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(first), 1)
    both = first + first_end + second + second_end + locator + good[-22:]
    (tmp_path / "x.pt").write_bytes(both)
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert file.read("a/data.pkl") == mapping(text("w"), VECTOR)
    with pytest.raises(UserError, match=r"code \(builtins.bytearray\)"):
        open_source(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-2] + b"\x03\0abc", "does not end as a zip archive of torch"),
        (lambda data: data[:-10] + struct.pack("<I", 1 << 25) + data[-6:], "claims 33554432 bytes"),
        (
            lambda data: data.replace(b"PK\1\2\x14\x03\x14\0\0", b"PK\1\2\x14\x03\x14\0\1"),
            "compressed",
        ),
    ],
)
def test_an_archive_that_claims_too_much_is_refused(change, message, tmp_path):
    path = archive(tmp_path / "x.pt", mapping(text("w"), VECTOR))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_two_names_that_torch_takes_for_one_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", mapping(text("w"), VECTOR), ("DATA.PKL", b"\x80\x02N."))
    with pytest.raises(UserError, match=r"not one that torch\.save wrote"):
        open_source(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe or a device"):
        open_source(tmp_path / name)

"""Names that no file can have, and JSON that says something else than it should."""

import io
import json
import os
import pathlib
import sys

import pytest

from dicode_jax import config as config_lib
from dicode_jax.cli.arguments import make_parser
from dicode_jax.cli.main import COMMANDS
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.errors import UserError, print_any_name
from dicode_jax.storage import hub, weights
from dicode_jax.storage.files import (
    cache_folder,
    check_output,
    is_file_name,
    parse_json,
    read_object,
    read_small,
)
from dicode_jax.storage.folders import check_folder, new_folder
from dicode_jax.text.gpt import TextTokenizer
from dicode_jax.training.logs import read_metrics


def test_which_names_a_file_can_have():
    assert all(map(is_file_name, ["a", "", "é", "\udcff", "a\nb", "x" * 300]))
    assert not any(map(is_file_name, ["a\0", "\ud800"]))


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_outputs_of_impossible_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="no folder can be called"):
        check_folder(f"{tmp_path}/{name}")
    with (
        pytest.raises(UserError, match="no folder can be called"),
        new_folder(f"{tmp_path}/{name}"),
    ):
        pass
    with pytest.raises(UserError, match="no file can be called"):
        check_output(f"{tmp_path}/{name}.png", (".png",))
    assert os.listdir(tmp_path) == []


LONG = "x" * 300


@pytest.mark.parametrize(
    "find",
    [
        *(hub.find_model, hub.find_folder, EncodedCache, TextTokenizer.from_file),
        *(config_lib.load_config_file, weights.read_header, weights.read_arrays),
        lambda name: check_output(f"{name}/a.png", (".png",)),
        lambda name: config_lib.read_json(f"{name}/config.json"),
    ],
)
def test_a_name_that_is_too_long_is_not_there(find):
    with pytest.raises(UserError):
        find(LONG)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[" * 100_000, "9" * 5000, "[1]", "null", b"\xff", '{"a": 1} x', "\0"),
        *('{"a": ' * 200 + "1" + "}" * 200, '{"a": 123456789012345678901}'),
        *('{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"\x1b[2J'),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: read_object(path, "a list"), lambda: config_lib.read_json(path)):
        with pytest.raises(UserError, match=r"a.json is not ") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_json_of_programs_is_read_as_it_is():
    tree = {"a": [1, -2.5, True, None, "x", {"b": []}], "c": 2**63, "": "\x1b"}
    assert parse_json(json.dumps(tree), "it") == tree == parse_json(json.dumps(tree).encode(), "it")
    deep = json.loads("[" * 100 + "]" * 100)
    assert parse_json(json.dumps(deep), "it") == deep


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    for cache, home, wanted in [
        ("/c", None, "/c/dicode_jax"),
        (None, "/home/a", "/home/a/.cache/dicode_jax"),
        ("", "/home/a", "/home/a/.cache/dicode_jax"),
        ("relative", "/home/a", "/home/a/.cache/dicode_jax"),
        *((None, home, None) for home in (None, "", "relative", "~")),
    ]:
        for name, value in (("XDG_CACHE_HOME", cache), ("HOME", home)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert cache_folder() == (wanted and pathlib.Path(wanted)), (cache, home)


def test_only_files_of_a_sensible_size_are_read(tmp_path):
    small, pipe, device = (tmp_path / name for name in ("small", "pipe", "device"))
    small.write_bytes(b"x" * 10)
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    assert read_small(small) == read_small(small, 10) == b"x" * 10
    for path, limit, message in [
        (small, 9, "small is too large: more than 9 bytes"),
        (pipe, 9, "pipe is a pipe or a device, not a file"),
        (device, 9, "device is a pipe or a device, not a file"),
        (tmp_path, 9, "cannot be read: Is a directory"),
        (tmp_path / "a\0", 9, "cannot be read: embedded null byte"),
        (tmp_path / "none", 9, "none cannot be read: No such file"),
    ]:
        with pytest.raises(UserError, match=message):
            read_small(path, limit)
    small.write_bytes(b"{" + b" " * 100 + b"}")
    with pytest.raises(UserError, match="too large"):
        read_object(small, "it", limit=50)


def test_a_folder_in_the_place_of_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        config_lib.read_json(tmp_path)


def test_weights_of_a_type_that_is_not_known_are_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"ab"
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="w is of a type not known here, F8_E8M0"):
        weights.hash_module(tmp_path)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        weights.read_arrays(tmp_path / "model.safetensors", on_host=True)


def test_lines_of_a_log_that_are_no_records_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 2}', b"3", b"[" * 9999, b"\xff", b'{"loss": 1}', b'{"step": 1}', b'{"st']
    path.write_bytes(b"\n".join(lines))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_names_that_are_no_text_can_be_printed(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8"))
    print_any_name()
    print("é \udcff \ud800", end="", flush=True)
    assert raw.getvalue() == "é \\udcff \\ud800".encode()


def test_an_empty_word_too_many_on_a_command_line_is_refused():
    with pytest.raises(UserError, match="unrecognized arguments"):
        make_parser(COMMANDS).parse_args(["info", "x", ""])

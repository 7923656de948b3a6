"""Tables, shards and folders that are odd: nothing is lost without a word, and nothing crashes."""

import errno
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from media_files import write_tar

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, captions_from_value
from dicode_jax.data.sources.open import kind_of, open_source
from dicode_jax.errors import Faults, UserError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return tmp_path_factory.getbasetemp()


def opened(path, **options):
    return open_source(DataConfig(path=str(path), **options), split="all")


def captions(source):
    return {source.name(i): source.record(i).captions for i in range(len(source))}


def table(folder, text, name="t.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_a_quote_that_closes_many_rows_later_swallows_none(tmp_path):
    path = table(tmp_path, 'path,caption\na.mp4,"open\nb.mp4,two\nc.mp4,19"\nd.mp4,four\n')
    source = opened(path)
    assert captions(source) == {"b.mp4": ("two",), "c.mp4": ('19"',), "d.mp4": ("four",)}
    assert len(source.left_out) == 1
    assert "row 1: has quotes that do not close" in source.left_out[0]
    path.write_text('path,caption\na.mp4,"open\nb.mp4,a\rb\nc.mp4,19"\n')
    assert "row 1: has quotes that do not close" in opened(path).left_out[0]


def test_a_caption_of_several_lines_stays_one(tmp_path):
    path = table(tmp_path, 'path,caption\na.mp4,"one\ntwo, and more"\nb.mp4,three\n')
    source = opened(path)
    assert captions(source) == {"a.mp4": ("one\ntwo, and more",), "b.mp4": ("three",)}
    assert source.left_out == ()


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = table(tmp_path, "path,caption,caption\na.mp4,one,two\n")
    with pytest.raises(UserError, match="has several columns 'caption'; rename all but one"):
        opened(path)
    assert len(opened(path, caption_column="")) == 1


def test_a_name_with_half_a_character_is_a_missing_file(tmp_path):
    path = table(tmp_path, '{"video": "\\ud800.mp4", "caption": "a"}\n', "t.jsonl")
    source = opened(path)
    assert source.name(0) == "\ud800.mp4"
    with pytest.raises(BrokenRecord, match="no name that a file can have"):
        clips.probe(source.record(0))


def test_a_null_character_in_a_name_is_a_broken_record(tmp_path):
    source = opened(table(tmp_path, "path,caption\na\0.mp4,one\n"))
    with pytest.raises(BrokenRecord, match="no name that a file can have"):
        clips.probe(source.record(0))


@pytest.mark.parametrize("field", ["path", "root"])
@pytest.mark.parametrize("name", ["a\0.csv", "\ud800.csv"])
def test_a_path_that_no_file_can_have_is_refused(tmp_path, field, name):
    options = {"path": table(tmp_path, "path,caption\na.mp4,one\n"), "kind": "table"}
    with pytest.raises(UserError, match="no file can be called"):
        opened(**options | {field: name})


def test_captions_that_nest_deeply_are_a_broken_record(tmp_path):
    deep = "[" * 400 + '"x"' + "]" * 400
    source = opened(table(tmp_path, f'{{"video": "a.mp4", "caption": {deep}}}\n', "t.jsonl"))

    def deeper(depth):
        return source.record(0) if depth == 0 else deeper(depth - 1)

    with pytest.raises(BrokenRecord):
        deeper(450)


def test_a_table_that_has_changed_gives_broken_records(tmp_path):
    path = table(tmp_path, '{"video": "a.mp4", "caption": "c"}\n', "t.jsonl")
    source = opened(path)
    for text in ("", "[1]\n", "{\n", "\xff"):
        path.write_text(text)
        with pytest.raises(BrokenRecord, match="cannot be read again"):
            source.record(0)
    path.unlink()
    with pytest.raises(BrokenRecord, match="cannot be read again"):
        source.record(0)


def test_a_caption_that_only_looks_like_a_list_is_text():
    assert captions_from_value("[{[]: 1}]") == ("[{[]: 1}]",)


def test_what_is_left_out_is_told_in_one_line_each(tmp_path):
    source = opened(table(tmp_path, 'path,caption\na.mp4,c\n"b\nc",d\n'))
    assert len(source.left_out) == len("".join(source.left_out).splitlines()) == 1


def test_errors_keep_to_one_line_and_faults_to_theirs():
    assert str(UserError("no file a\nb\r\n")) == "no file a b"
    faults = Faults()
    for line in ("one\ntwo", "three"):
        with faults.gather():
            raise ValueError(line)
    with pytest.raises(UserError, match=r"^2 things to mend:\n  1. one two\n  2. three$"):
        faults.tell()


# Shards


@pytest.mark.parametrize("damage", [b"", b"x", b"PK\3\4" + b"x" * 300, "cut", "flip"])
def test_a_damaged_cache_of_members_is_made_anew(tmp_path, cache_folder, damage):
    write_tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("a.txt", b"one")])
    opened(tmp_path / "s.tar")
    (stored,) = [p for p in cache_folder.rglob("*.npz") if p.parent.name == "tar"][-1:]
    data = stored.read_bytes()
    if isinstance(damage, str):
        half = len(data) // 2
        damage = data[:half] + (
            b"" if damage == "cut" else bytes([data[half] ^ 255]) + data[half + 1 :]
        )
    stored.write_bytes(damage)
    assert captions(opened(tmp_path / "s.tar")) == {"s.tar/a": ("one",)}


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_a_user_without_a_home_needs_no_cache_of_members(tmp_path, monkeypatch, home):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("a.txt", b"one")])
    made = []
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda path, **_: made.append(path))
    assert captions(opened(tmp_path / "s.tar")) == {"s.tar/a": ("one",)}
    assert not made


@pytest.mark.parametrize("how", ["read-only", "a file", "full"])
def test_a_cache_of_members_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, how):
    write_tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("a.txt", b"one")])
    cache = tmp_path / "cache"
    if how == "a file":
        cache.touch()
    else:
        number = {"read-only": errno.EROFS, "full": errno.ENOSPC}[how]

        def refuse(*args, **options):
            raise OSError(number, os.strerror(number))

        step = (pathlib.Path, "mkdir") if how == "read-only" else (np, "savez")
        monkeypatch.setattr(*step, refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert captions(opened(tmp_path / "s.tar")) == {"s.tar/a": ("one",)}
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("size", [b"\x80" + b"\x7f" * 11, b"\xff" * 12])
def test_a_member_of_an_impossible_size_ends_the_shard(tmp_path, size):
    write_tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("b.mp4", b"b"), ("c.mp4", b"c")])
    data = bytearray((tmp_path / "s.tar").read_bytes())
    data[1024 + 124 : 1024 + 136] = size
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    (tmp_path / "s.tar").write_bytes(data)
    source = opened(tmp_path / "s.tar")
    assert [source.name(i) for i in range(len(source))] == ["s.tar/a"]
    assert "s.tar is cut short" in source.left_out[0]


def test_a_shard_whose_name_is_a_pattern_is_found(tmp_path):
    for name in ("a[1].tar", "{b,c}.tar"):
        write_tar(tmp_path / name, [("a.mp4", b"a")])
        assert len(opened(tmp_path / name)) == 1


@pytest.mark.parametrize("pattern", ["{0..999999999999}.tar", "{0..9999}{0..9999}{0..9999}.tar"])
def test_a_pattern_of_too_many_shards_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match=r"stands for 1,000,000,000,000 shards"):
        opened(tmp_path / pattern)


def test_a_cut_member_with_a_line_break_in_its_name_is_one_line(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("a.mp4", "b\nc.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(b"x" * 600))
    (tmp_path / "s.tar").write_bytes(file.getvalue()[: 1536 + 512 + 100])
    assert opened(tmp_path / "s.tar").left_out == (f"{tmp_path}/s.tar is cut short inside b c.mp4",)


# Folders


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_caption_that_is_no_file_is_a_broken_record(tmp_path, kind):
    (tmp_path / "a.mp4").write_text("x")
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / "a.txt")
    source = opened(tmp_path)
    why = {"pipe": "is a pipe or a device", "folder": "cannot be read: Is a directory"}[kind]
    with pytest.raises(BrokenRecord, match=f"a.mp4: .*a.txt {why}"):
        source.record(0)


def refuse(monkeypatch, folder):
    """The disk refuses to list a folder, as it does where permissions are missing."""
    scandir = os.scandir

    def refusing(path="."):
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    for name in ("x/a.mp4", "y/b.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    refuse(monkeypatch, tmp_path / "x")
    source = opened(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["y/b.mp4"]
    assert source.left_out == (f"cannot list {tmp_path}/x: Permission denied",)


@pytest.mark.parametrize("kind", ["auto", "tar"])
def test_a_data_set_that_cannot_be_listed_is_refused(tmp_path, monkeypatch, kind):
    refuse(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Permission denied"):
        opened(tmp_path, kind=kind)


def test_a_path_that_is_too_long_is_not_there():
    with pytest.raises(UserError, match="does not exist"):
        kind_of(DataConfig(path="x" * 300))

"""Whatever a data set holds, each row and member is a record, or it is said why it is none."""

import csv
import io
import json
import os
import pathlib
import re
import tarfile
import tempfile

import numpy as np
import pytest
from fuzzing import NAMES, ODD_NAMES, dumped, ends_well, tree, weird
from hypothesis import event, given
from hypothesis import strategies as st

from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import MEDIA_SUFFIXES, suffix_of
from dicode_jax.data.sources.open import open_source

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ff"
    "ff3f0005fe02fedccc59e70000000049454e44ae426082"
)


@pytest.fixture(autouse=True, scope="module")
def _cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def opened(folder, path, **options):
    """The records of a data set (or None) and what is left out; nothing on the disk changes."""
    before = tree(folder)
    cfg = DataConfig(path=str(path), validation=0.3, **options)
    sources = {side: ends_well(open_source, cfg, split=side) for side in ("validation", "all")}
    source, records = sources["all"], None
    if source is not None:
        assert len(sources["validation"]) <= len(source)
        assert all(len(line.splitlines()) == 1 for line in source.left_out), source.left_out
        records = {}
        for i in range(len(source)):
            name, canonical = source.name(i), source.canonical_name(i)
            assert canonical not in records
            records[canonical] = name, ends_well(source.record, i)
            if records[canonical][1] is not None:
                read = clips.read_frame if records[canonical][1].is_image else clips.probe
                args = (cfg, 8, np.random.default_rng(0)) if read is clips.read_frame else ()
                ends_well(read, records[canonical][1], *args)
    event("opened" if records is not None else "refused")
    assert tree(folder) == before
    return records, () if source is None else source.left_out


def counted(left_out):
    """How many rows or members the lines speak of."""
    numbers = [re.search(r": (\d+) |^(\d+) ", line) for line in left_out]
    return sum(int(match.group(1) or match.group(2)) if match else 1 for match in numbers)


def rows_left_out(left_out):
    more = [int(m.group(1)) for line in left_out if (m := re.search(r": (\d+) more rows", line))]
    return sum(", row " in line for line in left_out) + sum(more)


def said(records):
    return {c for _, record in records.values() if record is not None for c in record.captions}


def broken(records):
    return sum(record is None for _, record in records.values())


# Tables

CELLS = [
    "",
    " ",
    "a dog",
    'say "hi"',
    "a, b",
    "tab\there",
    "two\nlines",
    "\r",
    "é",
    "\x00",
    "x" * 200,
]


@st.composite
def tables(draw):
    """Bytes of a table whose rows are well-formed, and how many rows it has."""
    suffix = draw(st.sampled_from([".csv", ".tsv", ".jsonl"]))
    video = draw(st.sampled_from(["video", "path", "file_name", "videoid", "image", "other"]))
    names = draw(st.lists(st.sampled_from(ODD_NAMES), min_size=1, max_size=9))
    if draw(st.integers(0, 9)) == 0:
        names.append(draw(st.sampled_from(["http://a/b.mp4", "https://a/b.mp4"])))
    rows, extra = (
        [],
        draw(st.lists(st.sampled_from(["x", "x", "page_dir", "", "caption "]), max_size=3)),
    )
    if suffix == ".jsonl":
        for i, name in enumerate(names):
            row = {video: name, "caption": f"c{i}"}
            if draw(st.integers(0, 3)) == 0:
                row[draw(st.sampled_from([video, "x"]))] = draw(weird)
            rows.append(dumped(row).encode())
        data = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(rows)
    else:
        text = io.StringIO(newline="")
        ending = draw(st.sampled_from(["\n", "\r\n"]))
        options = {"delimiter": "\t" if suffix == ".tsv" else ",", "lineterminator": ending}
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        writer = csv.writer(text, quoting=quoting, **options)
        writer.writerow([video, "caption", *extra])
        for i, name in enumerate(names):
            row = [name, f"c{i}", *(draw(st.sampled_from(CELLS)) for _ in extra)]
            cut = draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
            writer.writerow(row[:-1] if cut < 0 else row + ["more"] * cut)
        data = text.getvalue().encode("utf-8", "surrogatepass")
    data = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + data
    return suffix, data, len(names)


@given(table=tables(), root=st.sampled_from([None, None, "sub", "..", "/", "\0", "~"]))
def test_every_row_is_listed_or_told(table, root):
    suffix, data, count = table
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = folder / f"t{suffix}"
        path.write_bytes(data)
        (folder / "a.png").write_bytes(PNG)
        (folder / "b.mp4").write_bytes(PNG)
        (folder / "loop.mp4").symlink_to("loop.mp4")
        records, left_out = opened(folder, path, root=root)
        if records is not None and not broken(records):
            found = {caption for caption in said(records) if re.fullmatch(r"c\d+", caption)}
            assert len(found) + rows_left_out(left_out) >= count


PIECES = ["dog", '"', '""', ",", "\t", " ", "\\", "'", '19"', '"a', "é", "\r", "\x00", "x" * 30]


@given(
    cells=st.lists(
        st.lists(st.sampled_from(PIECES), max_size=4).map("".join), min_size=1, max_size=9
    ),
    suffix=st.sampled_from([".csv", ".tsv"]),
    ending=st.sampled_from(["\n", "\r\n"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=1),
)
def test_no_quote_swallows_a_row(cells, suffix, ending, damage):
    delimiter = "\t" if suffix == ".tsv" else ","
    lines = [f"path{delimiter}caption"] + [f"v{i}.mp4{delimiter}{c}" for i, c in enumerate(cells)]
    data = bytearray(ending.join([*lines, ""]).encode())
    for place, byte in damage:
        data[min(int(place * len(data)), len(data) - 1)] = byte
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / f"t{suffix}"
        path.write_bytes(bytes(data))
        records, left_out = opened(name, path)
        if records is not None and not damage:
            names = {row_name for row_name, _ in records.values()}
            missing = [i for i in range(len(cells)) if f"v{i}.mp4" not in names]
            assert len(missing) <= rows_left_out(left_out), (bytes(data), left_out)


@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.fixed_dictionaries({"video": weird, "caption": weird}).map(
                lambda x: dumped(x).encode()
            ),
            st.sampled_from([b"", b"null", b"[]", b'{"video": "a.mp4"', b'{"path": "b.mp4"}']),
        ),
        max_size=6,
    )
)
def test_lines_of_any_bytes_end_well(lines):
    for suffix in (".jsonl", ".csv"):
        with tempfile.TemporaryDirectory() as name:
            path = pathlib.Path(name) / f"t{suffix}"
            path.write_bytes(b"\n".join(lines))
            opened(name, path)


# Shards

MEMBERS = [
    *("a", "b", "a.depth", "x/a", "./a", "/a", "../a", "x//a", ".a", "a b", "a\nb", "\u00e9"),
    *("n" * 120, "d/" * 60 + "a", "a.", "", "\udcff", "e\u0301", "a\0b"),
]
SUFFIXES = [".mp4", ".png", ".txt", ".json", ".cls", "", ".MP4", ".caption"]


@st.composite
def shards(draw):
    """Bytes of a tar file, and its regular members: name to content."""
    file, held = io.BytesIO(), []
    kind = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for i in range(draw(st.integers(0, 10))):
            name = draw(st.sampled_from(MEMBERS)) + draw(st.sampled_from(SUFFIXES))
            info = tarfile.TarInfo(name)
            info.type = draw(st.sampled_from([*[tarfile.REGTYPE] * 8, *b"1 2 5 3 6".split()]))
            info.linkname = draw(st.sampled_from(["a.mp4", "../x", ""]))
            info.mtime = draw(st.sampled_from([0, 1.5, -1, 2**40]))
            data = f"c{i}".encode()
            if suffix_of(name) == ".json":
                data = draw(st.sampled_from([b'"%s"' % data, b'{"caption": "%s"}' % data]))
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            try:
                tar.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):  # a name that this form cannot hold
                continue
            if info.type == tarfile.REGTYPE:
                held.append((info.name, data))
    return bytearray(file.getvalue()), held


def key_of(name):
    folder, base = os.path.split(os.path.normpath(name).lstrip("/"))
    return os.path.join(folder, base.split(".")[0])


@given(shard=shards(), images=st.booleans())
def test_every_member_is_used_or_told(shard, images):
    data, held = shard
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "s.tar"
        path.write_bytes(data)
        records, left_out = opened(name, path)
        if records is None or broken(records):
            return
        used = said(records) | {
            bytes(data[r.media.offset :][: r.media.size]).decode() for _, r in records.values()
        }
        unused = [
            (name, text)
            for name, text in held
            if not os.path.basename(name.rstrip("/")).startswith(".")
            and not name.endswith("/")
            and json.dumps(text.decode())[1:-1].strip('\\"') not in used
            and re.search(rb"c\d+", text).group().decode() not in used
        ]
        media = {key_of(name) for name, _ in held if suffix_of(name) in MEDIA_SUFFIXES}
        alone = {key_of(name) for name, _ in unused} - media
        rest = [name for name, _ in unused if key_of(name) not in alone]
        assert len(rest) + len(alone) <= counted(left_out), (held, left_out, unused)


@given(
    shard=shards(),
    damage=st.lists(
        st.tuples(
            st.sampled_from(["byte", "byte", "cut", "field"]), st.floats(0, 1), st.integers(0, 255)
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_shards_end_well(shard, damage):
    data, _ = shard
    for kind, place, byte in damage:
        at = min(int(place * len(data)), len(data) - 1)
        if kind == "cut":
            del data[at + 1 :]
        elif kind == "byte":
            data[at] = byte
        else:  # a header that says something else, with a sum that fits
            start = at // 512 * 512
            block = data[start : start + 512]
            if len(block) == 512:
                field = [(100, 108), (124, 136), (136, 148), (156, 157), (257, 265), (345, 500)][
                    byte % 6
                ]
                for i in range(*field):
                    block[i] = [0x80, 0xFF, 0x30, 0x37, 0x78, 0, 0x4C, 0x31][(byte + i * byte) % 8]
                block[148:156] = b" " * 8
                block[148:156] = b"%06o\0 " % sum(block)
                data[start : start + 512] = block
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "s.tar"
        path.write_bytes(data)
        opened(name, path)
        opened(name, path)  # now from the cache of names


# Folders and paths


@st.composite
def folders(draw):
    out = {}
    for _ in range(draw(st.integers(0, 8))):
        stem = draw(st.sampled_from(NAMES))
        name = stem + draw(st.sampled_from(["", "", ".txt", ".json", ".png", ".mp4", ".bin"]))
        out[name] = draw(
            st.sampled_from(
                [PNG, b"", b"x", b"\xff", "link", "loop", "folder", "fifo", "up", "gone"]
            )
        )
    return out


def make(folder, entries):
    for name, what in entries.items():
        path = folder / name.replace("/", "/").lstrip("/").replace("..", "up")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if what == "link":
                path.symlink_to("a.mp4")
            elif what == "loop":
                path.symlink_to(path.name)
            elif what == "gone":
                path.symlink_to("gone.png")
            elif what == "up":
                path.symlink_to("..")
            elif what == "folder":
                path.mkdir()
            elif what == "fifo":
                os.mkfifo(path)
            else:
                path.write_bytes(what)
        except (OSError, ValueError):
            continue


@given(entries=folders(), top=st.sampled_from(NAMES), kind=st.sampled_from(["auto", "folder"]))
def test_folders_of_any_names_end_well(entries, top, kind):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "data"
        inner = folder / top.lstrip("/").replace("..", "up").replace("/", "_")
        try:
            inner.mkdir(parents=True)
        except OSError:
            inner = folder
        make(inner, entries)
        opened(name, inner, kind=kind)
        for entry in sorted(os.listdir(inner)) if inner.is_dir() else ():
            opened(name, inner / entry)


@given(
    path=st.one_of(
        st.sampled_from(ODD_NAMES),
        st.text(max_size=20),
        st.tuples(
            st.sampled_from(ODD_NAMES), st.sampled_from([".tar", ".csv", ".array_record", ".jsonl"])
        ).map("".join),
        st.sampled_from(
            [
                "{0..99999999999}.tar",
                "{%s..1}.tar" % ("9" * 5000),
                "{1..2}{1..2}.tar",
                "{²..3}.tar",
                "{3..1}.tar",
            ]
        ),
    ),
    kind=st.sampled_from(["auto", "folder", "table", "tar", "array_record", "cache"]),
)
def test_any_path_ends_well(path, kind):
    with tempfile.TemporaryDirectory() as name:
        opened(
            name,
            path
            if path in ("/", "..", ".") and kind == "x"
            else os.path.join(name, "nix", path.lstrip("/").replace("..", "_")),
            kind=kind,
        )

"""Headers of shards that lie: the shard or the member is left out by name, and the rest is read."""

import io
import tarfile

import pytest
from media_files import write_tar

from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord
from dicode_jax.data.sources import tar as sources_tar
from dicode_jax.data.sources.open import open_source
from dicode_jax.errors import UserError

END = bytes(1024)


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def padded(data):
    return data + bytes(-len(data) % 512)


def header(name, size, kind=b"0", rest=b""):
    """A header with a size of any form, as bytes or as a number; `rest` begins at byte 386."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[156:157], block[257:265] = kind, b"ustar  \0" if rest else b"ustar\00000"
    block[386 : 386 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data, size=None, kind=b"0"):
    return header(name, len(data) if size is None else size, kind) + padded(data)


def base256(number):
    return (b"\x80" if number >= 0 else b"\xff") + (number % 256**11).to_bytes(11, "big")


def record(key, value):
    body = b" %s=%s\n" % (key, value)
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d%s" % (length, body)


def pax(*pairs, data=None, kind=b"x"):
    return member(
        b"pax", b"".join(record(*pair) for pair in pairs) if data is None else data, kind=kind
    )


def opened(path):
    return open_source(DataConfig(path=str(path)), split="all")


def held(source):
    """What the media of a source hold, by name."""
    found = {}
    for i in range(len(source)):
        media = source.record(i).media
        with open(media.path, "rb") as file:
            file.seek(media.offset)
            found[source.name(i)] = file.read(media.size)
    return found


A, C = member(b"a.mp4", b"aaa"), member(b"c.mp4", b"ccc")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        *((header(b"b.mp4", base256(-n)), "after a.mp4: a negative size") for n in (1, 512, 1024)),
        *((header(b"b.mp4", base256(n)), "inside b.mp4") for n in (2**63 - 1, 2**63, 2**70)),
        (header(b"b.mp4", 4096), "inside b.mp4"),
        (pax((b"size", b"-1024")), "an impossible size"),
        (pax((b"size", b"9" * 30)), "an impossible size"),
        (pax((b"size", b"1e3")), "an impossible size"),
        (pax((b"size", b"9" * 18)) + C, "inside c.mp4"),
        (header(b"n", base256(2**32), b"L") + C, "a name of 4294967296 bytes"),
        (header(b"n", base256(-512), b"x") + C, "a name of -512 bytes"),
        (header(b"n", base256(2**70), b"K"), "its end mark is missing"),
        (header(b"n", base256(-512), b"g"), "a negative size"),
        (header(b"n", 600, b"L") + b"cut", "its end mark is missing"),
        *(
            (pax(data=data) + C, "a PAX header that is none")
            for data in (b"0 path=x\n", b"4 =\n\n", b"99 path=x\n", b"11 path=x\n", b"path=x\n",
                         b"2 " * 9000 + b"=x\n", b"9" * 90_000, b"3 " + b"a" * 9000)
        ),
        (b"x" * 512, "a header that is none"),
    ],
)  # fmt: skip
def test_a_header_that_lies_ends_its_shard(tmp_path, lie, said):
    (tmp_path / "s.tar").write_bytes(A + lie + (b"" if "mark" in said else END))
    write_tar(tmp_path / "t.tar", [("d.mp4", b"ddd")])
    source = opened(tmp_path)
    assert held(source) == {"s.tar/a": b"aaa", "t.tar/d": b"ddd"}
    (line,) = source.left_out
    assert line.startswith(f"{tmp_path}/s.tar is cut short ")
    assert said in line


@pytest.mark.parametrize("data", [b"", b"hello" * 200, header(b"a.mp4", base256(-512)) + END])
def test_a_shard_that_is_none_does_not_stop_the_others(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"no videos .*s.tar is not a plain tar file"):
        opened(tmp_path / "s.tar")
    write_tar(tmp_path / "t.tar", [("d.mp4", b"ddd")])
    source = opened(tmp_path)
    assert held(source) == {"t.tar/d": b"ddd"}
    assert source.left_out[0].startswith(f"{tmp_path}/s.tar is not a plain tar file")


HOLES = b"".join(b"%011o\0%011o\0" % pair for pair in [(0, 3), (9000, 2)])
DATA = b"xxxyy"


def old_sparse(more):
    about = HOLES.ljust(96, b"\0") + (b"\1" if more else b"\0") + b"%011o\0" % 9002
    return header(b"b.mp4", len(DATA), b"S", about) + more + padded(DATA)


def new_sparse(*pairs, data=DATA):
    pairs = [(b"GNU.sparse." + key, value) for key, value in pairs]
    own = b"b.mp4" if (b"GNU.sparse.name", b"b.mp4") not in pairs else b"GNUSparseFile.7/x"
    return pax(*pairs) + member(own, data)


@pytest.mark.parametrize(
    "sparse",
    [
        old_sparse(b""),
        old_sparse(HOLES.ljust(504, b"\0") + b"\1" + bytes(7) + HOLES.ljust(512, b"\0")),
        new_sparse((b"size", b"9002"), (b"numblocks", b"2"), (b"offset", b"0")),
        new_sparse((b"map", b"0,3,9000,2"), (b"size", b"9002"), (b"name", b"b.mp4")),
        new_sparse(
            *((b"major", b"1"), (b"minor", b"0"), (b"name", b"b.mp4"), (b"realsize", b"zz")),
            data=b"2\n0\n3\n".ljust(517),
        ),
        new_sparse((b"map", b"abc")),
    ],
)
def test_members_with_holes_are_left_out_by_name_and_the_next_is_read(tmp_path, sparse):
    (tmp_path / "s.tar").write_bytes(A + sparse + C + END)
    source = opened(tmp_path / "s.tar")
    assert held(source) == {"s.tar/a": b"aaa", "s.tar/c": b"ccc"}
    assert source.left_out == (
        f"{tmp_path}/s.tar: 1 members are stored with holes, which are not read; pack them "
        "without -S: b.mp4",
    )


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_chain_of_names_is_no_deep_water(tmp_path, kind):
    one = (
        pax((b"path", b"b.mp4"), kind=kind)
        if kind in b"xg"
        else member(b"n", b"b.mp4\0", kind=kind)
    )
    (tmp_path / "s.tar").write_bytes(one * 3000 + C + A + END)
    first = "b" if kind in b"Lx" else "c"
    assert held(opened(tmp_path / "s.tar")) == {f"s.tar/{first}": b"ccc", "s.tar/a": b"aaa"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_honest_shards_are_listed_as_tarfile_does(tmp_path, form):
    file, long = io.BytesIO(), "f/" * 60 + "n" * 60
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i, name in enumerate(["a.mp4", "d/", f"{long}.mp4", "é.mp4", f"{long}l.mp4", "z.mp4"]):
            info = tarfile.TarInfo(name)
            info.type = {"d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE}.get(
                name.rstrip(".mp4/")[-1:], b"0"
            )
            if info.type == tarfile.SYMTYPE and form != tarfile.USTAR_FORMAT:
                info.linkname = long * 9
            info.size = 700 * i if info.isreg() else 0
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    (tmp_path / "s.tar").write_bytes(file.getvalue())
    with tarfile.open(tmp_path / "s.tar") as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert len(wanted) == 4
    lines, found = sources_tar._scan(str(tmp_path / "s.tar"), len(file.getvalue()))
    assert found == wanted
    assert lines == (f"{tmp_path}/s.tar: 1 links, which are passed over",)


def test_devices_and_pipes_are_counted_and_folders_are_not(tmp_path):
    others = b"".join(header(b"x", 0, kind) for kind in (b"3", b"4", b"6", b"M", b"5"))
    (tmp_path / "s.tar").write_bytes(others + A + END)
    (line,) = opened(tmp_path / "s.tar").left_out
    assert line == f"{tmp_path}/s.tar: 4 devices, pipes and parts of files, which are passed over"


def test_names_are_shown_as_one_short_line_that_no_terminal_obeys(tmp_path):
    long = b"x" * 5000
    (tmp_path / "s.tar").write_bytes(
        pax((b"path", long + b".mp4"))
        + A
        + member(b"n", b"e\x1b[2J\n" + b"y" * 4000 + b".cls\0", kind=b"L")
        + A
        + b"".join(member(b"b.%d" % i, b"") for i in range(20))
        + pax((b"path", b"q\x1b[2J" + b"z" * 3000 + b".mp4"))
        + member(b"b.mp4", b"", size=4096)
    )
    write_tar(tmp_path / "t.tar", [("d.mp4", b"ddd")])
    source = opened(tmp_path)
    text = "\n".join(source.left_out)
    assert text.isprintable() or text.replace("\n", "").isprintable()
    assert all(len(line) < 600 for line in source.left_out)
    assert "1 members with a name of more than 4,096 letters, which are passed over" in text
    assert "21 files of kinds that are not read: " in text
    assert text.count("and 16 more") == 1
    assert r"is cut short inside q\x1b[2Jzz" in text


def test_captions_of_sensible_size_are_read(tmp_path):
    half = b"x" * 2**19
    for last, is_read in ((half, True), (half + b"x", False)):
        write_tar(tmp_path / "s.tar", [("a.mp4", b"aaa"), ("a.txt", half), ("./a.txt", last)])
        source = opened(tmp_path / "s.tar")
        if is_read:
            assert source.record(0).captions == (half.decode(),)
            continue
        with pytest.raises(BrokenRecord, match=r"s.tar/a: its captions have more than 1,048,576"):
            source.record(0)


class Place(int):
    compared = 0

    def __eq__(self, other):
        Place.compared += 1
        return int(self) == int(other)

    __hash__ = int.__hash__


def test_a_key_of_many_members_takes_no_squared_time():
    many = [("a.txt", Place(i), 1) for i in range(300)]
    used, unclear = sources_tar._choose("a", [("a.mp4", Place(900), 3), *many], images=True)
    assert (len(used), unclear) == (301, [])
    assert Place.compared < 10 * len(many)


def test_a_shard_that_is_cut_later_breaks_its_records(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.mp4", b"aaa"), ("a.txt", b"a dog")])
    source = opened(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:1538])
    with pytest.raises(BrokenRecord, match=r"s.tar/a: .*s.tar is cut short"):
        source.record(0)


def test_a_shard_whose_path_is_no_text_is_read(tmp_path):
    write_tar(tmp_path / "\udcff\n.tar", [("a.mp4", b"aaa")])
    with open(tmp_path / "\udcff\n.tar", "ab") as file:
        file.truncate(1024 + 100)
    for _ in range(2):  # read, and from the list that is kept
        source = opened(tmp_path)
        assert list(held(source).values()) == [b"aaa"]
        (line,) = source.left_out
        assert r"\udcff .tar is cut short" in line

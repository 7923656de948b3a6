"""Folders and tables of strangers: what one file or row does costs that one, and no fence is left.

Whoever makes a data set may put anything into it: links, pipes, names and rows that are made to
hold a reader up.
"""

import json
import os
import socket

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from media_files import greys, mp4_bytes, write_tar

from dicode_jax import cli
from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, captions_from_value
from dicode_jax.data.sources import array_record as sources_array_record
from dicode_jax.data.sources import table as sources_table
from dicode_jax.data.sources.identity import FileNames
from dicode_jax.data.sources.open import open_source, shard_paths
from dicode_jax.data.stream import open_stream
from dicode_jax.errors import UserError

CLIP = mp4_bytes(greys(4))
MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def opened(path, **options):
    return open_source(DataConfig(path=str(path), **options), split="all")


def captions(source):
    return {source.name(i): source.record(i).captions for i in range(len(source))}


def touch(folder, *names, data=b"x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# Folders


def test_folders_may_nest_deeper_than_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    touch_here = os.open("a.mp4", os.O_CREAT | os.O_WRONLY)
    os.close(touch_here)
    os.chdir(tmp_path)
    try:
        source = opened(tmp_path)
        assert [source.name(i) for i in range(len(source))] == ["d/" * 1100 + "a.mp4"]
    finally:  # pytest's own cleaning would call itself as deeply
        os.remove("d/" * 1100 + "a.mp4")
        for depth in range(1100, 0, -1):
            os.rmdir("d/" * depth)


def test_a_thousand_links_in_a_row_are_a_missing_file(tmp_path):
    touch(tmp_path, "a.mp4")
    for i in range(1100):
        (tmp_path / f"link{i}.mp4").symlink_to(f"link{i + 1}.mp4")
        (tmp_path / f"folder{i}").symlink_to(f"folder{i + 1}")
    assert FileNames(str(tmp_path)).resolve("link0.mp4") == ("link0.mp4", None)
    assert "a.mp4" in [opened(tmp_path).name(i) for i in range(2)]
    (tmp_path / "t.csv").write_text("path,caption\nlink0.mp4,x\nfolder0/b.mp4,y\na.mp4,z\n")
    assert captions(opened(tmp_path / "t.csv"))["a.mp4"] == ("z",)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # such names are short
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    table = tmp_path / "t.csv"
    table.write_text("path,caption\na.mp4,x\n")
    for source in [opened(table), *([] if kind == "folder" else [opened(tmp_path)])]:
        with pytest.raises(BrokenRecord, match=r"^a.mp4: is no file$"):
            clips.probe(source.record(0))


def test_a_caption_from_a_device_or_nowhere_breaks_its_record(tmp_path):
    touch(tmp_path, "a.mp4")
    caption = tmp_path / "a.txt"
    for target, why in [("/dev/zero", "is a pipe or a device"), ("gone", "No such file")]:
        caption.symlink_to(target)
        with pytest.raises(BrokenRecord, match=f"^a.mp4: .*a.txt .*{why}"):
            opened(tmp_path).record(0)
        caption.unlink()


def test_captions_of_a_megabyte_are_read_and_no_longer_ones(tmp_path):
    touch(tmp_path, "a.mp4")
    touch(tmp_path, "a.txt", data=b"x" * MEGABYTE)
    assert opened(tmp_path).record(0).captions == ("x" * MEGABYTE,)
    touch(tmp_path, "a.mp4.txt", data=b"more")
    with pytest.raises(BrokenRecord, match=r"a.mp4: its captions have more than 1,048,576"):
        opened(tmp_path).record(0)
    touch(tmp_path, "a.txt", data=b"x" * (MEGABYTE + 1))
    with pytest.raises(BrokenRecord, match=r"a.mp4: .*a.txt is too large"):
        opened(tmp_path).record(0)


def test_names_are_cut_and_printable_in_what_is_left_out(tmp_path):
    touch(tmp_path, "a.mp4", "e\x1b[2J\n" + "x" * 200 + ".txt", *(f"b.{i}\x1b" for i in range(9)))
    lines = opened(tmp_path).left_out
    assert all(line.isprintable() and len(line) < 230 for line in lines)
    assert r"e\x1b[2J " in lines[0]
    assert lines[1].endswith("and 4 more")


def test_shards_in_loops_and_pipes_are_named(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.mp4", b"x")])
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    (tmp_path / "gone.tar").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    source = opened(tmp_path)
    assert len(source) == 1
    assert source.left_out == ("3 files beside the shards: gone.tar, loop.tar, pipe.tar",)


def test_a_pattern_of_all_folders_ends_where_links_lead_in_circles(tmp_path, monkeypatch):
    for name in ("s1", "s2"):
        (tmp_path / name).symlink_to(".")
    with pytest.raises(UserError, match="there are no shards"):
        opened(tmp_path / "**/*.tar")
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("s.tar", "a/s.tar", "a/b/s.tar", "a/b/t.tar"):
        write_tar(tmp_path / name, [("a.mp4", name.encode())])
    monkeypatch.chdir(tmp_path)
    for top in (f"{tmp_path}/", "", "./"):
        wanted = [f"{top}{name}" for name in ("a/b/s.tar", "a/s.tar", "s.tar")]
        assert shard_paths(f"{top}**/s.tar", "tar") == wanted
        assert shard_paths(f"{top}**/b/*.tar", "tar") == [f"{top}a/b/{x}.tar" for x in "st"]


def test_a_log_of_many_things_ends(tmp_path, caplog):
    for i in range(120):
        write_tar(tmp_path / f"{i:03d}.tar", [("a.mp4", b"x"), ("b.cls", b""), ("a.cls", b"")])
    source = open_source(DataConfig(path=str(tmp_path), validation=0.0))
    assert len(source.left_out) == 240
    assert len(caplog.messages) == 101
    assert caplog.messages[-1] == "left out: 140 more things, which `dicode data inspect` names"


# Tables

GOOD = b'{"video": "a.mp4", "caption": "a dog"}'


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"[" * 100_000, "is not JSON: "),
        (b'{"video": ' + b'{"a":' * 100_000, "is not JSON: "),
        (b'{"video": "b.mp4", "n": ' + b"9" * 5000 + b"}", "is not JSON: "),
        (b'{"video": "b\xff.mp4"}', "is not JSON: "),
        (b'{"video": "b.mp4", "n": "' + b"x" * MEGABYTE + b'"}', "has more than 1,048,576 bytes"),
        (b'{"video": "' + b"x" * 5000 + b'.mp4"}', "its name has 5,004 letters"),
        (b'{"video": "https://x/b.mp4"}', "names a web address; download"),
        (b'{"video": "' + b"\\u001b" * 5000 + b'"}', "names no video or picture"),
        (b'{"video": {"a": 1}}', "names no video or picture"),
        (b"\0\0\0\0", "is not JSON: "),
    ],
)  # fmt: skip
def test_a_row_of_json_that_is_none_costs_itself(tmp_path, row, why):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join([row, GOOD, row, GOOD.replace(b"a.mp4", b"c.mp4")]))
    source = opened(path)
    assert captions(source) == {"a.mp4": ("a dog",), "c.mp4": ("a dog",)}
    assert [line[: len(f"{path}, row 1: {why}")] for line in source.left_out] == [
        f"{path}, row {n}: {why}" for n in (1, 3)
    ]
    assert all(line.isprintable() and len(line) < 400 for line in source.left_out)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"b.mp4,\xff", "is not UTF-8"),
        (b"\xed\xa0\x80.mp4,half a surrogate", "is not UTF-8"),
        (b"b.mp4," + b"x" * MEGABYTE, "has more than 1,048,576 bytes, or quotes"),
        (
            b'b.mp4,"' + (b"x" * 999 + b"\n") * 1050 + b'"',
            "has more than 1,048,576 bytes, or quotes",
        ),
        (b"x" * 5000 + b".mp4,x", "its name has 5,004 letters"),
    ],
)
def test_a_row_of_cells_that_is_none_costs_itself(tmp_path, row, why):
    path = tmp_path / "t.csv"
    path.write_bytes(b"path,caption\na.mp4,one\n" + row + b"\nc.mp4,two\n")
    source = opened(path)
    assert captions(source) == {"a.mp4": ("one",), "c.mp4": ("two",)}
    assert source.left_out[0].startswith(f"{path}, row 2: {why}")


def test_quotes_that_are_made_to_take_squared_time_end_the_table(tmp_path):
    (tmp_path / "t.csv").write_text("path,caption\n" + 'a",".mp4\n' * 2000)
    with pytest.raises(UserError, match=r"read as a table: too many of its quotes do not close"):
        opened(tmp_path / "t.csv")


def test_columns_of_json_lines_are_not_counted_without_end(tmp_path):
    path = tmp_path / "t.jsonl"
    many = [{f"{i}-{j}": 0 for j in range(900)} for i in range(3)]
    rows = [*many, {"path": "a.mp4", "caption": "a dog", "own": "b.mp4"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert captions(opened(path)) == {"a.mp4": ("a dog",)}
    assert list(captions(opened(path, video_column="own"))) == ["b.mp4"]
    _, columns = next(sources_table._rows(str(path), {"path"}))
    assert len(columns) == 1001
    with pytest.raises(UserError, match="has no column 'gone'; it has 0-0, 0-1, ") as caught:
        opened(path, video_column="gone")
    assert len(str(caught.value)) < 1000


def test_rows_without_end_of_one_file_break_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_table, "_MAX_ROWS", 3)
    path = tmp_path / "t.csv"
    path.write_text("path,caption\n" + "a.mp4,x\n" * 3 + "b.mp4,x\n" * 4)
    source = opened(path)
    assert source.record(0).captions == ("x",)
    with pytest.raises(BrokenRecord, match=r"^b.mp4: 4 rows name it; at most 3 are read"):
        source.record(1)
    path.write_text("path,caption\n" + f"a.mp4,{'x' * 600_000}\n" * 2)
    with pytest.raises(BrokenRecord, match=r"^a.mp4: its captions have more than 1,048,576"):
        opened(path).record(0)


def test_a_list_in_python_of_any_length_is_not_evaluated():
    listed = str(["a dog"] * 5000)
    assert captions_from_value(listed) == ("a dog",) * 5000
    for long in (str(["a dog"] * 9000), "[" + "1+" * 200_000 + "1]"):
        with pytest.raises(ValueError, match=r"a list of \d+,\d+ letters that is not JSON"):
            captions_from_value(long)


def test_a_header_of_a_packed_record_is_short(tmp_path):
    pack = sources_array_record.pack
    long = [pack("n" * 9000, [], ".mp4", b"x"), pack("a", ["x" * MEGABYTE], ".mp4", b"x")]
    long += [b"{" * 3_000_000, pack("a", [], "." + "\x1b" * 5000, b"x")]
    sources_array_record.write_shard(tmp_path / "x.array_record", long)
    source = opened(tmp_path / "x.array_record")
    assert len(source.record(0).name) < 4200
    for i in range(1, 4):
        with pytest.raises(BrokenRecord) as caught:
            source.record(i)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("options", ["group_size:1,uncompressed", "group_size:3,zstd"])
def test_chunks_of_a_shard_are_weighed_wherever_they_lie(tmp_path, monkeypatch, options):
    path = str(tmp_path / "x.array_record")
    monkeypatch.setattr(sources_array_record, "_LIGHT", 0)
    monkeypatch.setattr(sources_array_record, "_MAX_RATIO", 0)
    rng = np.random.default_rng(0)
    writer = ArrayRecordWriter(path, options)
    for size in [*range(65_380, 65_580, 7), *rng.integers(1, 300_000, 20)]:
        writer.write(rng.bytes(size))
    writer.close()
    step = int(options[11])
    wanted = [range(i, min(i + step, 49)) for i in range(0, 49, step)]
    assert sources_array_record.heavy_records(path)[: len(wanted)] == wanted


def test_a_packed_record_that_unpacks_to_far_more_is_broken(tmp_path, monkeypatch):
    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1,zstd")
    for data in (b"x", bytes(100_000), b"y"):
        writer.write(sources_array_record.pack("a", [], ".mp4", data))
    writer.close()
    monkeypatch.setattr(sources_array_record, "_LIGHT", 1000)
    source = opened(tmp_path)
    assert (source.record(0).media.data, source.record(2).media.data) == (b"x", b"y")
    with pytest.raises(BrokenRecord, match=r"x.array_record:1: .*unpack to far more"):
        source.record(1)


def test_an_index_that_unpacks_to_far_more_is_not_unpacked(tmp_path, monkeypatch):
    path, rng = tmp_path / "x.array_record", np.random.default_rng(0)
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd")
    for _ in range(300):
        writer.write(sources_array_record.pack("a", [], ".mp4", rng.bytes(200)))
    writer.close()
    monkeypatch.setattr(sources_array_record, "_LIGHT", 0)
    assert len(opened(path)) == 300
    monkeypatch.setattr(sources_array_record, "_MAX_RATIO", 1.01)
    with pytest.raises(UserError, match=r"\(its index unpacks to far more bytes than it takes\)"):
        opened(path)
    data = bytearray(path.read_bytes())
    for place, byte in [(8, 1), (64, 2), (65, 200)]:
        path.write_bytes(data[:-65536] + bytes(place) + bytes([byte]) + data[-65535 + place :])
        with pytest.raises(UserError, match=r"\(its index is not where it should be\)"):
            opened(path)


@pytest.mark.parametrize("count", [2**40, 2**63, 20_000])
def test_a_shard_that_claims_records_without_end_is_left_out(tmp_path, monkeypatch, count):
    for name in ("a", "b"):
        record = sources_array_record.pack("a", [], ".mp4", b"x")
        sources_array_record.write_shard(tmp_path / f"{name}.array_record", [record])
    opens = sources_array_record._open

    class Liar:
        num_records = staticmethod(lambda: count)
        close = staticmethod(lambda: None)

    monkeypatch.setattr(sources_array_record, "_open", lambda p: Liar if "a.arr" in p else opens(p))
    source = opened(tmp_path)
    assert len(source) == 1
    assert source.left_out[0].endswith(f"ArrayRecord file (it claims {count:,} records)")


@pytest.mark.parametrize("how", ["gone", "changed", "cut"])
def test_a_table_that_changes_while_a_training_runs_breaks_records_alone(tmp_path, how):
    touch(tmp_path, *(f"{i}.mp4" for i in range(8)), data=CLIP)
    path = tmp_path / "t.jsonl"
    rows = [json.dumps({"video": f"{i}.mp4", "caption": "c"}) + "\n" for i in range(8)]
    path.write_text("".join(rows))
    cfg = DataConfig(path=str(path), validation=0.0, max_broken=1.0, num_frames=2)
    read = lambda record, rng: clips.read_frame(record, cfg, 8, rng)  # noqa: E731
    options = {"batch_size": 8, "seed": 0, "process_index": 0, "process_count": 1}
    stream = open_stream(open_source(cfg), read, cfg, **options)
    rows[3] = {"gone": "", "changed": "x" * (len(rows[3]) - 1) + "\n", "cut": rows[3][:9]}[how]
    path.write_text("".join(rows) if how == "changed" else "".join(rows[:4]))
    batch = next(stream)
    stream.close()
    broken = stream.state()["broken"]
    assert "3.mp4" not in batch["ids"]
    assert set(batch["ids"]) <= {f"{i}.mp4" for i in range(8)}
    assert any(name.startswith("t.jsonl:") for name in broken)


# The fence


@pytest.fixture
def data(tmp_path):
    """A folder `data` with links that lead out of it, into `outside`."""
    touch(tmp_path, "data/a.mp4", "data/in/b.mp4", "outside/s.mp4", "outside/000/7.mp4")
    touch(tmp_path, "outside/c.txt", data=b"a secret")
    data = tmp_path / "data"
    (data / "link.mp4").symlink_to("../outside/s.mp4")
    (data / "far").symlink_to(tmp_path / "outside")
    (data / "back.mp4").symlink_to("in/b.mp4")
    (data / "up").symlink_to("..")
    return data


def test_a_fenced_folder_reads_nothing_outside(data):
    source = opened(data)
    assert len(source) == 4  # without a root links are followed
    source = opened(data, root=str(data))
    assert [source.name(i) for i in range(len(source))] == ["a.mp4", "back.mp4"]
    assert source.left_out[0] == f"3 links lead outside of {data}: far, link.mp4, up"
    assert len(opened(data, root=str(data.parent))) == 4
    for path in (data.parent, data.parent / "outside/s.mp4"):
        with pytest.raises(UserError, match=r"lies outside of .*data, which is given as root"):
            opened(path, root=str(data))


def test_captions_and_files_of_a_fenced_folder_stay_inside(data):
    (data / "a.txt").symlink_to("../outside/c.txt")
    assert opened(data).record(0).captions == ("a secret",)
    source = opened(data, root=str(data))
    with pytest.raises(BrokenRecord, match=r"a.mp4: .*a.txt leads outside of .*data"):
        source.record(0)
    (data / "a.mp4").unlink()
    (data / "a.mp4").symlink_to("../outside/s.mp4")
    with pytest.raises(BrokenRecord, match=r"a.mp4: .*a.mp4 leads outside of .*data"):
        source.record(0)


def test_a_fenced_table_reads_nothing_outside(data):
    outside = data.parent / "outside"
    rows = [
        "../outside/s.mp4",
        str(outside / "s.mp4"),
        "link.mp4",
        "far/s.mp4",
        "in/../../data/a.mp4",
    ]
    rows += ["up/outside/s.mp4", "up/data/a.mp4", str(data / "in/b.mp4"), "gone.mp4", "a\0.mp4"]
    (data / "t.jsonl").write_text("\n".join(json.dumps({"video": x, "caption": "c"}) for x in rows))
    assert len(opened(data / "t.jsonl")) == 5  # without a root all are read
    source = opened(data / "t.jsonl", root=str(data))
    inside = ["in/../../data/a.mp4", str(data / "in/b.mp4"), "gone.mp4"]
    assert [source.name(i) for i in range(len(source))] == inside
    assert source.left_out[0] == (
        f"{data}/t.jsonl, row 1: leads outside of {data} ('../outside/s.mp4')"
    )
    for i in range(2):
        path = source.record(i).media.path
        assert os.path.realpath(path).startswith(f"{data}/")
    (data / "gone.mp4").symlink_to(outside / "s.mp4")
    with pytest.raises(BrokenRecord, match=r"^gone.mp4: leads outside of .*data"):
        source.record(2)


def test_a_fenced_table_of_webvid_takes_the_place_inside(data):
    touch(data, "7.mp4")
    (data / "t.csv").write_text("videoid,contentUrl,duration,page_dir,name\n7,u,1,far/000,c\n")
    assert opened(data / "t.csv").record(0).media.path == f"{data}/far/000/7.mp4"
    assert opened(data / "t.csv", root=str(data)).record(0).media.path == f"{data}/7.mp4"


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_fenced_shards_are_those_inside(data, kind):
    write = {
        "tar": lambda path: write_tar(path, [("a.mp4", CLIP)]),
        "array_record": lambda path: sources_array_record.write_shard(
            path, [sources_array_record.pack("a", [], ".mp4", CLIP)]
        ),
    }[kind]
    write(data.parent / f"outside/s.{kind}")
    write(data / f"a.{kind}")
    (data / f"b.{kind}").symlink_to(f"../outside/s.{kind}")
    assert len(opened(data / f"*.{kind}")) == 2
    source = opened(data / f"*.{kind}", root=str(data))
    assert [source.name(i).split(":")[0].split("/")[0] for i in range(len(source))] == [f"a.{kind}"]
    assert source.left_out[0] == f"1 of 2 shards lead outside of {data}"
    with pytest.raises(UserError, match=r"no videos .*1 of 1 shards lead outside"):
        opened(data / f"b.{kind}", root=str(data))


def test_inspect_takes_the_fence(data, capsys):
    assert cli.main(["data", "inspect", str(data), "--root", str(data)]) == 0
    out = capsys.readouterr().out
    assert f"3 links lead outside of {data}: far, link.mp4, up" in out
    assert "s.mp4" not in out

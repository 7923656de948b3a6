"""What a data set holds and is not read: named or counted, and nothing else is lost with it."""

import io
import json
import tarfile

import pytest
from media_files import greys, mp4_bytes, write_tar

from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord
from dicode_jax.data.sources.open import open_source

CLIP = mp4_bytes(greys(4))


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def captions(path):
    source = open_source(DataConfig(path=str(path)), split="all")
    records = map(source.record, range(len(source)))
    return {record.name: record.captions for record in records}


def touch(folder, *names, data=b"x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_captions_by_the_whole_name_or_called_caption_are_read(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.png")
    touch(tmp_path, "a.mp4.txt", "b.caption", data=b"a dog")
    touch(tmp_path, "c.png.json", data=b'{"caption": "a cat"}')
    wanted = {"a.mp4": ("a dog",), "b.mp4": ("a dog",), "c.png": ("a cat",)}
    assert captions(tmp_path) == wanted
    members = [(path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    write_tar(tmp_path / "s.tar", members)
    shard = captions(tmp_path / "s.tar")
    assert {name: shard[f"s.tar/{name[0]}"] for name in wanted} == wanted


def test_a_folder_names_what_belongs_to_nothing(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt", "b.txt", "in/c.caption", "d.mp4.json", "e.srt", "f.srt", "g")
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    assert source.left_out == (
        "3 captions without a video or picture of their name: b.txt, d.mp4.json, in/c.caption",
        "3 files of kinds that are not read: .srt (2), no suffix (1)",
    )


@pytest.mark.parametrize(
    ("text", "wanted", "left_out"),
    [
        (
            "a.mp4,a dog, running\nb.mp4,a cat\nc.mp4\n",
            {"b.mp4": ("a cat",)},
            ["row 1: has more cells (3)", "row 3: has fewer cells (1)"],
        ),
        (
            'a.mp4,"a dog\nb.mp4,a cat\nc.mp4,"a, bird"\nd.mp4,"two\nlines"\n',
            {"b.mp4": ("a cat",), "c.mp4": ("a, bird",), "d.mp4": ("two\nlines",)},
            ["row 1: has quotes"],
        ),
        (
            'a.mp4,"a dog\nb.mp4,"a cat\nc.mp4,"a ""big"" bird"\nd.mp4,"x" y\ne.mp4,"open\n',
            {"c.mp4": ('a "big" bird',)},
            ["row 1: has quotes", "row 2: has quotes", "row 4: has quotes", "row 5: has quotes"],
        ),
        (
            """a.mp4,"['a dog', 'a dog runs']"\nb.mp4,"[""a cat"", ""a cat, sits""]"\n""",
            {"a.mp4": ("a dog", "a dog runs"), "b.mp4": ("a cat", "a cat, sits")},
            [],
        ),
    ],
)
def test_rows_that_are_not_understood_are_named_and_the_others_kept(
    tmp_path, text, wanted, left_out
):
    (tmp_path / "t.csv").write_text("path,caption\n" + text)
    assert captions(tmp_path / "t.csv") == wanted
    source = open_source(DataConfig(path=str(tmp_path / "t.csv")), split="all")
    assert len(source.left_out) == len(left_out)
    for line, said in zip(source.left_out, left_out, strict=True):
        assert f"t.csv, {said}" in line


def test_a_list_without_commas_is_not_glued(tmp_path):
    (tmp_path / "t.csv").write_text("path,captions\na.mp4,['a dog' 'a dog runs']\n")
    with pytest.raises(BrokenRecord, match=r"a\.mp4: a list of captions without commas"):
        captions(tmp_path / "t.csv")


def test_columns_of_json_lines_are_those_of_all_rows(tmp_path):
    rows = [
        {"video": "a.mp4", "name": "a"},
        {"video": "b.mp4", "caption": "a dog", "name": "b"},
        {"path": "c.mp4", "text": "a cat"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = {"a.mp4": (), "b.mp4": ("a dog",), "c.mp4": ("a cat",)}
    assert captions(tmp_path / "t.jsonl") == wanted


def test_members_with_dots_are_not_mixed(tmp_path):
    names = ["v_1.0-2.0.mp4", "v_1.5-3.0.mp4", "v_1.0-2.0.txt", "v_1.5-3.0.txt"]
    names += ["2.mp4", "2.txt", "2.depth.mp4", "2.depth.txt", "x_1.5.mp4", "x_1.5.txt"]
    write_tar(
        tmp_path / "s.tar", [(name, CLIP if "mp4" in name else name.encode()) for name in names]
    )
    assert captions(tmp_path / "s.tar") == {"s.tar/2": ("2.txt",), "s.tar/x_1": ("x_1.5.txt",)}
    source = open_source(DataConfig(path=str(tmp_path / "s.tar")), split="all")
    (line,) = source.left_out
    assert line.startswith(f"{tmp_path}/s.tar: 6 members share the name up to the first dot")
    assert line.endswith(
        ": v_1.0-2.0.mp4, v_1.5-3.0.mp4, v_1.0-2.0.txt, v_1.5-3.0.txt, 2.depth.mp4 and 1 more"
    )


def test_files_beside_shards_and_stills_in_them_are_counted(tmp_path):
    write_tar(tmp_path / "s.tar", [("1.mp4", CLIP), ("1.jpg", b"x")])
    touch(tmp_path, "a.mp4", "a.txt", ".hidden")
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    assert source.left_out == (
        f"{tmp_path}/s.tar: 1 pictures beside a video of the same name",
        "2 files beside the shards: a.mp4, a.txt",
    )


def test_links_in_a_shard_are_counted(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("1.mp4")
        member.size = len(CLIP)
        tar.addfile(member, io.BytesIO(CLIP))
        link = tarfile.TarInfo("2.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "1.mp4"
        tar.addfile(link)
    for _ in range(2):  # read, and from the list that is kept
        source = open_source(DataConfig(path=str(tmp_path / "s.tar")), split="all")
        assert source.left_out == (f"{tmp_path}/s.tar: 1 links, which are passed over",)

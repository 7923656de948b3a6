"""Every form of data set: what is found in it, how it is named, split and captioned."""

import csv
import json
import pickle
import tarfile

import numpy as np
import pytest
from media_files import greys, mp4_bytes, number_of, write_tar

from dicode_jax.data.clips import read_frame
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import BrokenRecord, Strings, captions_from_value, name_hash
from dicode_jax.data.sources import array_record as sources_array_record
from dicode_jax.data.sources import tar as sources_tar
from dicode_jax.data.sources.open import kind_of, open_source
from dicode_jax.errors import UserError

CLIP = mp4_bytes(greys(4))


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def listed(path, images=True, **options):
    source = open_source(DataConfig(path=str(path), **options), split="all", images=images)
    records = [source.record(i) for i in range(len(source))]
    assert [record.name for record in records] == [source.name(i) for i in range(len(source))]
    return {record.name: record for record in records}


def captions(path, **options):
    return {name: record.captions for name, record in listed(path, **options).items()}


def touch(folder, *names, data=b"x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# A folder


def test_a_folder_has_captions_beside_its_files(tmp_path):
    touch(tmp_path, "a.mp4", "deep/er/b.MOV", "c.webm", "d.png", "notes.md", ".hidden.mp4")
    (tmp_path / "a.txt").write_text("one line\n\n  another \n")
    (tmp_path / "deep/er/b.json").write_text('{"caption": "from json"}')
    (tmp_path / "c.txt").write_text("twice")
    (tmp_path / "c.json").write_text('["twice", "once"]')
    assert captions(tmp_path) == {
        "a.mp4": ("one line", "another"),
        "c.webm": ("twice", "once"),
        "d.png": (),
        "deep/er/b.MOV": ("from json",),
    }
    assert "d.png" not in listed(tmp_path, images=False)


def test_the_picture_beside_a_video_is_no_example(tmp_path):
    touch(tmp_path, "a.mp4", "a.jpg", "b.jpg")
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    assert [source.name(i) for i in range(len(source))] == ["a.mp4", "b.jpg"]
    assert source.left_out == ("1 pictures beside a video of the same name",)


def test_folders_that_link_in_a_circle_are_gone_through_once(tmp_path):
    touch(tmp_path, "in/a.mp4")
    (tmp_path / "in/again").symlink_to(tmp_path)
    assert list(listed(tmp_path)) == ["in/a.mp4"]


@pytest.mark.parametrize("data", [b'{"caption": ', b"\xff\xfe\x00", b'{"caption": 3}'])
def test_a_caption_that_cannot_be_read_breaks_its_record(tmp_path, data):
    touch(tmp_path, "a.mp4")
    touch(tmp_path, "a.json", data=data)
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    with pytest.raises(BrokenRecord, match=r"^a.mp4: its caption \(.json\) cannot be read"):
        source.record(0)


def test_one_file_is_a_data_set(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_text("alone")
    assert captions(tmp_path / "a.mp4") == {"a.mp4": ("alone",)}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("a", ("a",)),
        (["a", " ", "b"], ("a", "b")),
        ({"text": "a", "fps": 3}, ("a",)),
        ({"captions": [{"caption": "a"}, "b"]}, ("a", "b")),
        ({"fps": 3}, ()),
        (None, ()),
        ('["a, b", "c"]', ("a, b", "c")),
        ("['a', \"b's\"]", ("a", "b's")),
        ("[]", ("[]",)),
        ("[Music]", ("[Music]",)),
        ("[1, 2]", ("[1, 2]",)),
    ],
)
def test_captions_in_json_have_many_forms(value, wanted):
    assert captions_from_value(value) == wanted


# Splits


def test_a_split_goes_by_names_alone(tmp_path):
    names = [f"{i:03d}.mp4" for i in range(400)]
    for root in ("one", "two"):
        touch(tmp_path / root, *names)
    touch(tmp_path / "two", "zzz.mp4", "000-new.mp4")

    def split(root, part):
        cfg = DataConfig(path=str(tmp_path / root), validation=0.1)
        source = open_source(cfg, split=part)
        return {source.name(i) for i in range(len(source))}

    train, held_out = split("one", "train"), split("one", "validation")
    assert train | held_out == set(names)
    assert not train & held_out
    assert 20 <= len(held_out) <= 60  # 40 by expectation, 6 by standard deviation
    more = split("two", "validation")
    assert more & set(names) == held_out


def test_a_name_stays_on_its_side_for_ever():
    assert name_hash("dogs/1.mp4") == 16190808110064574337  # 0.878 of 2**64


def test_nothing_or_a_share_that_takes_nothing_is_an_empty_validation(tmp_path):
    touch(tmp_path, "a.mp4")
    cfg = DataConfig(path=str(tmp_path), validation=0.0)
    assert len(open_source(cfg, split="validation")) == 0
    assert len(open_source(cfg, split="train")) == 1
    with pytest.raises(UserError, match="is held out; lower validation"):
        open_source(DataConfig(path=str(tmp_path), validation=0.999999), split="train")


def test_the_synthetic_world_holds_out_captions():
    said = {
        split: {
            open_source(DataConfig(), split=split, seed=1).record(i).captions[0] for i in range(300)
        }
        for split in ("train", "validation")
    }
    assert not said["train"] & said["validation"]
    other = open_source(DataConfig(), split="train", seed=2)
    assert other.record(0).captions != open_source(DataConfig(), seed=1).record(0).captions


# Tables


def write_csv(path, rows, **options):
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)


WEBVID = ["videoid", "contentUrl", "duration", "page_dir", "name"]


def test_webvids_columns_name_local_files(tmp_path):
    touch(tmp_path, "videos/000_050/1.mp4", "7.mp4", "000_100/3.mp4")
    rows = [
        WEBVID,
        ["1", "https://x/1.mp4", "PT00H00M10S", "000_050", 'A "red", small\ncar'],
        ["3", "https://x/3.mp4", "PT00H00M10S", "000_100", "Ünïcode"],
        ["7", "https://x/7.mp4", "PT00H00M10S", "gone", "Flat"],
        ["1", "https://x/1.mp4", "PT00H00M10S", "000_050", "Said otherwise"],
    ]
    write_csv(tmp_path / "webvid.csv", rows, encoding="utf-8-sig")
    records = listed(tmp_path / "webvid.csv")
    assert {name: record.captions for name, record in records.items()} == {
        "000_050/1.mp4": ('A "red", small\ncar', "Said otherwise"),
        "000_100/3.mp4": ("Ünïcode",),
        "gone/7.mp4": ("Flat",),
    }
    places = ["videos/000_050/1.mp4", "000_100/3.mp4", "7.mp4"]
    assert [r.media.path for r in records.values()] == [str(tmp_path / p) for p in places]


def test_a_table_of_files_merges_rows_of_one_file(tmp_path):
    rows = [["path", "caption"], ["b.mp4", "b1"], ["a.mp4", "a1"], ["b.mp4", "b2"], ["b.mp4", "b1"]]
    write_csv(tmp_path / "t.tsv", rows, delimiter="\t")
    assert captions(tmp_path / "t.tsv") == {"b.mp4": ("b1", "b2"), "a.mp4": ("a1",)}
    moved = listed(tmp_path / "t.tsv", root="/elsewhere")
    assert moved["a.mp4"].media.path == "/elsewhere/a.mp4"


def test_columns_can_be_named(tmp_path):
    write_csv(tmp_path / "t.csv", [["clip", "said", "caption"], ["a.mp4", "x", "y"]])
    path = tmp_path / "t.csv"
    assert captions(path, video_column="clip", caption_column="said") == {"a.mp4": ("x",)}
    assert captions(path, video_column="clip", caption_column="") == {"a.mp4": ()}
    with pytest.raises(UserError, match=r"video_column; there are clip, said, caption$"):
        listed(path)
    with pytest.raises(UserError, match="has no column 'spoken'; it has clip, said, caption"):
        listed(path, video_column="clip", caption_column="spoken")


def test_json_lines_may_hold_several_captions_and_bad_lines(tmp_path):
    lines = [
        json.dumps({"video": "a.mp4", "captions": ["one", "two"]}),
        "",
        "{not json",
        json.dumps({"video": "b.png", "captions": "three"}),
        json.dumps({"captions": "no video"}),
        json.dumps(["a list"]),
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert captions(tmp_path / "t.jsonl") == {"a.mp4": ("one", "two"), "b.png": ("three",)}
    source = open_source(DataConfig(path=str(tmp_path / "t.jsonl")), split="all", images=False)
    assert len(source) == 1
    assert [line.split(": ")[0][-5:] for line in source.left_out] == ["row 2", "row 4", "row 5"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([["path", "caption"], ["https://x/1.mp4", "c"]], "no videos .*names a web address"),
        ([["path", "caption"]], "there are no videos"),
        ([], "is empty"),
        ([["path", "width"], ["a.mp4", "3"]], "which column holds the caption"),
    ],
)
def test_a_table_that_will_not_do_is_refused(tmp_path, rows, said):
    write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=said) as caught:
        listed(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


def test_a_large_table_takes_little_memory(tmp_path):
    rows = [["path", "caption"], *([f"{i % 25_000}.mp4", "word " * 30] for i in range(50_000))]
    write_csv(tmp_path / "t.csv", rows)
    cfg = DataConfig(path=str(tmp_path / "t.csv"))
    source = open_source(cfg, split="train")
    assert 24_000 < len(source) < 25_000
    assert len(pickle.dumps(source)) < 32 * 50_000  # a caption alone has 150 letters
    again = pickle.loads(pickle.dumps(source))
    assert again.record(20_000) == source.record(20_000)


# Tar shards


def test_members_of_a_shard_belong_together_by_key(tmp_path):
    members = [
        ("a/1.mp4", CLIP),
        ("a/1.txt", b"first\nsecond"),
        ("a/1.json", b'{"caption": "third", "width": 3}'),
        ("2.thumb.jpg", b"x"),
        ("2.mp4", CLIP),
        ("._2.mp4", b"litter"),
        ("3.txt", b"nothing to see"),
        ("4.png", b"x"),
        ("4.cls", b"7"),
        ("a/2.mp4", CLIP),
    ]
    write_tar(tmp_path / "s-0.tar", members)
    write_tar(tmp_path / "s-1.tar", [("2.txt", b"late"), ("2.mp4", CLIP)])
    wanted = {
        "s-0.tar/a/1": ("first", "second", "third"),
        "s-0.tar/2": (),
        "s-0.tar/4": (),
        "s-0.tar/a/2": (),
        "s-1.tar/2": ("late",),
    }
    assert captions(tmp_path) == wanted
    assert captions(tmp_path / "s-{0..1}.tar") == wanted
    assert captions(tmp_path / "s-?.tar") == wanted
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    assert source.left_out == (
        f"{tmp_path}/s-0.tar: 1 files of kinds that are not read: .cls (1)",
        f"{tmp_path}/s-0.tar: 1 pictures beside a video of the same name",
        f"{tmp_path}/s-0.tar: 1 examples without a video or picture",
    )
    records = listed(tmp_path, images=False)
    assert "s-0.tar/4" not in records
    cfg = DataConfig(clip_start="center")
    for record in records.values():
        image = read_frame(record, cfg, 16, np.random.default_rng(0))["image"]
        assert number_of(image) == 2


def test_a_shard_is_gone_through_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar", [("1.mp4", CLIP), ("1.txt", "é".encode())])
    before = listed(tmp_path / "s.tar")
    scans = []
    scan = sources_tar._scan
    monkeypatch.setattr(sources_tar, "_scan", lambda *args: scans.append(args) or scan(*args))
    assert listed(tmp_path / "s.tar") == before
    assert not scans
    write_tar(tmp_path / "s.tar", [("9.mp4", CLIP)])
    assert list(listed(tmp_path / "s.tar")) == ["s.tar/9"]
    assert len(scans) == 1


@pytest.mark.parametrize("inside", ["data", "header"])
def test_a_shard_that_is_cut_keeps_what_is_whole(tmp_path, inside):
    write_tar(tmp_path / "s.tar", [(f"{i}.mp4", CLIP) for i in range(4)])
    data = (tmp_path / "s.tar").read_bytes()
    member = 512 + -(-len(CLIP) // 512) * 512
    end = 3 * member + {"data": 700, "header": 200}[inside]
    (tmp_path / "s.tar").write_bytes(data[:end])
    source = open_source(DataConfig(path=str(tmp_path / "s.tar")), split="all")
    assert len(source) == 3
    (line,) = source.left_out
    assert line.startswith(f"{tmp_path}/s.tar is cut short")


def test_shards_that_cannot_be_read_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz"):
        pass
    (tmp_path / "text.tar").write_text("hello" * 200)
    for name in ("s.tar.gz", "text.tar"):
        with pytest.raises(UserError, match="is not a plain tar file"):
            listed(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no file .*-2.tar \(3 of 3 missing\)"):
        listed(tmp_path / "x-{2..4}.tar")
    with pytest.raises(UserError, match="there are no shards"):
        listed(tmp_path / "x*.tar")


# ArrayRecord shards


def test_array_record_gives_back_what_was_packed(tmp_path):
    for shard in range(2):
        packed = [
            sources_array_record.pack(f"c/{i}.mp4", [f"caption {i}"], ".mp4", CLIP)
            for i in range(3 * shard, 3 * shard + 3)
        ]
        name = f"x.array_record-0000{shard}-of-00002"
        assert sources_array_record.write_shard(tmp_path / name, packed) == 3
    records = listed(tmp_path)
    assert list(records)[3] == "x.array_record-00001-of-00002:0/c/3.mp4"
    assert [record.captions for record in records.values()] == [(f"caption {i}",) for i in range(6)]
    assert {record.media.data for record in records.values()} == {CLIP}
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    source.record(5)
    assert pickle.loads(pickle.dumps(source)).record(4) == source.record(4)


def test_array_records_of_another_form_are_named(tmp_path):
    bad = [b"\x00\x01", b"{}\nx", sources_array_record.pack("a", [], ".exe", b"x")]
    sources_array_record.write_shard(tmp_path / "x.array_record", bad)
    source = open_source(DataConfig(path=str(tmp_path / "x.array_record")), split="all")
    for i in range(3):
        with pytest.raises(BrokenRecord, match=f"^x.array_record:{i}: "):
            source.record(i)
        assert source.name(i) == f"x.array_record:{i}"
    (tmp_path / "y.array_record").write_bytes(b"no such thing" * 100)
    source = open_source(DataConfig(path=str(tmp_path)), split="all")
    assert (len(source), len(source.left_out)) == (3, 1)
    with pytest.raises(UserError, match=r"no videos .*y.array_record is not a whole"):
        listed(tmp_path / "y.array_record")


# Which form it is


def test_the_form_of_a_data_set_is_told_by_its_path(tmp_path):
    touch(tmp_path, "tar/a.tar", "records/a.array_record-00000-of-00001", "plain/a.mp4")
    touch(tmp_path, "cache/a.array_record", "cache/manifest.json", "begun/encoded-0.array_record")
    touch(tmp_path, "old/tokens-0.array_record")
    forms = {
        "shapes": "shapes",
        tmp_path / "tar": "tar",
        tmp_path / "records": "array_record",
        tmp_path / "plain": "folder",
        tmp_path / "cache": "cache",
        tmp_path / "begun": "cache",
        tmp_path / "old": "cache",
        "x.csv": "table",
        "x.jsonl": "table",
        "a/{00..99}.tar": "tar",
        "a/x-*.array_record": "array_record",
    }
    assert {path: kind_of(DataConfig(path=str(path))) for path in forms} == forms
    with pytest.raises(UserError, match="does not exist; want `shapes`, a folder"):
        kind_of(DataConfig(path=str(tmp_path / "gone")))
    with pytest.raises(UserError, match="is a token cache, which only the language model reads"):
        open_source(DataConfig(path=str(tmp_path / "cache")))
    with pytest.raises(UserError, match="there are no videos and no pictures in"):
        open_source(DataConfig(path=str(tmp_path / "tar"), kind="folder"))


def test_strings_in_one_piece_come_back():
    words = ["", "a", "äöü", "b\udc80", "long " * 50]
    packed = Strings(words)
    assert list(packed) == words
    assert packed[-1] == words[-1]
    with pytest.raises(IndexError):
        packed[5]

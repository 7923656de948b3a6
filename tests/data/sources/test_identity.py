"""One file is one record on one side of a split, whatever the data set calls it."""

import json
import os
import random
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import write_tar

from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import MediaBytes, in_validation, name_hash
from dicode_jax.data.sources import array_record as sources_array_record
from dicode_jax.data.sources import identity
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.sources.table import TableSource

NAMES = [f"{i // 10}/{i:02d}.mp4" for i in range(60)]  # each holds its name
FORMS = ["folder", "csv", "jsonl", "tar", "array_record"]
TABLES = ["csv", "jsonl"]


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_files(root, names=NAMES):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def write_table(path, names):
    if path.suffix == ".csv":
        path.write_text(
            "path,caption\n" + "".join(f'"{name}",c{i}\n' for i, name in enumerate(names))
        )
    else:
        rows = ({"video": name, "caption": f"c{i}"} for i, name in enumerate(names))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_records(path, names):
    packed = (sources_array_record.pack(name, [], ".mp4", name.encode()) for name in names)
    sources_array_record.write_shard(path, packed)


def build(root, form):
    """A data set of `NAMES` under canonical names; what to open."""
    root.mkdir(parents=True)
    if form == "tar":
        write_tar(root / "s.tar", [(name, name.encode()) for name in NAMES])
        return root / "s.tar"
    if form == "array_record":
        write_records(root / "x.array_record", NAMES)
        return root / "x.array_record"
    write_files(root)
    if form in TABLES:
        write_table(root / f"t.{form}", NAMES)
        return root / f"t.{form}"
    return root


def content(record):
    if isinstance(record.media, MediaBytes):
        return record.media.data.decode()
    with open(record.media.path) as file:
        file.seek(record.media.offset)
        return file.read(-1 if record.media.size is None else record.media.size)


def sides(path, share=0.3, **options):
    """Which files are held out and which trained on, by what they hold; each is there once."""
    found = {}
    for split in ("train", "validation", "all"):
        source = open_source(DataConfig(path=str(path), validation=share, **options), split=split)
        records = [source.record(i) for i in range(len(source))]
        assert len({record.name for record in records}) == len(records)
        canonical = {source.canonical_name(i) for i in range(len(source))}
        assert len(canonical) == len(records)
        found[split] = sorted(map(content, records))
    assert sorted(found["train"] + found["validation"]) == found["all"]
    assert len(set(found["all"])) == len(found["all"])
    return {side: set(found[side]) for side in ("train", "validation")}


# What the canonical names gave when the split went by names as they were spelled.
HELD_OUT = {"0/03.mp4", "1/13.mp4", "1/16.mp4", "2/29.mp4", "3/35.mp4", "3/39.mp4", "5/59.mp4"}
HELD_OUT_OF_SHARDS = {
    "tar": {"3/36.mp4", *(f"5/{i}.mp4" for i in (51, 53, 54, 55, 59))},
    "array_record": {
        "1/13.mp4",
        "1/17.mp4",
        "1/19.mp4",
        "2/24.mp4",
        "3/34.mp4",
        "5/58.mp4",
        "5/59.mp4",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_runs_of_old_keep_their_split(tmp_path, form):
    found = sides(build(tmp_path / "data", form), share=0.1)
    assert found["validation"] == HELD_OUT_OF_SHARDS.get(form, HELD_OUT)


def test_webvids_names_keep_their_side_wherever_the_files_lie(tmp_path):
    rows = "".join(f"{name[2:4]},u,1,{name[0]},c\n" for name in NAMES)
    for number, place in enumerate(("{}", "videos/{}", "{0[2]}{0[3]}.mp4")):
        root = tmp_path / str(number)
        root.mkdir()
        for name in NAMES:
            (root / place.format(name)).parent.mkdir(parents=True, exist_ok=True)
            (root / place.format(name)).write_text(name)
        (root / "w.csv").write_text("videoid,contentUrl,duration,page_dir,name\n" + rows)
        assert sides(root / "w.csv", share=0.1)["validation"] == HELD_OUT


@pytest.mark.parametrize("form", FORMS)
def test_where_the_data_lie_changes_no_side(tmp_path, form, monkeypatch):
    path = build(tmp_path / "data", form)
    wanted = sides(path)
    assert wanted["validation"]
    inside = path.relative_to(tmp_path / "data")
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "moved/deep")
    (tmp_path / "link").symlink_to("moved")
    monkeypatch.chdir(tmp_path / "moved/deep")
    for root in (
        tmp_path / "moved/deep",
        tmp_path / "link/deep",
        tmp_path / "link/../moved//deep",
        ".",
    ):
        assert sides(os.path.join(root, inside)) == wanted
    for name in ("tar", "x.array_record"):
        if inside.name.endswith(name):
            (tmp_path / inside).symlink_to(tmp_path / "moved/deep" / inside)
            assert sides(tmp_path / inside) == wanted


# Folders


def test_links_in_a_folder_change_no_side_and_add_no_record(tmp_path):
    root = build(tmp_path / "data", "folder")
    wanted = sides(root)
    (root / "-first.mp4").symlink_to("0/03.mp4")
    (root / "last.mp4").symlink_to(root / "1/13.mp4")
    (root / "0/chain.mp4").symlink_to("../last.mp4")
    (root / "00").symlink_to("2")  # found before the folder that it stands for
    (root / "5/up").symlink_to("..")
    for name in NAMES[30:40]:
        (root / "hard" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "hard" / name).hardlink_to(root / name)
    assert sides(root) == wanted
    source = open_source(DataConfig(path=str(root)), split="all")
    assert source.name(0) == "-first.mp4"
    assert source.left_out == ("13 more names of files that have one; their captions are joined",)


def test_links_out_of_a_folder_go_by_the_name_in_it(tmp_path):
    """A folder of links into a store whose names say nothing, as downloads are kept."""
    plain = sides(build(tmp_path / "plain", "folder"))
    found = []
    for store in ("one", "two/deep"):
        (tmp_path / store).mkdir(parents=True)
        root = tmp_path / store / "data"
        for number, name in enumerate(NAMES):
            (tmp_path / store / f"blob{number}").write_text(name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(tmp_path / store / f"blob{number}")
        found.append(sides(root))
    assert found == [plain, plain]


def test_captions_beside_any_name_of_a_file_are_its_own(tmp_path):
    write_files(tmp_path, ["data/b.mp4", "store/z.mp4"])
    root = tmp_path / "data"
    (root / "a.mp4").symlink_to("b.mp4")
    (root / "c.mp4").symlink_to("../store/z.mp4")
    (tmp_path / "store/z.txt").write_text("not in the data set")
    for name, text in {"a": "one\ntwo", "b": "two\nthree", "c": "four"}.items():
        (root / f"{name}.txt").write_text(text)
    source = open_source(DataConfig(path=str(root)), split="all")
    records = {r.name: r.captions for r in map(source.record, range(len(source)))}
    assert records == {"a.mp4": ("one", "two", "three"), "c.mp4": ("four",)}


def test_pictures_left_out_change_nothing_for_videos(tmp_path):
    root = build(tmp_path / "data", "folder")
    (root / "still.png").write_text("a picture")
    (root / "also.png").symlink_to("still.png")
    with_pictures = open_source(DataConfig(path=str(root)), split="all")
    videos = open_source(DataConfig(path=str(root)), split="all", images=False)
    assert len(with_pictures) == len(videos) + 1 == 61


# Tables


def test_two_spellings_are_one_record_with_the_captions_of_both(tmp_path):
    (tmp_path / "dupe.csv").write_text("path,caption\na.mp4,one\n./a.mp4,two\na.mp4,three\n")
    for there in (False, True):
        if there:
            (tmp_path / "a.mp4").touch()
        source = open_source(DataConfig(path=str(tmp_path / "dupe.csv")), split="all")
        assert len(source) == 1
        assert source.record(0).captions == ("one", "two", "three")
        assert source.name(0) == "a.mp4"
        assert source.left_out == (
            f"{tmp_path}/dupe.csv: 1 rows name the file of an earlier row by another name; their "
            "captions are joined",
        )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Files that lie below the root, and outside it, with links to both and hard links."""
    root = tmp_path_factory.mktemp("tree") / "data"
    write_files(root)
    write_files(root.parent / "store", ["sub/a.mp4"])
    (root / "again").symlink_to(root)
    (root / "out").symlink_to("../store/sub")
    (root / "out2").symlink_to("../store/sub")
    for name in NAMES:
        (root / "hard" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "hard" / name).hardlink_to(root / name)
        (root / "soft" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "soft" / name).symlink_to(root / name)
    return root


# Other spellings of `N/NN.mp4` below the root R.
SPELLINGS = [
    *(
        "{n}",
        "./{n}",
        "0/../{n}",
        "{n[0]}//{n[2]}{n[3]}.mp4",
        "../data/{n}",
        "{r}/{n}",
        "{r}/./{n}",
    ),
    *("again/{n}", "soft/{n}", "{r}/again/again/{n}", "soft/../{n}", "again/0/..//{n}", "/{r}/{n}"),
]


def held_out_of(names, share=0.3):
    hashes = np.array([name_hash(name) for name in names], np.uint64)
    return {n for n, out in zip(names, in_validation(hashes, share), strict=True) if out}


@pytest.mark.parametrize("form", TABLES)
@given(data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_in_any_order_and_spelling_give_the_same_sides(tree, form, data):
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=10, max_size=20, unique=True))
    some = st.lists(st.sampled_from([*SPELLINGS, "hard/{n}"]), max_size=3)
    rows = [
        spelling.format(n=name, r=tree)
        for name in names
        for spelling in [data.draw(st.sampled_from(SPELLINGS)), *data.draw(some)]
    ]
    path = tree / f"t.{form}"
    write_table(path, data.draw(st.permutations(rows)))
    found = sides(path)
    assert found["train"] | found["validation"] == set(names)
    assert found["validation"] == held_out_of(names)


@pytest.mark.parametrize("seed", range(5))
def test_of_several_names_outside_the_first_decides(tree, seed):
    rows = ["out2/a.mp4", "out/a.mp4", "../store/sub/a.mp4", f"{tree}/out/../sub/a.mp4"]
    random.Random(seed).shuffle(rows)
    write_table(tree / "out.csv", rows)
    source, hashes = TableSource.open(
        str(tree / "out.csv"), root=None, video_column=None, caption_column=None, images=True
    )
    assert (len(source), source.name(0)) == (1, rows[0])
    assert source.canonical_name(0) == "out/a.mp4"
    assert hashes.tolist() == [name_hash("out/a.mp4")]
    known, outside = identity.FileNames(str(tree)), f"{tree.parent}/store/sub/a.mp4"
    for slashes in ("", "/", "//"):
        assert known.resolve(slashes + outside)[0] == outside


def test_what_only_looks_like_one_file_is_two(tree):
    """Behind a link `..` is not what it is in the name; copies are files of their own."""
    write_files(tree, ["trap.mp4"])
    (tree.parent / "store/trap.mp4").write_text("another")
    (tree / "copy.mp4").write_text("trap.mp4")
    rows = [
        "out/../trap.mp4",
        "trap.mp4",
        "copy.mp4",
        "Trap.mp4",
        "tra\u0301p.mp4",
        "tr\u00e1p.mp4",
    ]
    write_table(tree / "trap.csv", rows)
    source = open_source(DataConfig(path=str(tree / "trap.csv")), split="all")
    assert [source.name(i) for i in range(len(source))] == rows
    assert len({source.canonical_name(i) for i in range(6)}) == 6
    assert source.left_out == ()


def test_names_that_the_file_system_takes_for_one_are_one(tree, monkeypatch):
    write_files(tree, ["upper.mp4"])
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: lstat(str(path).replace("UPPER", "upper")))
    write_table(tree / "case.csv", ["upper.mp4", "UPPER.mp4"])
    source = open_source(DataConfig(path=str(tree / "case.csv")), split="all")
    assert len(source) == 1


def test_a_file_that_changes_while_rows_are_read_stays_one():
    order, ends = identity.group(
        np.array([5, 6, 7, 5], np.uint64), np.array([1, 1, 2, 3], np.uint64), np.ones(4, bool)
    )
    assert (order.tolist(), ends.tolist()) == ([0, 1, 3, 2], [0, 3, 4])


@pytest.mark.parametrize(
    "name", ["a\0b.mp4", "a\0/b.mp4", "b" * 300 + ".mp4", "loop.mp4", "0/03.mp4/c.mp4"]
)
def test_names_that_the_disk_refuses_are_missing_files(tree, name):
    if not (tree / "loop.mp4").is_symlink():
        (tree / "loop.mp4").symlink_to("loop.mp4")
    write_table(tree / "odd.jsonl", [name, NAMES[0]])
    source = open_source(DataConfig(path=str(tree / "odd.jsonl")), split="all")
    assert [source.name(i) for i in range(len(source))] == [name, NAMES[0]]
    assert identity.FileNames(str(tree)).resolve(name)[1] is None


# Shards


def test_a_member_is_one_record_however_its_name_is_spelled(tmp_path):
    wanted = sides(build(tmp_path / "data", "tar"))
    spelled = [(f"./{name}", name.encode()) for name in NAMES]
    write_tar(tmp_path / "s.tar", spelled)
    assert sides(tmp_path / "s.tar") == wanted
    captions = [("0/03.txt", b"one"), ("./0/03.txt", b"two"), ("0//03.json", b'["three"]')]
    again = [(name, name.encode()) for name in NAMES[:20]]
    write_tar(tmp_path / "s.tar", [*spelled, *captions, *again, *again])
    assert sides(tmp_path / "s.tar") == wanted
    source = open_source(DataConfig(path=str(tmp_path / "s.tar")), split="all")
    assert source.name(3) == "s.tar/./0/03"
    assert source.canonical_name(3) == "s.tar/0/03"
    assert source.record(3).captions == ("one", "two", "three")
    assert source.left_out == (f"{tmp_path}/s.tar: 41 members have the name of an earlier one",)


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_a_shard_that_is_listed_twice_is_read_once(tmp_path, form):
    path = build(tmp_path / "data", form)
    wanted, root, suffix = sides(path), path.parent, path.suffix
    (root / f"a{suffix}").symlink_to(path.name)
    (root / "sub").symlink_to(".")
    (root / f"z{suffix}").hardlink_to(path)
    stems = ("a", path.stem, f"./{path.stem}", f"sub/{path.stem}", "z", "sub/a")
    for order in (stems, stems[::-1]):
        pattern = f"{root}/{{{','.join(order)}}}{suffix}"
        assert sides(pattern) == wanted
        source = open_source(DataConfig(path=pattern), split="all")
        assert len(source.left_out) == 5
        assert all(" is the shard " in line for line in source.left_out)
    assert sides(root, kind=form) == wanted

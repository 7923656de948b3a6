"""The cache of encoded examples: what is written is read, and what is damaged is refused."""

import dataclasses
import json
import os
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dicode_jax.data import encoded_cache
from dicode_jax.data.encoded_cache import Broken, EncodedCache, Example, Spec
from dicode_jax.data.sources import array_record
from dicode_jax.errors import UserError

OLD = pathlib.Path(__file__).parents[1] / "old_models/token_cache"
N, Z = 3, 5
ABOUT = {"encoder": "abcdef" * 10, "settings": {"seed": 0, "data": {"path": "p"}}}
SCHEMA = {
    "tokens": Spec("bfloat16", (None, N, Z)),
    "codes": Spec("int16", (2, None)),
    "latents": Spec("float32", (4,)),
    "fs": Spec("int32", ()),
}


def video(name, k):
    rng = np.random.default_rng(k)
    arrays = {
        "tokens": rng.normal(size=(k, N, Z)).astype(ml_dtypes.bfloat16),
        "codes": rng.integers(-(2**15), 2**15, (2, k + 1)).astype(np.int16),
        "latents": rng.normal(size=4).astype(np.float32),
        "fs": np.int32(k),
    }
    captions = (f"caption of {name}", "a dög \udcff")  # the last is not UTF-8, as names can be
    return Example(name=name, arrays=arrays, captions=captions, source=f"/x/{name}")


SHARDS = ([video("a", 1), Broken("b", "cut"), video("c", 4)], [], [video("d", 2)])


def write(folder):
    encoded_cache.write_plan(folder, ABOUT)
    for i, videos in enumerate(SHARDS):
        path = encoded_cache.shard_path(folder, i, len(SHARDS))
        encoded_cache.write_shard(path, videos, SCHEMA, {"files": str(i)})
    encoded_cache.write_manifest(folder, len(SHARDS), SCHEMA)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def test_examples_come_back_in_order_across_shards_and_processes(folder):
    cache = pickle.loads(pickle.dumps(EncodedCache(folder)))
    assert cache.schema == SCHEMA
    assert cache.names == ["a", "c", "d"]
    assert cache.lengths("tokens").tolist() == [1, 4, 2]
    assert cache.lengths("codes").tolist() == [2, 5, 3]
    assert cache.broken == {"b": "cut"}
    for i, wanted in enumerate([video("a", 1), video("c", 4), video("d", 2)]):
        got = cache[i]
        assert got.arrays.keys() == SCHEMA.keys()
        for name, x in wanted.arrays.items():
            assert (got.arrays[name].dtype, got.arrays[name].shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(got.arrays[name], x)
        assert (got.name, got.captions, got.source) == (wanted.name, wanted.captions, wanted.source)


def test_manifest_says_what_is_held_and_what_it_was_made_with(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["version"]) == ("encoded_cache", 1)
    assert (manifest["count"], manifest["broken"]) == (3, 1)
    assert manifest["lengths"] == {"tokens": 7, "codes": 10}
    assert manifest["schema"]["codes"] == {"dtype": "int16", "shape": [2, None]}
    assert ABOUT.items() <= manifest.items()


def test_an_array_of_another_shape_than_the_schemas_is_refused():
    wrong = dataclasses.replace(video("a", 1), arrays=video("a", 1).arrays | {"latents": [1.0]})
    with pytest.raises(ValueError, match=r"latents of a is \(1,\), the schema says \(4,\)"):
        wrong.to_bytes(SCHEMA)


def test_the_same_examples_give_the_same_bytes(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write(again)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 8
    assert all((folder / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_a_cache_of_the_last_release_is_read():
    cache = EncodedCache(OLD)
    assert cache.names == [f"shapes/train/3/{i}" for i in range(3)]
    assert cache.lengths("tokens").tolist() == [2, 2, 2]
    assert cache.schema["tokens"] == Spec("bfloat16", (None, 3, 8))
    assert cache.manifest["encoder"].startswith("f7115d88ed0b")
    video = cache[1]
    assert video.captions == ("a large blue triangle moves up on a navy background",)
    assert video.arrays["times"].tolist() == [0.0, 2.0]
    np.testing.assert_allclose(video.arrays["tokens"].astype(np.float32).sum(), 47.475586)
    cache.verify()


def test_what_has_changed_since_is_named(folder):
    assert encoded_cache.changes(folder, ABOUT) == []
    assert encoded_cache.changes(folder / "new", ABOUT) is None
    now = {"encoder": "x", "settings": {"seed": 1, "data": {"path": "p", "crop": ("a",)}}}
    assert encoded_cache.changes(folder, now) == [
        f"encoder {ABOUT['encoder']} -> x",
        "settings.data.crop None -> ['a']",
        "settings.seed 0 -> 1",
    ]
    paths = [encoded_cache.shard_path(folder, i, 3) for i in range(3)]
    shards = {path: {"files": str(i)} for i, path in enumerate(paths)}
    assert not encoded_cache.stale(shards)
    assert encoded_cache.stale(shards | {paths[1]: {"files": "7"}}) == {paths[1]: ["files"]}


def test_a_plan_with_the_names_of_many_classes_is_read_again(tmp_path):
    about = {**ABOUT, "settings": {"class_names": [f"class {i} " + 60 * "x" for i in range(5000)]}}
    encoded_cache.write_plan(tmp_path, about)
    assert encoded_cache.changes(tmp_path, about) == []


def test_a_torn_shard_is_refused(folder):
    path = encoded_cache.shard_path(folder, 0, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"encoded-00000-of-00003\.array_record is torn"):
        EncodedCache(folder)
    assert encoded_cache.read_index(path) is None
    path.unlink()
    with pytest.raises(UserError, match="has lost its shard"):
        EncodedCache(folder)


def test_verify_finds_a_flipped_bit_and_names_the_file(folder):
    EncodedCache(folder).verify()
    path = encoded_cache.shard_path(folder, 2, 3)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: encoded-00002-of-00003\.array_record;"):
        EncodedCache(folder).verify()


def test_verify_names_three_files_and_counts_the_rest(folder):
    cache, files = EncodedCache(folder), [encoded_cache.shard_path(folder, i, 3) for i in range(3)]
    for number, path in enumerate([*files, files[0].with_suffix(".json")], 1):
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(UserError, match="is damaged: ") as caught:
            cache.verify()
        named = str(caught.value).split("is damaged: ")[1].split("; delete these")[0]
        assert named.count("encoded-") == min(number, 3)
        assert named.endswith(" and 1 more") == (number == 4)
        assert "more" not in named or number == 4


def test_a_cache_that_is_not_finished_says_so(folder, tmp_path_factory):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        EncodedCache(folder)
    with pytest.raises(UserError, match=r"no manifest.json$"):
        EncodedCache(tmp_path_factory.mktemp("empty"))


def test_a_shard_that_fails_halfway_leaves_nothing(tmp_path):
    def videos():
        yield video("a", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded_cache.write_shard(encoded_cache.shard_path(tmp_path, 0, 1), videos(), SCHEMA, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write"):
        encoded_cache.write_shard(encoded_cache.shard_path(tmp_path / "no", 0, 1), [], SCHEMA, {})


def test_text_that_is_no_unicode_survives():
    odd = dataclasses.replace(video("a", 1), name="\udcfe.mp4")
    assert Example.from_bytes(odd.to_bytes(SCHEMA), SCHEMA).name == odd.name


def change(path, way, value):
    """Puts a value into a JSON file."""
    data = json.loads(path.read_text())
    holder = data
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("way", "value"),
    [
        *((("schema",), None), (("schema", "fs"), 3), (("schema", "fs", "dtype"), "float31")),
        *(
            (("schema", "fs", "shape"), ["x"]),
            (("count",), 3.0),
            (("count",), 4),
            (("count",), "3"),
        ),
        *((("shards",), {}), (("shards", 0, "count"), None), (("shards", 0, "bytes"), "1")),
        *((("shards", 0, "file"), x) for x in ("../x.array_record", "/x.array_record", "a/b", 3)),
        *((("schema", "fs", "dtype"), x) for x in ("object", "V8", "S5", "float32,int8", ">i4")),
        *((("schema", "fs", "shape"), x) for x in ([-1], [2.0], 3)),
        *(((name,), x) for name in ("shards", "schema", "lengths", "broken") for x in ("9", 1.5)),
        *((("lengths",), {}), (("broken",), -1), (("lengths", "codes"), -1)),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(folder, way, value):
    change(folder / "manifest.json", way, value)
    with pytest.raises(UserError, match=r"manifest.json is damaged .*; delete it and encode again"):
        EncodedCache(folder)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        *((("names",), None), (("names",), [1, 2]), (("names",), ["a"]), (("lengths",), [])),
        *((("lengths", "tokens"), ["x", "y"]), (("broken",), []), (("broken", "b"), {})),
        *(
            (("lengths", "tokens"), x)
            for x in ([1, -4], [1.0, 4.0], [1, 2**40], [True, True], True, {}, "", "12")
        ),
        *((("names",), ["a", "x" * 9000]), (("bytes",), -1)),
        *((("bytes",), "1"), (("data",), [1]), (("sha256",), None)),
    ],
)
def test_an_index_that_says_something_else_is_refused(folder, way, value):
    path = encoded_cache.shard_path(folder, 0, len(SHARDS))
    change(path.with_suffix(".json"), way, value)
    for read in (
        lambda: EncodedCache(folder).names,
        lambda: encoded_cache.read_index(path),
        lambda: encoded_cache.write_manifest(folder, len(SHARDS), SCHEMA),
    ):
        with pytest.raises(UserError, match=r"json is damaged .*; delete it and encode again"):
            read()


@pytest.mark.parametrize("lengths", [{}, {"codes": [1, 1]}])
def test_an_index_without_the_lengths_of_its_schema_makes_no_manifest(folder, lengths):
    index = encoded_cache.shard_path(folder, 0, len(SHARDS)).with_suffix(".json")
    change(index, ("lengths",), lengths)
    with pytest.raises(UserError, match=r"json is damaged .*; delete it and encode again"):
        encoded_cache.write_manifest(folder, len(SHARDS), SCHEMA)


def test_settings_are_found_by_their_names(folder):
    cache = EncodedCache(folder)
    assert (cache.setting("data.path"), cache.setting("seed")) == ("p", 0)
    change(folder / "manifest.json", ["settings"], None)
    with pytest.raises(UserError, match=r"manifest.json says no data.path"):
        EncodedCache(folder).setting("data.path")


def test_a_record_of_another_schema_is_refused():
    made = video("a", 1).to_bytes(SCHEMA)
    with pytest.raises(UserError, match="a record of the cache is damaged"):
        Example.from_bytes(made, SCHEMA | {"more": Spec("float32", ())})


def use(folder, name):
    """Has a file of a cache read."""
    if name == "encode.json":
        encoded_cache.changes(folder, ABOUT)
    assert EncodedCache(folder).names


@pytest.mark.parametrize("text", ["[" * 90_000, "[]", "null", "{", "\xff", '{"x": 9e999}'])
@pytest.mark.parametrize("name", ["manifest.json", "encoded-00000-of-00003.json", "encode.json"])
def test_json_of_any_kind_is_refused_in_one_line(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    said = "not of a cache" if name == "encode.json" else "not valid JSON|not of a cache"
    with pytest.raises(UserError, match=f"{name} is ({said})") as caught:
        use(folder, name)
    assert len(str(caught.value)) < 500


def test_pipes_in_the_place_of_files_are_not_opened(folder):
    index = folder / "encoded-00001-of-00003.json"
    for name in ("encode.json", index.name, "encoded-00001-of-00003.array_record", "manifest.json"):
        (folder / name).rename(folder / "away")
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=r"is a pipe|not of a cache|no cache|no file|lost its"):
            use(folder, name)
        if name == index.name:
            with pytest.raises(UserError, match=f"there is no file .*{name}; encode again"):
                EncodedCache(folder).verify()
        (folder / name).unlink()
        (folder / "away").rename(folder / name)
    use(folder, "encode.json")


def test_a_plan_is_told_in_short_lines_and_without_much_memory(folder):
    plan = {"settings": {"x" * 900: dict.fromkeys(map(str, range(50)), "\x1b[2J" + "y" * 900)}}
    (folder / "encode.json").write_text(json.dumps(plan | {"encoder": "e"}))
    lines = encoded_cache.changes(folder, ABOUT)
    assert len(lines) == 53
    assert all(line.isprintable() and len(line) < 250 for line in lines)
    (folder / "encode.json").write_text(json.dumps({"settings": "x" * 70_000, "encoder": "e"}))
    with pytest.raises(UserError, match=r"encode.json is not of a cache"):
        encoded_cache.changes(folder, ABOUT)


def test_counts_that_a_shard_does_not_hold_are_one_line(folder):
    manifest, path = folder / "manifest.json", folder / "encoded-00002-of-00003.json"
    change(manifest, ("count",), 5)
    change(manifest, ("shards", 2, "count"), 3)
    with pytest.raises(UserError, match=r"00002-of-00003.json and manifest.json count other"):
        EncodedCache(folder)[0]
    change(path, ("names",), ["d", "e", "f"])
    change(path, ("lengths",), {"tokens": [2, 2, 2], "codes": [3, 3, 3]})
    cache = EncodedCache(folder)
    assert cache[2].name == "d"
    for i in (3, 4, -1):
        with pytest.raises(UserError, match=r"encoded-00002-of-00003.array_record is damaged"):
            cache[i]
    with pytest.raises(IndexError):
        cache[5]
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"shards": [], "count": 0}))
    with pytest.raises(UserError, match="is empty"):
        EncodedCache(folder)


@pytest.mark.parametrize(
    ("way", "value"),
    [(("names", 0), "x"), (("lengths", "tokens", 0), 2), (("lengths", "codes", 0), 1)],
)
def test_examples_that_are_not_those_of_the_index_are_refused(folder, way, value):
    change(folder / "encoded-00000-of-00003.json", way, value)
    cache = EncodedCache(folder)
    with pytest.raises(UserError, match=r"damaged \(ValueError: example 0 is not what its index"):
        cache[0]
    assert cache[1].name == "c"


@pytest.mark.parametrize("shape", [(2, 2), (5,), (), (None, 2)])
def test_arrays_of_another_shape_than_the_schemas_are_refused(shape):
    made = video("a", 1).to_bytes(SCHEMA)
    with pytest.raises(UserError, match=r"latents of a is \(4,\), the schema says"):
        Example.from_bytes(made, SCHEMA | {"latents": Spec("float32", shape)})
    with pytest.raises(UserError, match=r"damaged .*cannot reshape|damaged .*buffer"):
        Example.from_bytes(made, SCHEMA | {"latents": Spec("float64", (4,))})


@pytest.mark.parametrize(
    "info",
    [
        *({"name": 3}, {"captions": "a"}, {"captions": [3]}, {"source": None}, {"more": 1}),
        *({"captions": ["x" * 2**20, "y"]}, {"name": None}),
    ],
)
def test_what_an_example_says_of_itself_is_looked_at(monkeypatch, info):
    with monkeypatch.context() as patch:
        dumps = json.dumps
        patch.setattr(json, "dumps", lambda held: dumps(held | info))
        made = video("a", 1).to_bytes(SCHEMA)
    with pytest.raises(UserError, match=r"is damaged|have more than 1,048,576"):
        Example.from_bytes(made, SCHEMA)


def test_records_that_unpack_to_far_more_are_not_unpacked(folder, monkeypatch):
    path = encoded_cache.shard_path(folder, 0, 3)
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd")
    writer.write(bytes(100_000))
    writer.write(b"x")
    writer.close()
    change(folder / "manifest.json", ("shards", 0, "bytes"), path.stat().st_size)
    with pytest.raises(UserError, match="a record of the cache is damaged"):
        EncodedCache(folder)[0]
    monkeypatch.setattr(array_record, "_LIGHT", 1000)
    with pytest.raises(UserError, match=r"00000-of-00003.array_record is damaged .*unpack to far"):
        EncodedCache(folder)[0]
    assert EncodedCache(folder)[2].name == "d"

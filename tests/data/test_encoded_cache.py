"""The cache of encoded examples: what is written is read, and what is damaged is refused."""

import dataclasses
import json
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest

from dicode_jax.data import encoded_cache
from dicode_jax.data.encoded_cache import Broken, EncodedCache, Example, Spec
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
        *((("shards", 0, "file"), "../x.array_record"), (("shards", 0, "file"), 3)),
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

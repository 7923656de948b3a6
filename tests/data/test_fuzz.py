"""Whatever files of a cache, a model or a vocabulary say, they are read, or one line says why."""

import json
import pathlib
import shutil
import struct
import tempfile

import numpy as np
import pytest
from fuzzing import dumped, ends_well, mutated, tree, weird
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dicode_jax.data import encoded_cache
from dicode_jax.data.encoded_cache import Broken, EncodedCache, Example, Spec
from dicode_jax.storage import weights
from dicode_jax.storage.folders import new_folder
from dicode_jax.text.gpt import TextTokenizer
from dicode_jax.training.logs import read_metrics

OLD = pathlib.Path(__file__).parents[1] / "old_models"
ABOUT = {"encoder": "a" * 64, "settings": {"frame_size": 8, "data": {"path": "p"}}}
SCHEMA = {"tokens": Spec("float32", (None, 2)), "fs": Spec("int32", ())}
FILES = ("manifest.json", "encode.json", "encoded-00000-of-00002.json")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache of today, and one of the last release."""
    folder = tmp_path_factory.mktemp("caches") / "new"
    encoded_cache.write_plan(folder, ABOUT)
    for i in range(2):
        arrays = {"tokens": np.zeros((i + 1, 2), np.float32), "fs": np.int32(i)}
        examples = [Example(name=f"v{i}", arrays=arrays), Broken(f"b{i}", "cut")]
        path = encoded_cache.shard_path(folder, i, 2)
        encoded_cache.write_shard(path, examples, SCHEMA, {"files": str(i)})
    encoded_cache.write_manifest(folder, 2, SCHEMA)
    return [folder, OLD / "token_cache"]


@given(data=st.data())
def test_caches_are_read_or_refused(caches, data):
    folder = data.draw(st.sampled_from(caches))
    with tempfile.TemporaryDirectory() as name:
        copy = pathlib.Path(shutil.copytree(folder, f"{name}/cache"))
        files = sorted(copy.glob("*.json"))
        file = data.draw(st.sampled_from(files))
        text = dumped(data.draw(mutated(json.loads(file.read_text())))).encode()
        file.write_bytes(data.draw(st.sampled_from([text] * 9 + [text[:-9], b"\xff"])))
        before = tree(name)

        def use():
            cache = EncodedCache(copy)
            for i in range(min(len(cache), 3)):
                ends_well(cache.__getitem__, i)
            ends_well(lambda: cache.names)
            ends_well(lambda: cache.broken)
            for array in cache.schema:
                ends_well(cache.lengths, array)
            ends_well(cache.verify)
            return True

        event("read" if ends_well(use) else "refused")
        ends_well(encoded_cache.changes, copy, ABOUT)
        ends_well(encoded_cache.stale, {encoded_cache.shard_path(copy, 0, 2): {"files": "0"}})
        assert tree(name) == before
        ends_well(encoded_cache.write_manifest, copy, 2, SCHEMA)


@given(data=st.data(), damage=st.tuples(st.floats(0, 1), st.integers(0, 255)) | st.none())
def test_weights_are_read_or_refused(data, damage):
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "model.safetensors"
        save_file({"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.int8)}, path)
        held = path.read_bytes()
        size = struct.unpack("<Q", held[:8])[0]
        header = data.draw(mutated(json.loads(held[8 : 8 + size])))
        try:
            text = dumped(header).encode()
        except UnicodeEncodeError:
            return
        made = bytearray(struct.pack("<Q", len(text)) + text + held[8 + size :])
        if damage is not None:
            made[min(int(damage[0] * len(made)), len(made) - 1)] = damage[1]
        path.write_bytes(made)
        ends_well(weights.read_header, path)
        ends_well(weights.read_arrays, path, on_host=True)
        ends_well(weights.read_metadata, name)


@given(added=weird | st.dictionaries(st.text(max_size=4), weird, max_size=3))
def test_added_tokens_are_read_or_refused(added):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        letters = {"a": 0, "b": 1, "<|endoftext|>": 2}
        (folder / "vocab.json").write_text(json.dumps(letters))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "added_tokens.json").write_text(dumped(added))
        ends_well(TextTokenizer.from_file, folder)


@given(data=st.data())
def test_marks_of_folders_never_let_go_of_what_is_not_ours(data):
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name) / "out"
        with new_folder(out) as folder:
            (folder / "sub").mkdir()
            (folder / "sub/a").write_text("old")
        (out / "precious").write_text("mine")
        mark = out / ".dicode_jax"
        mark.write_text(dumped(data.draw(mutated(json.loads(mark.read_text())))))
        before = tree(name)

        def write():
            with new_folder(out, overwrite=True) as folder:
                (folder / "a").write_text("new")

        ends_well(write)
        assert tree(name) == before


@given(lines=st.lists(weird.map(dumped) | st.text(max_size=5) | st.just('{"step": 1}'), max_size=5))
def test_logs_of_any_lines_are_read(lines):
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "metrics.jsonl"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        ends_well(read_metrics, path)

"""Encoding a data set: the right tokens, the same bytes after a kill, and several processes."""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny import random_module

from dicode_jax import config as config_lib
from dicode_jax.data.clips import read_keyframes
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import Broken, EncodedCache
from dicode_jax.data.sources.open import open_source
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.clip import CLIPVisionConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.storage import weights
from train import encode
from train.encode import EncodeOptions

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = DeepTokenizerConfig(
    vision=CLIPVisionConfig(
        image_size=16, patch_size=8, embed_dim=12, num_layers=1, num_heads=2, output_dim=None
    ),
    resampler=ResamplerConfig(
        dim=8, depth=1, head_dim=4, num_heads=2, num_queries=3, embed_dim=12, output_dim=8
    ),
    preprocess="plain",
)
MODEL = DiCoDeLMConfig(
    body=GPT2Config(num_layers=1, num_heads=1, embed_dim=4, max_seq_len=99, vocab_size=300),
    num_tokens=3,
    token_dim=8,
    max_keyframes=4,
    image_token_id=1,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def tokenizer():
    return random_module(lambda: DeepTokenizer(TOKENIZER, rngs=ShapeRngs()))


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    weights.save_module(folder / "tokenizer", tokenizer, TOKENIZER)
    return ARTrainConfig(
        model=MODEL, tokenizer=str(folder), num_keyframes=2, frame_size=16, batch_size=5, seed=3
    )


def write_config(config, folder):
    """A config file that gives this config back."""
    config_lib.to_json(config, folder / "config.json")
    path = folder / "config.py"
    path.write_text(
        "from dicode_jax.config import from_json\n"
        "from dicode_jax.stages.dicode.configs import ARTrainConfig\n"
        f"get_config = lambda: from_json(ARTrainConfig, {str(folder / 'config.json')!r})\n"
    )
    return path


def start(config_file, *args, devices=1):
    command = [sys.executable, "-m", "train.encode", "--config", str(config_file), *map(str, args)]
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    cache = str(pathlib.Path(config_file).parent / "compiled")
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": cache}
    env = {name: value for name, value in os.environ.items() if name != "DICODE_CHECK_SHAPES"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env | own, **pipes)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.slow
def test_tokens_are_those_of_the_tokenizer_whatever_shares_a_batch(config, tokenizer, tmp_path):
    encode.encode(config, EncodeOptions(out=tmp_path / "c", limit=7, shard_size=4))
    cache = EncodedCache(tmp_path / "c")
    source = open_source(config.data, split="train", seed=3)
    assert len(cache) == 7
    for i in range(7):
        record, video = source.record(i), cache[i]
        assert (video.name, video.captions) == (record.name, record.captions)
        frames = read_keyframes(record, config.data, 16, np.random.default_rng(0), 2)
        wanted = tokenizer(to_float(frames["keyframes"])[None])[0]
        np.testing.assert_allclose(
            video.arrays["tokens"].astype(np.float32), wanted, rtol=2**-8, atol=1e-5
        )
        assert video.arrays["times"].tolist() == [0.0, 2.0]


def test_videos_keep_their_order_and_their_tokens_across_full_batches():
    sizes = [3, 0, 1, 9, 2]  # 0: broken
    calls = []

    def fake(frames):
        calls.append(len(frames))
        return frames[:, 0, :1, :] * 2

    def videos():
        first = 1
        for i, size in enumerate(sizes):
            info = {"name": f"v{i}", "captions": [], "source": ""}
            frames = np.broadcast_to(
                np.arange(first, first + size)[:, None, None, None], (size, 2, 2, 3)
            )
            yield (info, frames, np.arange(size)) if size else Broken(f"v{i}", "bad")
            first += size

    found = list(encode.with_arrays(videos(), fake, 4, "tokens"))
    assert [video.name for video in found] == ["v0", "v1", "v2", "v3", "v4"]
    assert isinstance(found[1], Broken)
    values = [t for v in found if not isinstance(v, Broken) for t in v.arrays["tokens"][:, 0, 0]]
    assert values == [2 * i for i in range(1, 16)]
    assert calls == [4, 4, 4, 4]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(config, tmp_path):
    out, limit, size = tmp_path / "killed", 600, 10
    file = write_config(config, tmp_path)
    process = start(file, "--out", out, "--limit", limit, "--shard-size", size)
    deadline = time.monotonic() + 100
    while len(list(out.glob("encoded-*.json"))) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("encoded-*.json")}
    assert 2 <= len(kept) < limit // size
    assert not (out / "manifest.json").exists()
    (out / f".{next(iter(kept)).stem}-00000000.array_record").touch()  # always one, by chance or so

    options = EncodeOptions(out=out, limit=limit, shard_size=size)
    encode.encode(config, options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    encode.encode(config, dataclasses.replace(options, out=tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.multi_device
def test_two_processes_make_the_cache_that_one_makes(config, tmp_path):
    config = dataclasses.replace(config, batch_size=6)
    file, out = write_config(config, tmp_path), tmp_path / "two"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    args = ["--out", out, "--limit", 10, "--shard-size", 4, "--coordinator", address]
    processes = [
        start(file, *args, "--num-processes", 2, "--process-id", i, devices=2) for i in range(2)
    ]
    output = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert ["10 videos, 20 keyframes" in text for text in output] == [True, False]
    encode.encode(config, EncodeOptions(out=tmp_path / "one", limit=10, shard_size=4))
    two, one = EncodedCache(out), EncodedCache(tmp_path / "one")
    assert two.names == one.names
    for i in range(10):  # to one step of bfloat16: other devices may round another way
        a, b = (cache[i].arrays["tokens"].astype(np.float32) for cache in (two, one))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5)


def test_broken_videos_are_named_and_can_be_mended(config, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, value in (("a", 10), ("b", 90), ("c", 200)):
        Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("grey\n")
    good = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(good[:40])
    # Configs that are meant for training on a cache say so.
    config = dataclasses.replace(config, data=DataConfig(path=str(folder), kind="cache"))
    options = EncodeOptions(out=tmp_path / "c", shard_size=2)
    with pytest.raises(
        UserError, match=r"1 of 3 videos are broken, more than max_broken=0.1 .*b\.png"
    ):
        encode.encode(config, options)
    assert not (tmp_path / "c/manifest.json").exists()

    lenient = dataclasses.replace(config.data, max_broken=0.5)
    assert encode.encode(dataclasses.replace(config, data=lenient), options)["broken"] == 1
    cache = EncodedCache(options.out)
    assert (cache.names, list(cache.broken)) == (["a.png", "c.png"], ["b.png"])
    assert cache[0].captions == ("grey",)
    assert cache[0].arrays["tokens"].shape == (1, 3, 8)

    (folder / "b.png").write_bytes(good)
    assert encode.encode(config, dataclasses.replace(options, retry_broken=True))["broken"] == 0
    assert EncodedCache(options.out).names == ["a.png", "b.png", "c.png"]


def test_videos_and_captions_that_have_changed_since_are_named(config, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    config = dataclasses.replace(config, data=DataConfig(path=str(folder)))
    options = EncodeOptions(out=tmp_path / "c", shard_size=2)
    manifest = encode.encode(config, options)
    assert encode.encode(config, options) == manifest
    (folder / "2.txt").write_text("grey\n")
    with pytest.raises(UserError, match=r"^captions have changed since 1 of the shards .*00001-of"):
        encode.encode(config, options)
    os.utime(folder / "0.png", ns=(1, 1))
    with pytest.raises(UserError, match=r"^captions and files have changed since 2 of the shards"):
        encode.encode(config, options)
    for path in (*options.out.glob("*.array_record"), options.out / "manifest.json"):
        path.unlink()  # as it said
    assert encode.encode(config, options)["data"] != manifest["data"]
    assert EncodedCache(options.out)[2].captions == ("grey",)


def test_a_cache_of_the_last_release_is_known_again(config, tmp_path, monkeypatch):
    out = tmp_path / "c"
    shutil.copytree(ROOT / "tests/old_models/token_cache", out)
    before = contents(out)
    encoder = json.loads(before["encode.json"])["tokenizer"]
    monkeypatch.setattr(weights, "hash_module", lambda folder: encoder)
    options = EncodeOptions(out=out, limit=3, shard_size=4)
    assert encode.encode(config, options)["count"] == 3
    assert contents(out) == before
    with pytest.raises(UserError, match=r"another cache \(settings\.seed 3 -> 4\); take another"):
        encode.encode(dataclasses.replace(config, seed=4), options)
    (out / "manifest.json").unlink()  # as if it had been stopped
    assert encode.encode(config, options)["encoder"] == encoder
    assert encode.encode(config, options)["schema"]["tokens"]["shape"] == [None, 3, 8]


def test_what_does_not_belong_together_is_refused_on_one_line(config, tmp_path):
    options = EncodeOptions(out=tmp_path / "c", limit=2)
    with pytest.raises(UserError, match="never ends: say how many videos with --limit"):
        encode.encode(config, dataclasses.replace(options, limit=None))
    encode.claim(options.out, {"encoder": "x", "settings": {"seed": 1, "data": {"path": "p"}}})
    with pytest.raises(UserError, match=r"another cache \(.*path p -> shapes.*seed 1 -> 3; "):
        encode.encode(config, options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    with pytest.raises(UserError, match="not empty and holds no cache"):
        encode.encode(config, dataclasses.replace(options, out=tmp_path / "full"))
    with pytest.raises(UserError, match="cannot write to"):
        encode.encode(config, dataclasses.replace(options, out=tmp_path / "full/thesis.txt/c"))
    assert json.loads((options.out / "encode.json").read_text())["encoder"] == "x"


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("text", ['{"mine": 1}', "{", "[]", '{"settings": 3}'])
def test_a_plan_that_is_none_of_ours_is_left_alone(config, tmp_path, text):
    (tmp_path / "encode.json").write_text(text)
    before = files(tmp_path)
    for retry in (False, True):
        options = EncodeOptions(out=tmp_path, limit=2, retry_broken=retry)
        with pytest.raises(UserError, match=r"encode\.json is not of a cache"):
            encode.encode(config, options)
    assert files(tmp_path) == before


def test_files_of_others_in_a_cache_stay(config, tmp_path):
    out = tmp_path / "c"
    options = EncodeOptions(out=out, limit=2, shard_size=2)
    encode.encode(config, options)
    others = [
        "notes.txt",
        ".encoded-00000-of-00001-notes",
        ".encoded-00000-of-00001-ab.array_record",
    ]
    for name in others:
        (out / name).write_text("mine")
    (out / ".encoded-00000-of-00001-0123abcd.array_record").write_text("of a kill")
    (out / "encoded-00000-of-00001.json").unlink()
    (out / "manifest.json").unlink()
    encode.encode(config, options)
    assert [(out / name).read_text() for name in others] == ["mine"] * 3
    assert not list(out.glob(".*-0123abcd.*"))
    (out / "manifest.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is of the kind None"):
        encode.encode(config, dataclasses.replace(options, retry_broken=True))
    assert (out / "manifest.json").read_text() == '{"mine": 1}'


def test_a_refused_second_run_changes_nothing(config, tmp_path):
    out = tmp_path / "c"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process does
        before = files(out)
        with pytest.raises(UserError, match="another run is at work"):
            encode.encode(config, EncodeOptions(out=out, limit=2))
        assert files(out) == before

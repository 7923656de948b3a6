"""Examples that are encoded once, read from disk afterwards, and know what they were made of."""

import dataclasses
import functools
import itertools
import os
import types

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import tiny_pipeline

from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.stream import RecordExamples
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.stages.dicode import examples as lm_examples
from dicode_jax.stages.dicode.configs import ARTrainConfig, TokenizerTrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from train import ar, cache, data, tokenizer

COUNT = 7  # of five pictures, two at a time, four to a part


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 2


def save_encoder(folder, value):
    module = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), state)
    weights.save_module(folder, nnx.merge(graph, state), Sizes())


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data set, an encoder and the folder of a run."""
    monkeypatch.setattr(cache, "SHARD_BATCHES", 2)
    (tmp_path / "data").mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / f"data/{i}.png")
        (tmp_path / f"data/{i}.txt").write_text(f"picture {i}\n")
    save_encoder(tmp_path / "encoder", 1.0)
    return tmp_path


def read(record, _):
    number = int(record.name.removesuffix(".png"))
    return {"number": np.int32(number), "caption": np.int32(len(record.captions[0]))}


def encode(batch, calls):
    calls.append(len(batch["number"]))
    x = batch["number"][:, None] * np.ones(3) + 0.5
    return {"half": x.astype(np.float32), "text_ids": batch["caption"]}


def batches(root, *, captions=True, encode=encode, count=COUNT, **settings):
    """The batches of a run, and how many examples were encoded for it."""
    shapes = {"half": ((3,), np.float16), "text_ids": ((), np.int32)}
    if not captions:
        shapes.pop("text_ids")
    config = types.SimpleNamespace(
        data=DataConfig(path=str(root / "data"), validation=0.0),
        seed=1,
        frame_size=8,
        batch_size=1,
        sharding=ShardingConfig(),
    )
    stage = types.SimpleNamespace(
        name="tiny",
        config=config,
        batch_shapes=lambda b: {
            name: jax.ShapeDtypeStruct((b, *shape), dtype)
            for name, (shape, dtype) in shapes.items()
        },
    )
    source, calls = open_source(config.data), []
    found = cache.cached_batches(
        root / "run",
        stage,
        RecordExamples(source, read),
        functools.partial(encode, calls=calls),
        source=source,
        count=count,
        together=2,
        encoder=[root / "encoder"],
        settings=settings,
    )
    return found, sum(calls)


def test_batches_are_of_the_first_examples_in_the_types_of_the_stage(root):
    stream, encoded = batches(root)
    assert encoded == COUNT + 1  # whole batches are encoded
    seen = [next(stream) for _ in range(COUNT)]
    stream.close()
    names = [str(batch["ids"][0]) for batch in seen]
    assert sorted(set(names)) == [f"{i}.png" for i in range(5)]
    for name, batch in zip(names, seen, strict=True):
        assert (batch["half"].dtype, batch["half"].shape) == (np.float16, (1, 3))
        np.testing.assert_array_equal(batch["half"], int(name[0]) + 0.5)
        assert (batch["text_ids"].dtype, batch["text_ids"].tolist()) == (np.int32, [9])
    held = EncodedCache(root / "run/encoded")
    assert len(held) == COUNT
    assert held.manifest["settings"]["run"] == "tiny"


def test_nothing_is_encoded_again_while_nothing_changes(root, capsys):
    batches(root)
    os.utime(root / "data/3.txt")  # a caption is known by its words
    stream, encoded = batches(root)
    assert encoded == 0
    assert next(stream)["half"].shape == (1, 3)
    stream.close()
    assert not capsys.readouterr().out


def change_file(root):
    Image.fromarray(np.full((8, 9, 3), 1, np.uint8)).save(root / "data/3.png")


def touch_file(root):
    os.utime(root / "data/3.png", ns=(1, 1))  # other pixels of as many bytes


CHANGES = {
    "captions": lambda root: (root / "data/3.txt").write_text("another picture\n"),
    "files": change_file,
    "files of the same size": touch_file,
    "settings.records 5 -> 4": lambda root: (root / "data/3.png").unlink(),
    "encoder": lambda root: save_encoder(root / "encoder", 2.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named_and_encoded_anew(root, capsys, what):
    batches(root)
    CHANGES[what](root)
    stream, encoded = batches(root)
    stream.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert what.split(" of ")[0] in line
    assert "made anew" in line
    assert 0 < encoded <= COUNT + 1
    assert batches(root)[1] == 0
    held = EncodedCache(root / "run/encoded")
    names = {held.names[i]: held[i].arrays["text_ids"] for i in range(len(held))}
    if what == "captions":
        assert names["3.png"] == len("another picture")


def test_other_settings_or_another_number_make_everything_anew(root, capsys):
    batches(root, text="a")
    assert batches(root, text="b")[1] == COUNT + 1
    assert "is made anew: settings.text a -> b" in capsys.readouterr().out
    assert batches(root, text="b", count=4)[1] == 4
    assert "settings.examples 7 -> 4" in capsys.readouterr().out
    assert len(list((root / "run/encoded").glob("encoded-*.array_record"))) == 1


def test_only_the_part_that_has_changed_is_encoded_anew(root, capsys):
    batches(root)
    held = EncodedCache(root / "run/encoded")
    parts = [set(held.names[:4]), set(held.names[4:])]
    (once, *_) = sorted(parts[0] ^ parts[1])
    (root / f"data/{once.removesuffix('.png')}.txt").write_text("new\n")
    assert batches(root)[1] == 4
    assert "captions have changed; 1 of 2 parts are made anew" in capsys.readouterr().out


def test_captions_that_no_example_holds_do_not_matter(root, capsys):
    batches(root, captions=False)
    CHANGES["captions"](root)
    assert batches(root, captions=False)[1] == 0
    assert not capsys.readouterr().out


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(root):
    batches(root)
    folder = root / "run/encoded"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.rename(root / "whole")
    counter = itertools.count()

    def die(batch, calls):
        if next(counter) == 2:
            raise KeyboardInterrupt
        return encode(batch, calls)

    with pytest.raises(KeyboardInterrupt):
        batches(root, encode=die)
    assert len(list(folder.glob("encoded-*.json"))) == 1
    assert not (folder / "manifest.json").exists()
    assert batches(root)[1] == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_torn_part_is_made_anew(root):
    batches(root)
    path = next((root / "run/encoded").glob("*.array_record"))
    path.write_bytes(path.read_bytes()[:-1])
    assert batches(root)[1] == 4


def test_things_of_others_are_left_alone(root):
    (root / "run/encoded").mkdir(parents=True)
    (root / "run/encoded/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"encoded is where this run keeps .*; move what is there"):
        batches(root)
    (root / "run/encoded/thesis.txt").rename(root / "run/encoded/encode.json")
    with pytest.raises(UserError, match=r"encode\.json is not of a cache"):
        batches(root)
    (root / "run/encoded/encode.json").write_text('{"encoder": "x", "settings": {"seed": 1}}')
    with pytest.raises(UserError, match="move what is there"):
        batches(root)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def retrain(pipe, folder, part):
    module = getattr(pipe, part)
    graph, state = nnx.split(module)
    other = nnx.merge(graph, jax.tree.map(lambda x: 1.25 * x, state))
    weights.save_module(folder / part, other, module.cfg)


def test_cached_videos_notice_a_tokenizer_that_was_trained_again(root, pipe, capsys):
    pipe.save_pretrained(root / "model")
    config = ARTrainConfig(
        model=pipe.language_model.cfg,
        tokenizer=str(root / "model"),
        data=DataConfig(path=str(root / "data"), validation=0.0, resize="crop"),
        text_length=14,
        num_keyframes=2,
        frame_size=16,
        batch_size=2,
        cached_videos=3,
    )
    for i in range(5):
        (root / f"data/{i}.txt").write_text("a red circle\n")
    stage = build_stage(config)

    def tokens():
        examples = lm_examples.open_examples(config, pipe.text)
        stream = ar.cached_videos(stage, examples, ar.Encode(config), root / "run")
        batch = next(stream)
        stream.close()
        for name, x in stage.batch_shapes(2).items():
            assert (batch[name].dtype, batch[name].shape) == (x.dtype, x.shape)
        return batch["tokens"]

    first = tokens()
    np.testing.assert_array_equal(tokens(), first)
    assert not capsys.readouterr().out
    retrain(pipe, root / "model", "tokenizer")
    assert not np.array_equal(tokens(), first)
    assert "is made anew: encoder " in capsys.readouterr().out


@pytest.mark.slow
def test_cached_clips_hold_what_the_frozen_parts_make(root, pipe, capsys):
    pipe.save_pretrained(root / "model")
    config = TokenizerTrainConfig(
        tokenizer=pipe.tokenizer.cfg,
        decoder=pipe.decoder.cfg,
        init=str(root / "model"),
        data=DataConfig(num_frames=4, resize="crop"),
        frame_size=16,
        batch_size=2,
        cached_clips=3,
    )
    stage = build_stage(config)

    def latents():
        reader = tokenizer.ClipReader(data=config.data, frame_size=16, fs=config.fs)
        splits = data.open_splits(config, reader)
        encode = tokenizer.clip_encoder(config)
        stream = tokenizer.cached_clips(stage, splits.train, root / "run", encode)
        batch = next(stream)
        stream.close()
        for name, x in stage.batch_shapes(2).items():
            assert (batch[name].dtype, batch[name].shape) == (x.dtype, x.shape)
        return batch["latents"]

    first = latents()
    retrain(pipe, root / "model", "decoder")
    assert not np.array_equal(latents(), first)
    assert "is made anew: encoder " in capsys.readouterr().out

    # Posteriors of held-out clips are not drawn from either: their spread would be in the loss.
    held_out = tokenizer.build(config, root / "run").evaluate._read()
    assert held_out[0].keys() == stage.batch_shapes(2).keys()
    decoder = weights.load_module(root / "model/decoder", ClipDecoder, ClipDecoderConfig)[0]
    reader = tokenizer.ClipReader(data=config.data, frame_size=16, fs=config.fs)
    splits = data.open_splits(config, reader)
    video = to_float(data.held_out_examples(config, splits.held_out, 2)["video"])
    wanted = decoder.autoencoder.encode_latents(video, per_frame=True)
    np.testing.assert_allclose(held_out[0]["latents"], wanted, atol=1e-5)

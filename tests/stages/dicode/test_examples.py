"""Examples of the language model: from videos, from a token cache, and packed."""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from media_files import greys, number_of, write_tar
from PIL import Image

from dicode_jax.data import encoded_cache
from dicode_jax.data import shapes_world as synthetic
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import Example, Spec
from dicode_jax.data.examples import VideosToEncode
from dicode_jax.data.records import in_validation, name_hash
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.data.sources.array_record import pack, write_shard
from dicode_jax.data.sources.open import open_source
from dicode_jax.data.stream import stream_examples
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.stages.dicode import examples as lm_examples
from dicode_jax.stages.dicode import language_model
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.dicode.packing import pack_row
from dicode_jax.text.gpt import train_small

TEXT = train_small(all_captions())
N, Z, L, K = 2, 3, 6, 3
COUNT = 40
SCHEMA = {"tokens": Spec("bfloat16", (None, N, Z))}
CAPTIONS = ("a red circle", "a blue square")


def keyframes_of(i):
    return 1 + i % 5


def tokens_of(i):
    """Tokens that say whose they are and where they stand."""
    tokens = np.full((keyframes_of(i), N, Z), i, np.float32)
    tokens[..., 0] = np.arange(keyframes_of(i))[:, None]
    return tokens.astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    videos = [
        Example(
            name=f"v{i}",
            captions=CAPTIONS[: i % 3],  # none, one or two
            source="",
            arrays={"tokens": tokens_of(i)},
        )
        for i in range(COUNT)
    ]
    for shard in range(2):
        path = encoded_cache.shard_path(folder, shard, 2)
        encoded_cache.write_shard(path, videos[shard::2], SCHEMA, {})
    encoded_cache.write_plan(folder, {"encoder": "abc", "settings": {"data": {"path": "clips"}}})
    encoded_cache.write_manifest(folder, 2, SCHEMA)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    model = DiCoDeLMConfig(
        body=GPT2Config(
            num_layers=1, num_heads=1, embed_dim=4, max_seq_len=40, vocab_size=TEXT.vocab_size
        ),
        num_tokens=N,
        token_dim=Z,
        max_keyframes=4,
        image_token_id=TEXT.image_start_id,
        pad_token_id=TEXT.pad_id,
    )
    return ARTrainConfig(
        model=model,
        data=DataConfig(path=str(folder), validation=0.2),
        text_length=L,
        num_keyframes=K,
        batch_size=4,
        frame_size=16,
    )


def ids(caption):
    return TEXT.encode(caption, L).ids[0].tolist()


@pytest.mark.filterwarnings("ignore:captions of more than")
def test_a_cache_of_the_last_release_is_read(config):
    old = pathlib.Path(__file__).parents[2] / "old_models/token_cache"
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_tokens=3, token_dim=8),
        data=DataConfig(path=str(old), validation=0.0),
        num_keyframes=2,
    )
    for packed in (False, True):
        opened = dataclasses.replace(config, packed=packed)
        examples = lm_examples.open_examples(opened, TEXT)
        example = examples(0, np.random.default_rng(0))
        assert example["tokens"].shape[1:] == (3, 8)
        assert example["tokens"].dtype == ml_dtypes.bfloat16
        assert "shapes/train/3/" in examples.name(0)


def test_splits_of_a_cache_go_by_names_and_share_nothing(config):
    found = {
        split: [e.name(i) for i in range(len(e))]
        for split in ("train", "validation", "all")
        for e in [lm_examples.open_examples(config, TEXT, split=split)]
    }
    names = [f"v{i}" for i in [*range(0, COUNT, 2), *range(1, COUNT, 2)]]
    held_out = in_validation([name_hash(name) for name in names], 0.2)
    assert 0 < held_out.sum() < COUNT / 2
    assert found["all"] == names
    assert found["validation"] == [n for n, out in zip(names, held_out, strict=True) if out]
    assert found["train"] == [n for n, out in zip(names, held_out, strict=True) if not out]


def numbers(examples):
    """Which pictures of `data_set_with_aliases` these are, by what they show or as tokens tell."""
    found = [examples(i, np.random.default_rng(0)) for i in range(len(examples))]
    if "tokens" in found[0]:
        return {int(example["tokens"][0, 0, 1]) for example in found}
    return {int(number_of(example["keyframes"][0])) for example in found}


def data_set_with_aliases(root, form):
    """Twenty pictures, which a table or links also call by other names; what to open."""
    root.mkdir()
    names, data = [f"{i}.png" for i in range(20)], []
    for name, grey in zip(names, greys(20), strict=True):
        Image.fromarray(grey).save(root / name)
        data.append((root / name).read_bytes())
    if form == "folder":
        for i in range(0, 20, 2):
            (root / f"-{i}.png").symlink_to(f"{i}.png")
        return root
    if form == "table":
        rows = [f"{dot}{name},c" for dot in ("./", "", f"{root}/") for name in names]
        (root / "t.csv").write_text("path,caption\n" + "\n".join(rows))
        return root / "t.csv"
    if form == "tar":
        write_tar(root / "s.tar", [(f"./{name}", x) for name, x in zip(names, data, strict=True)])
        return root / "s.tar"
    packed = [pack(name, [], ".png", x) for name, x in zip(names, data, strict=True)]
    write_shard(root / "x.array_record", packed)
    return root / "x.array_record"


@pytest.mark.parametrize("form", ["folder", "table", "tar", "array_record"])
def test_a_cache_has_the_sides_of_its_data_set(config, tmp_path, monkeypatch, form):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = data_set_with_aliases(tmp_path / "data", form)
    data = DataConfig(path=str(path), validation=0.3, clip_start="start")
    source = open_source(data, split="all")
    read = lm_examples.KeyframeReader(data=data, frame_size=16, num_keyframes=1)
    to_encode = VideosToEncode(source=source, indices=np.arange(len(source)), read=read, seed=0)
    videos = []
    for i in range(len(source)):
        example = to_encode(i, np.random.default_rng(0))
        tokens = np.full((1, N, Z), number_of(example["frames"][0])).astype(ml_dtypes.bfloat16)
        info = json.loads(str(example["info"]))
        videos.append(Example(**info, arrays={"tokens": tokens}))
    assert len({video.name for video in videos}) == len(videos) == 20
    cache = tmp_path / "cache"
    encoded_cache.write_plan(cache, {"encoder": "abc", "settings": {"data": {"path": str(path)}}})
    encoded_cache.write_shard(encoded_cache.shard_path(cache, 0, 1), videos, SCHEMA, {})
    encoded_cache.write_manifest(cache, 1, SCHEMA)
    found = {}
    for where in (path, cache):
        opened = dataclasses.replace(config, data=dataclasses.replace(data, path=str(where)))
        for split in ("train", "validation"):
            found[where, split] = numbers(lm_examples.open_examples(opened, TEXT, split=split))
        assert not found[where, "train"] & found[where, "validation"]
        assert found[where, "validation"]
    assert found[cache, "train"] == found[path, "train"]
    assert found[cache, "validation"] == found[path, "validation"]


@pytest.mark.parametrize("start", ["random", "center", "start"])
def test_a_cached_video_gives_keyframes_in_a_row_and_a_mask(config, start):
    data = dataclasses.replace(config.data, clip_start=start)
    examples = lm_examples.open_examples(dataclasses.replace(config, data=data), TEXT, split="all")
    rng = np.random.default_rng(0)
    places = set()
    for index in [*range(COUNT)] * 3:
        i = int(examples.name(index)[1:])
        example = examples(index, rng)
        held = keyframes_of(i)
        assert example["tokens"].shape == (K, N, Z)
        assert example["tokens"].dtype == ml_dtypes.bfloat16
        assert example["frame_mask"].tolist() == [j < held for j in range(K)]
        shown = example["tokens"][example["frame_mask"]]
        assert (shown[..., 1:] == i).all()
        place = int(shown[0, 0, 0])
        assert (shown[..., 0] == place + np.arange(len(shown))[:, None]).all()
        assert not example["tokens"][~example["frame_mask"]].any()
        if held == 5:
            places.add(place)
    assert places == {"random": {0, 1, 2}, "center": {1}, "start": {0}}[start]


def test_captions_are_dropped_and_chosen_in_training_only(config):
    config = dataclasses.replace(config, caption_dropout=0.3)
    seen = {"train": [], "validation": []}
    for split, found in seen.items():
        examples = lm_examples.open_examples(config, TEXT, split=split)
        index = next(i for i in range(len(examples)) if int(examples.name(i)[1:]) % 3 == 2)
        rng = np.random.default_rng(0)
        found += [tuple(examples(index, rng)["text_ids"]) for _ in range(1000)]
    empty, first, second = (tuple(ids(text)) for text in ("", *CAPTIONS))
    assert set(seen["validation"]) == {first}
    shares = [seen["train"].count(text) / 1000 for text in (empty, first, second)]
    np.testing.assert_allclose(shares, [0.3, 0.35, 0.35], atol=0.05)  # 1000 draws
    assert sum(shares) == 1


def test_dropping_captions_changes_nothing_else(config):
    kept, dropped = (
        lm_examples.open_examples(dataclasses.replace(config, caption_dropout=share), TEXT)
        for share in (0.0, 0.9)
    )
    for index in range(len(kept)):
        one, other = (e(index, np.random.default_rng(index)) for e in (kept, dropped))
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_packed_rows_hold_every_video_once_as_it_is_alone(config):
    config = dataclasses.replace(config, packed=True, num_keyframes=4)
    packed = lm_examples.open_examples(config, TEXT)
    alone = lm_examples.open_examples(dataclasses.replace(config, packed=False), TEXT)
    numbers = {alone.name(i): i for i in range(len(alone))}
    rows = [packed.name(row).split(" + ") for row in range(len(packed))]
    assert sorted(name for row in rows for name in row) == sorted(numbers)
    assert max(map(len, rows)) > 1
    for row, names in enumerate(rows):
        got = packed(row, _AlwaysTheSame())
        texts, tokens = zip(*(alone.read(numbers[n], _AlwaysTheSame()) for n in names), strict=True)
        sizes = {"row_length": 40, "max_frames": (40 - L) // (N + 1)}
        wanted = pack_row(texts, tokens, **sizes, image_id=TEXT.image_start_id, pad_id=TEXT.pad_id)
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name])


class _AlwaysTheSame:
    """A generator whose draws do not depend on what was drawn before."""

    def uniform(self, size):
        return np.full(size, 0.6)

    def integers(self, high):
        return high - 1


def test_batches_go_on_where_they_stopped_whatever_makes_them(config):
    config = dataclasses.replace(config, packed=True)

    def batches(workers=0):
        data = dataclasses.replace(config.data, num_workers=workers)
        changed = dataclasses.replace(config, data=data)
        examples = lm_examples.open_examples(changed, TEXT)
        options = {"process_index": 0, "process_count": 1, "batch_size": 2, "seed": config.seed}
        return stream_examples(examples, data, **options)

    straight = batches()
    wanted = [next(straight) for _ in range(6)]
    state = None
    stream = batches()
    for _ in range(3):
        next(stream)
    state = stream.state()
    resumed = batches(workers=1)
    resumed.restore(state)
    try:
        for want in wanted[3:]:
            got = next(resumed)
            assert got["ids"].tolist() == want["ids"].tolist()
            for name in want:
                np.testing.assert_array_equal(got[name], want[name])
            assert got["tokens"].dtype == ml_dtypes.bfloat16
    finally:
        resumed.close()


@pytest.mark.filterwarnings("ignore:captions of more than")
def test_videos_of_the_world_come_as_keyframes_with_their_caption(config):
    config = dataclasses.replace(config, data=DataConfig())
    examples = lm_examples.open_examples(config, TEXT, split="validation")
    example = examples(7, np.random.default_rng(0))
    assert example["keyframes"].shape == (K, 16, 16, 3)
    assert example["keyframes"].dtype == np.uint8
    assert example["frame_mask"].all()
    assert example["text_ids"].tolist() == ids(examples.source.record(7).captions[0])
    other = dataclasses.replace(config, seed=config.seed + 1)
    for split, world in (("train", "train"), ("validation", "test")):  # held-out combinations
        for run in (config, other):
            examples = lm_examples.open_examples(run, TEXT, split=split)
            scene = synthetic.scene_at(run.seed, 7, world)
            assert examples.source.record(7).captions == (scene.caption,)


def test_what_does_not_fit_is_refused_on_one_line(config, tmp_path):
    with pytest.raises(UserError, match="num_keyframes is 5, the model knows 4"):
        lm_examples.open_examples(dataclasses.replace(config, num_keyframes=5), TEXT)
    videos = dataclasses.replace(config, data=DataConfig(), packed=True)
    with pytest.raises(UserError, match=r"encode them first \(python -m train\.encode\)"):
        lm_examples.open_examples(videos, TEXT)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, token_dim=Z + 1))
    with pytest.raises(UserError, match="2 tokens of width 3 per keyframe, the model reads 2 of"):
        lm_examples.open_examples(wider, TEXT)
    encoded_cache.write_plan(tmp_path, {})
    encoded_cache.shard_path(tmp_path, 0, 2).touch()
    begun = dataclasses.replace(config, data=DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="is not finished: run train"):
        lm_examples.open_examples(begun, TEXT)
    record = types.SimpleNamespace(name="odd.mp4", captions=("été 7",))
    captions = lm_examples.Captions(tokenizer=TEXT, length=L)
    with pytest.raises(UserError, match=r"the caption of odd\.mp4: .* never seen: '7'"):
        captions(record.name, record.captions, np.random.default_rng(0))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_noise_on_inputs_is_measured_on_keyframes_that_are_there(config, packed):
    config = dataclasses.replace(config, packed=packed, input_noise=0.5, num_keyframes=4)
    examples = lm_examples.open_examples(config, TEXT)
    batch = next(stream_examples(examples, config.data, batch_size=4, seed=config.seed))
    batch.pop("ids")
    there = batch["frame_segments"] > 0 if packed else batch["frame_mask"]
    assert not there.all()
    spoilt = np.where(there[..., None, None], batch["tokens"], 1e3).astype(ml_dtypes.bfloat16)
    model = language_model.Reader(config.model, None, rngs=nnx.Rngs(0))
    loss = nnx.jit(functools.partial(language_model.loss_fn, config))
    clean, other = (
        loss(model, batch | {"tokens": tokens}, jax.random.key(0))[0]
        for tokens in (batch["tokens"], spoilt)
    )
    np.testing.assert_allclose(clean, other, rtol=1e-6)


def test_captions_that_are_cut_are_spoken_of_in_the_same_words_each_time():
    captions = lm_examples.Captions(tokenizer=TEXT, length=4)
    rng = np.random.default_rng(0)
    captions("a", ("a red circle",), rng)
    for name in "ab":
        with pytest.warns(UserWarning, match=r"^captions of more than 4 tokens are cut there \("):
            captions(name, (f"{name} red circle " * 3,), rng)

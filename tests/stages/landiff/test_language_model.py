"""LanDiff's language model learns: rows and what counts of them, packed or not, cached or not."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module
from tiny_landiff_training import LM, LM_CONFIG, write_cache

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.errors import UserError
from dicode_jax.nn.masks import causal_mask
from dicode_jax.nn.rngs import ShapeRngs, blank
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.landiff import language_model
from dicode_jax.stages.landiff.sequences import Learned, Rows, lay_row, open_rows
from dicode_jax.stages.registry import build_stage
from dicode_jax.training.setup import prepare
from dicode_jax.training.stage import WEIGHT

CONFIGS = pathlib.Path(__file__).parents[3] / "configs" / "landiff"
PACKED = dataclasses.replace(LM_CONFIG, row_samples=3)
RNG = np.random.default_rng(0)
SEQUENCES = [
    Learned(
        text=RNG.integers(3, 40, length).astype(np.int32),
        codes=RNG.integers(0, 9, LM.frames.count(frames)),
        num_frames=frames,
        motion_score=0.1 * frames,
        given=given,
    )
    for length, frames, given in ((5, 4, 0), (9, 6, 3), (2, 1, 0))
]
START_I, END_I, START_P, END_P = (
    LM.mark(name) for name in ("start_iframe", "end_iframe", "start_pframe", "end_pframe")
)


def row(config, *sequences):
    laid = lay_row(
        config.model,
        sequences,
        row_length=config.positions,
        row_samples=config.row_samples,
        text_length=config.text_length,
    )
    return {name: jnp.asarray(x)[None] for name, x in laid.items()}


@pytest.fixture(scope="module")
def model():
    return random_module(lambda: language_model.Writer(LM_CONFIG, rngs=ShapeRngs()))


@nnx.jit(static_argnums=(0,))
def run(config, model, batch):
    return language_model.loss_fn(config, model, batch, jax.random.key(0), deterministic=True)


@nnx.jit(static_argnums=(0, 4))
def embed(config, model, batch, keys=None, deterministic=True):
    keys = jax.random.key(0) if keys is None else keys
    return language_model.embed(config, model, batch, keys, deterministic=deterministic)


def test_a_row_of_one_is_what_the_model_lays_out_and_what_is_given_does_not_count(model):
    config, lm = dataclasses.replace(LM_CONFIG, text=None), model.lm
    text = RNG.normal(size=(5, 12)).astype(np.float32)
    alone = dataclasses.replace(SEQUENCES[0], text=text)
    made = row(config, alone)
    want = nnx.jit(type(lm).lay_out)(
        lm,
        jnp.asarray(text)[None],
        jnp.asarray(alone.codes)[None],
        motion_score=jnp.asarray([alone.motion_score]),
    )
    t = want.tokens.shape[1]
    x = embed(config, Holder(lm), made)
    np.testing.assert_allclose(x[:, :t], want.features, atol=1e-6)
    np.testing.assert_array_equal(made["tokens"][:, :t], want.tokens)
    np.testing.assert_array_equal(made["is_learned"][:, :t], want.is_learned)
    assert not made["is_learned"][:, t:].any()
    late = row(LM_CONFIG, SEQUENCES[1])
    learned = late["tokens"][0][late["is_learned"][0]].tolist()
    assert learned[0] == START_I
    assert learned == [
        START_I, *SEQUENCES[1].codes[8:12], END_I, START_P, *SEQUENCES[1].codes[12:14], END_P,
        START_P, *SEQUENCES[1].codes[14:], END_P, LM.mark("eos"),
    ]  # fmt: skip


class Holder(nnx.Module):
    def __init__(self, lm):
        self.lm, self.text = lm, None


def test_packed_sequences_have_the_losses_that_they_have_alone(model):
    alone = [run(LM_CONFIG, model, row(LM_CONFIG, x)) for x in SEQUENCES]
    together = run(PACKED, model, row(PACKED, *SEQUENCES))
    counts = np.array([float(metrics[WEIGHT]) for _, metrics in alone])
    assert counts.tolist() == [4 * 2 + 8 + 4 + 1, 14 + 1, 7]  # tokens from START_I on
    want = (np.array([float(loss) for loss, _ in alone]) * counts).sum() / counts.sum()
    np.testing.assert_allclose(together[0], want, rtol=1e-5)
    np.testing.assert_allclose(together[1][WEIGHT], counts.sum())
    iframes = np.array([8, 4, 4])  # codes of I frames that count
    want = sum(float(m["iframe"]) * n for (_, m), n in zip(alone, iframes)) / 16
    np.testing.assert_allclose(together[1]["iframe"], want, rtol=1e-5)
    one_video = row(PACKED, SEQUENCES[0])
    np.testing.assert_allclose(run(PACKED, model, one_video)[0], alone[0][0], rtol=1e-5)


def test_the_loss_is_that_of_tokens_written_one_by_one_with_a_cache(model):
    """The uncached forward that is trained, against the cached one that writes."""
    batch = row(PACKED, *SEQUENCES[:2])
    (at,) = np.nonzero(np.asarray(batch["segment_ids"][0]) == 2)
    x = embed(PACKED, model, batch)[:, at]
    body, cache = model.lm.body, model.lm.body.init_cache(batch=1, size=len(at))
    graph, state = nnx.split(body)

    @jax.jit
    def step(cache, x):
        body = nnx.merge(graph, state)
        hidden, cache = body(x, None, causal_mask(1, len(at), offset=cache.length), cache)
        return cache, jax.nn.log_softmax(body.logits(hidden)[0, 0])

    found = []
    for i in range(len(at) - 1):
        cache, scores = step(cache, x[:, i : i + 1])
        found.append(scores)
    target, learned = batch["tokens"][0, at[1:]], np.asarray(batch["is_learned"])[0, at[1:]]
    written = -np.take_along_axis(np.stack(found), np.maximum(target, 0)[:, None], 1)[learned]
    alone = run(LM_CONFIG, model, row(LM_CONFIG, SEQUENCES[1]))[0]
    np.testing.assert_allclose(written.mean(), alone, rtol=1e-5)
    assert written.std() > 0.1


def test_texts_are_dropped_by_their_share_and_each_sequence_for_itself(model):
    config = dataclasses.replace(PACKED, text_dropout=0.4)
    batch = row(config, *SEQUENCES[:2])
    keys = jax.random.split(jax.random.key(0), 400)
    many = jax.tree.map(lambda x: jnp.repeat(x, 400, axis=0), batch)
    x = np.asarray(embed(config, model, many, keys, False))
    null = np.asarray(model.lm.null_text[...])
    begin = int(np.flatnonzero(np.asarray(batch["segment_ids"][0]) == 2)[0])
    dropped = np.stack([(np.abs(x[:, at + 3] - null) < 1e-6).all(-1) for at in (0, begin)])
    np.testing.assert_allclose(dropped.mean(1), 0.4, atol=0.07)
    assert 0.1 < (dropped[0] & dropped[1]).mean() < 0.22  # independent: 0.16
    np.testing.assert_array_equal(x[:, :3], np.broadcast_to(x[:1, :3], (400, 3, 16)))
    kept = np.asarray(embed(config, model, batch))
    assert not (np.abs(kept[:, 3] - null) < 1e-6).all()


def rows_of(folder, **changes):
    config = dataclasses.replace(LM_CONFIG, data=write_cache(folder), **changes)
    config = language_model.settle(config)
    return open_rows(config, language_model.read_words(config), "train")


def test_sequences_begin_where_they_may_and_end_anywhere(tmp_path):
    rows = rows_of(tmp_path / "a", cut_share=0.4, late_share=0.5, motion_scale=3.0)
    assert rows.config.text.vocab_size == max(40, rows.words.vocab_size)
    rng = np.random.default_rng(1)
    read = [[rows.read(i, rng) for _ in range(60)] for i in range(3)]
    given = [{x.given for x in found} for found in read]
    assert given == [{0}, {0}, {0, 3}]  # the others have no whole window behind their first segment
    video = rows.cache[2].arrays["codes"]
    late = [x for x in read[2] if x.given]
    assert {x.num_frames for x in late} == {6}
    assert all((x.codes == video[8:24]).all() for x in late)
    np.testing.assert_allclose([x.motion_score for x in late], 3 * np.mean([4, 5, 6, 7, 8]) / 100)
    assert {x.num_frames for x in read[0]} == {1, 2, 3, 4, 5, 6}
    held = Rows(**{**vars_of(rows), "is_train": False})
    assert {held.read(0, rng).num_frames for _ in range(9)} == {6}
    assert held.read(1, rng).num_frames == 4


def vars_of(rows):
    return {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}


def test_packed_rows_hold_every_video_once(tmp_path):
    rows = rows_of(tmp_path / "a", row_samples=2)
    names = [rows.name(i) for i in range(len(rows))]
    assert sorted(" + ".join(names).split(" + ")) == ["0.mp4", "1.mp4", "2.mp4"]
    found = rows(0, np.random.default_rng(0))
    assert set(found["segment_ids"]) == {0, 1, 2}
    shapes = build_stage(rows.config).batch_shapes(1)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape[1:], x.dtype) for n, x in shapes.items()
    }


def test_frozen_features_are_read_as_they_are(tmp_path):
    data = write_cache(tmp_path / "c", text=(("lm_text", 12),))
    config = dataclasses.replace(LM_CONFIG, data=data, text=None, text_length=6)
    rows = open_rows(language_model.settle(config), None, "train")
    with pytest.warns(UserWarning, match="captions of more than 6 ids are cut there"):
        texts = [rows.read(i, RNG).text for i in range(3)]
    assert [len(text) for text in texts] == [5, 6, 6]
    whole = [rows.cache[int(i)].arrays["lm_text"] for i in rows.videos]
    np.testing.assert_array_equal(texts[2][:5], whole[2][:5])
    np.testing.assert_array_equal(texts[2][5], whole[2][-1])  # the end of text stays
    shapes = build_stage(config).batch_shapes(1)
    found = rows(0, RNG)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape[1:], x.dtype) for n, x in shapes.items()
    }


def test_it_learns_with_its_text_encoder_and_goes_on_from_what_it_wrote(tmp_path):
    config = dataclasses.replace(
        language_model.settle(dataclasses.replace(LM_CONFIG, data=write_cache(tmp_path / "c"))),
        ema_decay=0.5,
    )
    rows = open_rows(config, language_model.read_words(config), "train")
    batch = [rows(i, RNG) for i in range(3)]
    batch = {name: np.stack([x[name] for x in batch]) for name in batch[0]}
    stage = build_stage(config)
    prepared = prepare(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))
    first = np.array(prepared.model_of(prepared.state).text.token_embed.embedding[...])
    state, losses = prepared.state, []
    for _ in range(20):
        state, metrics = prepared.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    written = prepared.model_of(state)
    assert np.abs(written.text.token_embed.embedding[...] - first).max() > 1e-3
    stage.export(written, tmp_path / "model")
    again = dataclasses.replace(config, init=str(tmp_path / "model"))
    loaded = build_stage(again).load()
    want = dict(nnx.to_flat_state(nnx.state(written)))
    assert loaded.keys() == want.keys()
    for path, x in loaded.items():
        np.testing.assert_array_equal(x, want[path][...], path)
    frames = dataclasses.replace(LM.frames, iframe=LM.frames.iframe + 1)
    longer = dataclasses.replace(again, model=dataclasses.replace(LM, frames=frames))
    assert build_stage(longer).load().keys() == want.keys()  # of which no array speaks
    other = dataclasses.replace(again, model=dataclasses.replace(LM, micro_dim=7))
    with pytest.raises(UserError, match="language_model holds a model of other sizes"):
        build_stage(other).load()
    assert language_model.read_words(again).vocab_size == rows.words.vocab_size


def test_caches_that_do_not_fit_are_refused(tmp_path):
    data = write_cache(tmp_path / "a", tokenizer="b" * 64)
    config = dataclasses.replace(LM_CONFIG, data=data)
    frozen = dataclasses.replace(config, text=None)
    with pytest.raises(UserError, match="holds no lm_text: encode the videos again"):
        open_rows(frozen, None, "train")
    words = language_model.read_words(config)
    with pytest.raises(UserError, match="no tokenizer and no semantic_tokenizer in nowhere"):
        open_rows(dataclasses.replace(config, semantic_tokenizer="nowhere"), words, "train")
    narrow = dataclasses.replace(
        LM, body=dataclasses.replace(LM.body, vocab_size=11), codebook_size=4
    )
    rows = open_rows(dataclasses.replace(config, model=narrow), words, "train")
    with pytest.raises(UserError, match=r"0\.mp4 has codes of a larger codebook than the model's"):
        rows(0, RNG)
    with pytest.raises(UserError, match="shapes is no cache"):
        language_model.settle(dataclasses.replace(config, data=DataConfig()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_dropout": 1.0}, "text_dropout must be in"),
        ({"late_share": 0.5, "segments": 1}, "late_share needs a second segment"),
        ({"segments": 9}, "9 segments behind 14 text tokens are 144 positions; the body has 100"),
        ({"row_length": 30}, "a row 30"),
        ({"row_samples": 0}, "at least 1"),
        ({"motion_scale": 0.0}, "motion_scale must be positive"),
        ({"model": dataclasses.replace(LM, text_dim=13)}, "12 numbers, model.text_dim is 13"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LM_CONFIG, **changes)


def test_a_config_survives_json():
    again = config_lib.from_dict(type(PACKED), config_lib.to_dict(PACKED))
    assert again == PACKED


@pytest.mark.parametrize(
    ("name", "parameters", "positions"),
    [("shapes_lm", None, 434), ("released_lm", 2_049_321_984, 1504)],
)
def test_configs_have_their_sizes(name, parameters, positions):
    config = config_lib.load_config_file(CONFIGS / f"{name}.py")
    stage = build_stage(config)
    model = blank(stage.create)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert count == (parameters or count)
    assert count < 2.4e6 or parameters
    assert stage.batch_shapes(2)["tokens"].shape == (2, positions)
    assert config_lib.from_dict(type(config), config_lib.to_dict(config)) == config
    words = language_model.read_words(config)
    if words is not None:
        assert max(len(words(caption, 99)) for caption in all_captions()) <= config.text_length

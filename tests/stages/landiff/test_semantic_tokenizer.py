"""Training of the semantic tokenizer: how codes start and live on, resume, files, refusals."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_landiff_training import TOKENIZER_CONFIG, TOWER

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.data.sources.shapes import ShapesSource, frame_labels
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.clip import CLIPVision
from dicode_jax.models.landiff.features import encoder_config, features_of, load_encoder
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.models.vit import ViT, ViTConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.landiff import semantic_tokenizer
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.setup import prepare
from dicode_jax.training.stage import STATISTICS

FOLDER = pathlib.Path(__file__).parents[3] / "configs" / "landiff"
CONFIG, MODEL = TOKENIZER_CONFIG, TOKENIZER_CONFIG.model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    weights.save_module(folder, CLIPVision(TOWER, rngs=nnx.Rngs(1)), TOWER)
    return dataclasses.replace(CONFIG, features=str(folder))


def batch(step=0, size=8):
    rng = np.random.default_rng((3, step))
    return {"video": jnp.asarray(rng.integers(0, 255, (size, 9, 8, 8, 3)).astype(np.uint8))}


@pytest.fixture(scope="module")
def run(config):
    """Six steps: the books before and behind each, metrics, and the last state."""
    prepared = prepare(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))
    state, books, metrics = prepared.state, [], []
    for step in range(6):
        books.append(jax.device_get(prepared.model_of(state).codebook))
        state, found = prepared.train_step(state, batch(step % 2))
        metrics.append({name: float(x) for name, x in found.items()})
    books.append(jax.device_get(prepared.model_of(state).codebook))
    return prepared, state, books, metrics


@pytest.mark.parametrize(("name", "count"), [("released", 174_543_888), ("shapes", 1_307_280)])
def test_a_config_survives_json_and_names_the_model(name, count, tmp_path):
    config = config_lib.load_config_file(FOLDER / f"{name}_tokenizer.py")
    assert config_lib.from_dict(type(config), config_lib.to_dict(config)) == config
    if config.features is not None:
        config_lib.to_json(ViTConfig(), tmp_path / "config.json")
        config = dataclasses.replace(config, features=str(tmp_path))
    model = blank(build_stage(config).create)
    found = sum(x.size for x in jax.tree.leaves(nnx.state(model.tokenizer)))
    assert found == count


def test_codes_start_by_k_means_and_do_not_collapse_at_the_second_step(run):
    _, _, books, metrics = run
    assert not books[0].counts.any()
    assert metrics[0]["commitment"] == 0
    started = books[1]
    assert (started.counts >= CONFIG.revive_below).all()
    np.testing.assert_allclose(started.sums, started.codes * started.counts[:, None], rtol=1e-4)
    second = books[2]
    assert np.linalg.norm(second.codes) > 0.5 * np.linalg.norm(started.codes)
    assert len(np.unique(np.round(second.codes, 4), axis=0)) == MODEL.codebook_size
    for found in metrics[2:]:
        assert found["perplexity"] > 2
        assert found["commitment"] > 0


def test_codes_move_by_the_average_of_what_the_batch_sent_them(config, run):
    """The third step's, from the vectors that the model before it makes, in float64."""
    prepared, *_ = run
    state = prepare(build_stage(config), prepared.mesh).state
    for step in range(2):
        state, _ = prepared.train_step(state, batch(step % 2))
    model = prepared.model_of(state)
    book = jax.device_get(model.codebook)
    _, metrics = jax.jit(
        lambda state, b: semantic_tokenizer.loss_fn(
            config, nnx.merge(nnx.split(model)[0], state), b, jax.random.split(jax.random.key(0), 8)
        )
    )(nnx.split(model)[1], batch(0))
    found = jax.device_get(metrics[STATISTICS])
    x = np.asarray(found["vectors"], np.float64).reshape(-1, 4)
    ids = found["ids"].reshape(-1)
    counts = 0.8 * book.counts + 0.2 * np.bincount(ids, minlength=8)
    sums = 0.8 * book.sums
    np.add.at(sums, ids, 0.2 * x)
    state, _ = prepared.train_step(state, batch(0))
    after = jax.device_get(prepared.model_of(state).codebook)
    alive = counts >= config.revive_below
    assert alive.any()
    np.testing.assert_allclose(after.counts[alive], counts[alive], rtol=1e-5)
    np.testing.assert_allclose(after.codes[alive], (sums / counts[:, None])[alive], rtol=1e-3)
    np.testing.assert_array_equal(after.counts[~alive], config.revive_below)


def test_parts_of_a_batch_give_the_codes_of_all_of_it(config, run):
    """K-means, averages and revival are of all rows, in whatever parts they are worked off."""
    prepared, _, books, _ = run
    optim = dataclasses.replace(config.optim, accumulate_steps=2)
    split = prepare(build_stage(dataclasses.replace(config, optim=optim)), prepared.mesh)
    state = split.state
    for step in range(2):
        state, _ = split.train_step(state, batch(step % 2))
    got = jax.device_get(split.model_of(state).codebook)
    for name in ("codes", "counts", "sums"):
        np.testing.assert_allclose(getattr(got, name), getattr(books[2], name), atol=1e-4)


def test_the_loss_falls_and_only_the_tokenizer_learns(run):
    _, state, _, metrics = run
    assert metrics[-1]["mse"] < metrics[1]["mse"]
    paths = {path[0] for path, _ in nnx.to_flat_state(state.params)}
    assert paths == {"tokenizer", "counts", "sums"}


def test_what_is_written_reads_videos_as_the_run_did_and_can_be_gone_on_from(config, run, tmp_path):
    prepared, state, books, _ = run
    model = prepared.model_of(state)
    build_stage(config).export(model, tmp_path)
    encoder = load_encoder(tmp_path / "features")
    tokenizer, cfg = weights.load_module(
        tmp_path / "tokenizer", SemanticTokenizer, SemanticTokenizerConfig
    )
    assert cfg == MODEL
    video = to_float(batch(7, 1)["video"])
    codes = tokenizer.encode(features_of(encoder, video))
    want = model.tokenizer.encode(features_of(model.encoder, video))
    np.testing.assert_array_equal(codes, want)
    again = dataclasses.replace(config, init=str(tmp_path), features=str(tmp_path / "features"))
    loaded = build_stage(again).load()
    np.testing.assert_array_equal(loaded["tokenizer", "quantizer", "codes"], books[-1].codes)
    assert (loaded[("counts",)] >= config.revive_below).all()  # so that none is revived at once
    np.testing.assert_allclose(
        loaded[("sums",)], books[-1].codes * loaded[("counts",)][:, None], rtol=1e-6
    )
    # More tokens for a frame stand behind those that are known.
    frames = MODEL.frames
    more = dataclasses.replace(frames, iframe=frames.iframe + 50, pframe=frames.pframe + 1)
    wider = dataclasses.replace(again, model=dataclasses.replace(MODEL, frames=more))
    grown = build_stage(wider).load()
    for name, count in (("iframe", 50), ("pframe", 1)):
        path = ("tokenizer", "encoder", f"{name}_queries")
        np.testing.assert_array_equal(grown[path][:-count], loaded[path])
        assert len(np.unique(grown[path], axis=0)) == len(loaded[path]) + count
    drawn = grown["tokenizer", "encoder", "iframe_queries"][-50:]
    known = loaded["tokenizer", "encoder", "iframe_queries"]
    np.testing.assert_allclose(drawn.std(), np.std(known), rtol=0.2)
    prepare(build_stage(wider), make_mesh(ShardingConfig(), jax.devices()[:1]))
    for name, value in (("pframe", frames.pframe - 1), ("segment", frames.segment + 1)):
        other = dataclasses.replace(MODEL, frames=dataclasses.replace(frames, **{name: value}))
        with pytest.raises(UserError, match="begin with as many or more"):
            build_stage(dataclasses.replace(again, model=other)).load()


def test_features_are_the_towers_patches_at_mean_zero_and_variance_one():
    tower = CLIPVision(TOWER, rngs=nnx.Rngs(1))
    video = to_float(batch(0, 2)["video"])
    got = jax.jit(lambda v: features_of(tower, v))(video)
    assert got.shape == (2, 3, 2, 2, 6)
    (vectors,) = np.asarray(jax.jit(tower)(video[1, 4][None]), np.float64)
    patch = vectors[1 + 2]  # row 1, column 0, behind the class token
    want = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-5)
    np.testing.assert_allclose(got[1, 1, 1, 0], want, atol=1e-4)


def test_the_packaged_tower_is_found_in_its_tokenizer():
    folder = semantic_tokenizer.features_folder(CONFIG)
    assert encoder_config(folder).patch_size == 8
    tower = load_encoder(folder, on_host=True)
    stored = weights.read_arrays(folder / "model.safetensors", on_host=True)
    np.testing.assert_array_equal(tower.class_embed[...], stored["vision.class_embed"])


def test_an_encoder_that_does_not_fit_is_refused(config, tmp_path):
    wide = dataclasses.replace(config, model=dataclasses.replace(MODEL, feature_dim=7))
    with pytest.raises(UserError, match=r"gives 2 x 2 features of 6 numbers .* 2 x 2 of 7"):
        build_stage(wide)
    with pytest.raises(UserError, match="takes frames of 8 pixels, the run's are 16 x 16"):
        build_stage(dataclasses.replace(config, frame_size=16))
    config_lib.to_json(MODEL, tmp_path / "config.json")
    with pytest.raises(UserError, match="holds landiff_semantic_tokenizer: features of frames"):
        build_stage(dataclasses.replace(config, features=str(tmp_path)))
    vit = ViTConfig(image_size=8, patch_size=4, embed_dim=6, num_layers=1, num_heads=1, mlp_dim=5)
    weights.save_module(tmp_path / "vit", ViT(vit, rngs=nnx.Rngs(0)), vit)
    fits = dataclasses.replace(config, features=str(tmp_path / "vit"), frame_size=8)
    build_stage(fits)
    # Pixels that fill no patch are left out of the features, and have no part to be read from.
    odd = dataclasses.replace(fits, frame_width=10)
    build_stage(odd)
    for name in ("patch_weight", "detail_weight"):
        with pytest.raises(UserError, match="of, 8 x 8 of the frames of 8 x 10: change"):
            build_stage(dataclasses.replace(odd, **{name: 1.0}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": DataConfig(num_frames=8)}, r"4k \+ 1 frames"),
        ({"data": DataConfig(num_frames=13)}, "1 to 3 semantic frames, a segment; got 4"),
        ({"ema_decay": 0.9}, "ema_decay must be 0"),
        ({"code_decay": 1.0}, r"code_decay must be in \[0, 1\), got 1.0"),
        ({"kmeans_rounds": 0}, "kmeans_rounds must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_probes_teach_what_scenes_show_and_are_not_exported(config, tmp_path):
    config = dataclasses.replace(config, probe_weight=5.0, optim=OptimConfig(lr=2e-2))
    prepared = prepare(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))
    read = semantic_tokenizer.reader(config)
    source = ShapesSource(seed=0, split="train")
    records = [source.record(i) for i in range(8)]
    clips = [read(record, np.random.default_rng(0)) for record in records]
    known = {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}
    np.testing.assert_array_equal(known["labels"][3], frame_labels(records[3].media))
    state, told = prepared.state, []
    for _ in range(60):
        state, found = prepared.train_step(state, known)
        told.append({name: float(x) for name, x in found.items()})
    assert told[-1]["probe_loss"] < 0.9 * told[0]["probe_loss"]
    without = dataclasses.replace(config, probe_weight=0.0)
    plain = prepare(build_stage(without), prepared.mesh)
    _, found = plain.train_step(plain.state, {"video": known["video"]})
    mse = told[0]["loss"] - told[0]["commitment"] - 5 * told[0]["probe_loss"]
    np.testing.assert_allclose(float(found["loss"]), mse, rtol=1e-5)
    build_stage(config).export(prepared.model_of(state), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "tokenizer"]


def test_probes_of_unknown_videos_are_refused(config, tmp_path):
    data = DataConfig(path=str(tmp_path), kind="folder", num_frames=9)
    with pytest.raises(UserError, match="--probe-weight 0"):
        build_stage(dataclasses.replace(config, data=data, probe_weight=0.1))


def test_patches_are_those_of_the_frames_that_features_are_of(config):
    config = dataclasses.replace(config, patch_weight=2.0)
    prepared = prepare(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))
    model = prepared.model_of(prepared.state)
    video = batch(size=2)["video"]
    keys = jax.random.split(jax.random.key(0), 2)
    loss_of = nnx.jit(functools.partial(semantic_tokenizer.loss_fn, config))
    for layer in (model.patches.kernel, model.patches.bias):
        layer[...] = jnp.zeros_like(layer[...])
    loss, told = loss_of(model, {"video": video}, keys)
    seen = to_float(video[:, ::4])
    np.testing.assert_allclose(told["patches"], jnp.square(seen).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, told["mse"] + told["commitment"] + 2 * told["patches"])
    # One colour for each row and column of a patch, and for each channel: read where it lies.
    corner = jnp.zeros((4, 4, 3)).at[1, 2, 0].set(1.0)
    model.patches.bias[...] = corner.reshape(-1)
    dotted = np.zeros((8, 8, 3))
    dotted[1::4, 2::4, 0] = 1
    wanted = np.square(np.asarray(seen) - dotted).mean()
    np.testing.assert_allclose(
        loss_of(model, {"video": video}, keys)[1]["patches"], wanted, rtol=1e-5
    )


def test_detail_of_a_frame_adds_up_to_as_much_whatever_its_size(config):
    frames = np.zeros((3, 4, 4, 16, 3), np.float32)  # of 4 x 4 parts
    frames[0, 1, 2, :8] = 1.0
    frames[1, 1:3, :, ::2] = -0.5
    got = semantic_tokenizer.detail(jnp.asarray(frames[None]))[0]
    np.testing.assert_allclose(got.mean((1, 2)), (1.0, 1.0, 0.0), atol=1e-6)
    np.testing.assert_allclose(got[0, 1, 2], 16.0)
    np.testing.assert_allclose(got[1], np.repeat([0.0, 2.0, 2.0, 0.0], 4).reshape(4, 4))
    # Where all parts have as much, they count as many times more.
    config = dataclasses.replace(config, patch_weight=2.0, detail_weight=3.0)
    prepared = prepare(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))
    model = prepared.model_of(prepared.state)
    part = np.random.default_rng(0).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    video = jnp.asarray(np.tile(part, (2, 9, 2, 2, 1)))
    loss, told = nnx.jit(functools.partial(semantic_tokenizer.loss_fn, config))(
        model, {"video": video}, jax.random.split(jax.random.key(0), 2)
    )
    want = 4 * (told["mse"] + 2 * told["patches"]) + told["commitment"]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    with pytest.raises(ValueError, match="detail_weight must not be negative"):
        dataclasses.replace(CONFIG, detail_weight=-1.0)

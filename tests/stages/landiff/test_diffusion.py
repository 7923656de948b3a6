"""LanDiff's denoiser learns: what moves when, where a base goes, windows, prefixes, refusals."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_module
from tiny_landiff_training import DIFFUSION_CONFIG, SEMANTIC, TEXT, write_cache

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.dit import Denoiser, make_base
from dicode_jax.models.landiff.semantic import UpsamplerConfig
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer
from dicode_jax.nn.rngs import ShapeRngs, blank
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.landiff import diffusion
from dicode_jax.stages.landiff.windows import open_windows
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.setup import prepare

CONFIGS = pathlib.Path(__file__).parents[3] / "configs" / "landiff"
CONFIG, MODEL = DIFFUSION_CONFIG, DIFFUSION_CONFIG.model
STACKED = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, scan_layers=True))
EVEN = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, num_frames=2))
RNG = np.random.default_rng(0)


def random_batch(config):
    draw = {
        "latents": lambda shape: RNG.normal(size=shape),
        "codes": lambda shape: RNG.integers(0, 9, shape),
        "offset": lambda shape: RNG.integers(0, 3, shape),
        "text": lambda shape: RNG.integers(0, 30, shape) / (1 if len(shape) == 2 else 30),
    }
    shapes = build_stage(config).batch_shapes(3)
    return {n: jnp.asarray(draw[n](x.shape), x.dtype) for n, x in shapes.items()}


def steps(config, count):
    """The arrays of a run before and after each of its first steps."""
    prepared = prepare(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))

    def arrays(state):
        flat = nnx.to_flat_state(nnx.state(prepared.model_of(state)))
        return {path: np.array(x[...]) for path, x in flat}

    found, batch = [arrays(prepared.state)], random_batch(config)
    state = prepared.state
    for _ in range(count):
        state, _ = prepared.train_step(state, batch)
        found.append(arrays(state))
    return found


def moved(before, after):
    return {path for path, x in after.items() if (x != before[path]).any()}


def test_control_starts_as_the_base_and_moves_from_its_zero_layers_inwards(named, tmp_path):
    upsampler = UpsamplerConfig(
        feature_dim=11, channels=(4,), num_res_blocks=1, hidden_dim=4, num_groups=2
    )
    dit = dataclasses.replace(MODEL.dit, height=2, width=4, patch_size=1, num_layers=2)
    small = dataclasses.replace(MODEL, dit=dit, control_layers=1, upsampler=upsampler)
    base = random_module(lambda: Denoiser(small, rngs=ShapeRngs()))
    weights.save_module(tmp_path / "denoiser", base, small)
    config = dataclasses.replace(
        named,
        model=small,
        semantic=dataclasses.replace(SEMANTIC, grid=(2, 4)),
        semantic_tokenizer=None,
        text=None,
        base=str(tmp_path),
        trained="control",
    )
    found = steps(config, 3)
    of_base = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(base.dit))}
    control = ("denoiser", "control")
    for path, x in found[0].items():  # a copy by name
        if path[:3] == (*control, "embed"):
            np.testing.assert_array_equal(x, of_base[path[2:]], str(path))
        if path[:5] == (*control, "blocks", 0, "layer"):
            np.testing.assert_array_equal(x, of_base["lower_blocks", 0, *path[5:]], str(path))
    zero = (*control, "blocks", 0, "zero", "kernel")
    last = {("denoiser", "semantic", "to_latents", name) for name in ("kernel", "bias")}
    assert not any(found[0][path].any() for path in {zero} | last)
    first, second, third = (moved(*pair) for pair in itertools.pairwise(found))
    assert first == {zero}
    assert last <= second
    assert ("denoiser", "semantic", "conv_in", "kernel") not in second
    assert ("denoiser", "semantic", "conv_in", "kernel") in third
    assert all(path[1] in ("control", "semantic") and path[-1] != "positions" for path in third)
    for path, x in of_base.items():
        np.testing.assert_array_equal(found[3]["denoiser", "dit", *path], x, str(path))


def test_drawn_control_has_the_sizes_of_other_layers():
    denoiser = random_module(lambda: Denoiser(STACKED, rngs=ShapeRngs()))
    before = dict(nnx.to_flat_state(nnx.clone(nnx.state(denoiser))))
    diffusion._draw_control(denoiser, nnx.Rngs(0))
    after = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(denoiser))}
    drawn = {path for path, x in after.items() if (x != before[path][...]).any()}
    zeros = {path for path in after if path[-2:] == ("zero", "kernel")}
    assert drawn == zeros | {("semantic", "to_latents", "kernel")}
    for path in zeros:  # uniform within sqrt(6 / 32)
        assert 0.4 < np.abs(after[path]).max() < 0.4331
        assert len(np.unique(after[path])) == after[path].size


@pytest.mark.parametrize(("wanted", "base_alone"), [(MODEL, False), (STACKED, True)])
def test_layers_are_found_however_they_are_kept(models, tmp_path, wanted, base_alone):
    whole = diffusion.denoiser_arrays(models, STACKED)
    state = nnx.state(blank(Denoiser, STACKED))
    leaves = [
        (p, x.replace(jnp.asarray(whole["denoiser", *p]))) for p, x in nnx.to_flat_state(state)
    ]
    graph, _ = nnx.split(blank(Denoiser, STACKED))
    stacked = nnx.merge(graph, nnx.from_flat_state(leaves))
    weights.save_module(tmp_path / "denoiser", stacked, STACKED)
    one, other = (
        diffusion.denoiser_arrays(str(folder), wanted, base_alone=base_alone)
        for folder in (models, tmp_path)
    )
    assert one.keys() == other.keys()
    has_all = {("denoiser", *p) for p, _ in nnx.to_flat_state(nnx.state(blank(Denoiser, wanted)))}
    left_out = {path for path in has_all if path[1] == "semantic" or "zero" in path}
    assert one.keys() == (has_all - left_out if base_alone else has_all)
    for path, x in one.items():
        np.testing.assert_array_equal(x, other[path], str(path))


def test_a_base_may_be_a_transformer_alone(models, tmp_path):
    arrays = diffusion.denoiser_arrays(models, MODEL, base_alone=True)
    cfg = MODEL.dit
    lower = MODEL.control_layers

    def held(path):
        if path[0] == "lower_blocks" and path[1] >= lower:
            path = ("upper_blocks", path[1] - lower, *path[2:])
        return jnp.asarray(arrays["denoiser", "dit", *path])

    graph, state = nnx.split(blank(make_base, cfg))
    leaves = [(path, x.replace(held(path))) for path, x in nnx.to_flat_state(state)]
    base = nnx.merge(graph, nnx.from_flat_state(leaves))
    weights.save_module(tmp_path / "transformer", base, cfg)
    alone = diffusion.denoiser_arrays(str(tmp_path), MODEL, base_alone=True)
    assert alone.keys() == arrays.keys()
    for path, x in arrays.items():
        np.testing.assert_array_equal(alone[path], x, str(path))
    with pytest.raises(UserError, match="no denoiser in"):
        diffusion.denoiser_arrays(str(tmp_path), MODEL)
    other = dataclasses.replace(MODEL, dit=dataclasses.replace(cfg, time_dim=6))
    with pytest.raises(UserError, match="other sizes than the config's: time_dim"):
        diffusion.denoiser_arrays(str(tmp_path), other, base_alone=True)


def test_features_are_those_of_the_windows_frames_across_segments(models, named):
    stage = build_stage(named)
    reader = nnx.eval_shape(lambda: stage.create(ShapeRngs())).codes
    graph, state = nnx.split(reader)
    loaded = stage.load()
    leaves = [(p, x.replace(jnp.asarray(loaded["codes", *p]))) for p, x in nnx.to_flat_state(state)]
    codes = jnp.asarray(RNG.integers(0, 9, (2, 2, 8)))
    read = jax.jit(lambda codes, at: nnx.merge(graph, nnx.from_flat_state(leaves))(codes, at, 3))(
        codes, jnp.array([0, 2])
    )
    tokenizer = weights.load_module(f"{models}/tokenizer", SemanticTokenizer, type(SEMANTIC))[0]
    decode = nnx.jit(lambda tokenizer, codes: tokenizer.decode(codes))
    whole = decode(tokenizer, codes.reshape(4, 8)).reshape(2, 6, 2, 3, 11)
    np.testing.assert_allclose(read[0], whole[0, :3], atol=1e-5)
    np.testing.assert_allclose(read[1], whole[1, 2:5], atol=1e-5)


def windows_of(folder, named, frames=(7, 4, 2), **changes):
    tokenizer = weights.hash_module(f"{named.semantic_tokenizer}/tokenizer")
    data = write_cache(folder, frames, tokenizer=tokenizer)
    config = dataclasses.replace(named, data=data, **changes)
    config = diffusion.settle(config)
    return open_windows(config, diffusion.read_words(config), "train")


def test_windows_start_at_every_step_and_bring_the_segments_they_touch(named, tmp_path):
    windows = windows_of(tmp_path / "c", named)
    assert [windows.name(i) for i in range(len(windows))] == [
        "0.mp4 from latent 0", "0.mp4 from latent 2", "0.mp4 from latent 4", "1.mp4 from latent 0"
    ]  # fmt: skip
    read = [windows(i, RNG) for i in range(4)]
    video = windows.cache[0].arrays
    np.testing.assert_array_equal(read[1]["latents"], video["latents"][2:5])
    np.testing.assert_array_equal(read[1]["codes"].ravel(), video["codes"][:16])
    assert [int(x["offset"]) for x in read] == [0, 2, 1, 0]
    np.testing.assert_array_equal(read[2]["codes"].ravel()[:12], video["codes"][8:])
    short = windows.cache[1].arrays["codes"]  # a segment and a frame
    np.testing.assert_array_equal(read[3]["codes"].ravel()[:12], short)
    assert not read[3]["codes"].ravel()[12:].any()
    ids = windows.words("a red circle moves left on a gray background", 14)
    assert read[0]["text"].tolist() == [*ids, *[windows.words.pad_id] * (14 - len(ids))]
    shapes = build_stage(windows.config).batch_shapes(1)
    assert {n: (x.shape, x.dtype) for n, x in read[1].items()} == {
        n: (x.shape[1:], x.dtype) for n, x in shapes.items()
    }
    first = windows_of(tmp_path / "d", named, window_step=0)
    assert [int(x) for x in first.places[:, 1]] == [0, 0]


def test_what_steers_a_window_is_what_steers_the_whole_video_there(named, tmp_path):
    upsampler = dataclasses.replace(MODEL.upsampler, num_past=2)
    config = dataclasses.replace(
        named, model=dataclasses.replace(MODEL, upsampler=upsampler), control_start="drawn"
    )
    # Windows begin behind less than two frames, at a segment's first frame, and behind it.
    windows = windows_of(tmp_path / "c", config, frames=(7, 2), window_step=1)
    assert [start for _, start in windows.places.tolist()] == [0, 1, 2, 3, 4]
    painter = random_module(lambda: diffusion.Painter(windows.config, rngs=ShapeRngs()))
    read = [windows(i, RNG) for i in range(5)]
    batch = {name: jnp.stack([x[name] for x in read]) for name in read[0]}
    _, made = jax.jit(lambda batch: diffusion.conditions(painter, batch, 3))(batch)
    held = jnp.asarray(windows.cache[0].arrays["codes"], jnp.int32)
    codes = jnp.pad(held, (0, 24 - len(held))).reshape(1, 3, 8)
    features = painter.codes(codes, jnp.array([0]), 7)
    whole = painter.denoiser.semantic_latents(features)[0]
    for start, window in enumerate(made):
        np.testing.assert_allclose(window, whole[start : start + 3], atol=1e-5, err_msg=f"{start}")


class Plain:
    """Stands in for the denoiser: predicts zeros, and notes what it is told."""

    cfg = MODEL

    def semantic_latents(self, features, past):
        return features

    def __call__(self, x, timesteps, context, semantic):
        self.x, self.times, self.context = map(np.asarray, (x, timesteps, context))
        return jnp.zeros_like(x)


class Conditioned:
    def __init__(self):
        self.denoiser = Plain()

    def codes(self, codes, offset, num_frames):
        return jnp.zeros((len(codes), num_frames, 1, 1, 1))

    def context(self, text):
        return jnp.ones((len(text), 2, 3))


def test_prefixes_are_clean_and_do_not_count_and_texts_are_dropped_by_their_share():
    config = dataclasses.replace(CONFIG, num_known=2, prefix_share=0.3, text_dropout=0.2)
    model, b = Conditioned(), 400
    shapes = build_stage(config).batch_shapes(b)
    batch = {n: jnp.zeros(x.shape, x.dtype) for n, x in shapes.items()}
    batch["latents"] += 2.0  # which the noise does not give
    keys = jax.random.split(jax.random.key(0), b)
    loss, metrics = diffusion.loss_fn(config, model, batch, keys)
    seen = model.denoiser
    clean = (seen.x == 2).all((2, 3, 4))
    assert {tuple(row) for row in clean.tolist()} == {(True, True, False), (False,) * 3}
    np.testing.assert_allclose(clean[:, 0].mean(), 0.3, atol=0.07)
    np.testing.assert_allclose((seen.context == 0).all((1, 2)).mean(), 0.2, atol=0.06)
    assert 0 <= seen.times.min() < 30
    assert 970 < seen.times.max() < 1000
    # The error of zeros is v itself, written out anew; the schedule is the release's.
    beta = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    level = np.cumprod(1 - beta)
    a = np.sqrt(level / (3 - 2 * level))
    a = ((a - a[-1]) * a[0] / (a[0] - a[-1]))[seen.times][:, None]
    noisy = seen.x.reshape(b, 3, -1)
    with np.errstate(all="ignore"):
        eps = (noisy - 2 * a[..., None]) / np.sqrt(1 - a[..., None] ** 2)
    v = a[..., None] * eps - 2 * np.sqrt(1 - a[..., None] ** 2)
    of_frames = np.square(v).mean(-1)
    want = np.where(clean[:, 0], of_frames[:, 2:].mean(1), of_frames.mean(1)).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_allclose(metrics["last"], of_frames[:, 2].mean(), rtol=1e-4)
    diffusion.loss_fn(config, model, batch, keys, deterministic=True)
    assert (seen.context == 1).all()


def test_what_is_written_is_gone_on_from(named, tmp_path):
    config = dataclasses.replace(named, control_start="drawn")
    painter = random_module(lambda: diffusion.Painter(config, rngs=ShapeRngs()))
    build_stage(config).export(painter, tmp_path / "model")
    again = dataclasses.replace(config, init=str(tmp_path / "model"))
    loaded, want = build_stage(again).load(), dict(nnx.to_flat_state(nnx.state(painter)))
    assert loaded.keys() == want.keys()
    for path, x in loaded.items():
        if path[0] == "denoiser":
            np.testing.assert_array_equal(x, want[path][...], str(path))
    wider = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, time_dim=6))
    with pytest.raises(UserError, match="other sizes than the config's: time_dim 5, not 6"):
        build_stage(dataclasses.replace(again, model=wider)).load()


def test_beside_a_prior_the_error_is_that_of_the_network_s_own_output():
    cfg = dataclasses.replace(MODEL, semantic_prior=0.2)
    graph, state = nnx.split(random_module(lambda: Denoiser(cfg, rngs=ShapeRngs())))
    state["dit"]["head"]["linear"] = jax.tree.map(jnp.zeros_like, state["dit"]["head"]["linear"])
    denoiser = nnx.merge(graph, state)
    dit, b = cfg.dit, 400
    shape = (b, dit.num_frames, dit.height, dit.width, dit.channels)
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    semantic = draw(0, shape)
    args = (
        draw(1, (b, dit.text_len, dit.text_dim)), semantic, jnp.arange(b) * 2, draw(2, shape),
        jnp.zeros(shape[:2], bool),
    )  # fmt: skip
    errors = {
        std: diffusion.denoising_loss(denoiser, semantic + std * draw(3, shape), *args)[0]
        for std in (0.2, 0.4)
    }
    np.testing.assert_allclose(errors[0.2], 1, rtol=0.02)  # as the prior says
    assert errors[0.4] > 1.5


def test_a_denoiser_that_learns_a_prior_starts_at_what_that_knows(named, models):
    wanted = dataclasses.replace(MODEL, semantic_prior=0.2)
    held, kept = (diffusion.denoiser_arrays(models, cfg) for cfg in (wanted, MODEL))
    last = {("denoiser", *diffusion.LAST_LAYER, name) for name in ("kernel", "bias")}
    assert kept.keys() - held.keys() == last
    config = dataclasses.replace(named, model=wanted, init=models)
    arrays = steps(config, 0)[0]
    assert all(not arrays[path].any() for path in last)


def test_an_upsampler_begins_anew_where_that_is_asked_for(named, models):
    wider = dataclasses.replace(
        MODEL, upsampler=dataclasses.replace(MODEL.upsampler, hidden_dim=13, num_past=1)
    )
    config = dataclasses.replace(named, model=wider, init=models)
    with pytest.raises(UserError, match="other sizes than the config's: upsampler"):
        build_stage(config).load()
    anew = dataclasses.replace(config, init_upsampler=False)
    held, all_of_it = build_stage(anew).load(), build_stage(named).create(ShapeRngs())
    of_denoiser = {path for path in held if path[0] == "denoiser"}
    state = nnx.to_flat_state(nnx.state(all_of_it.denoiser))
    assert of_denoiser == {("denoiser", *path) for path, _ in state if path[0] != "semantic"}
    with pytest.raises(ValueError, match="init_upsampler says what to take of init"):
        dataclasses.replace(named, init_upsampler=False)


def test_an_upsampler_can_learn_alone(named, models):
    alone = dataclasses.replace(named, denoising_weight=0.0, semantic_weight=1.0, init=models)
    before, after = steps(alone, 1)
    learned = moved(before, after)
    assert ("denoiser", "semantic", "conv_in", "kernel") in learned
    assert all(path[:2] == ("denoiser", "semantic") for path in learned)
    painter = random_module(lambda: diffusion.Painter(named, rngs=ShapeRngs()))
    batch, keys = random_batch(named), jax.random.split(jax.random.key(0), 3)
    loss, metrics = diffusion.loss_fn(alone, painter, batch, keys)
    assert metrics.keys() == {"semantic"}
    np.testing.assert_allclose(loss, metrics["semantic"])
    both = [
        diffusion.loss_fn(
            dataclasses.replace(alone, denoising_weight=weight), painter, batch, keys
        )[0]
        for weight in (1.0, 3.0)
    ]
    of_v = diffusion.loss_fn(named, painter, batch, keys)[0]
    np.testing.assert_allclose(both[1] - both[0], 2 * of_v, rtol=1e-4)
    with pytest.raises(ValueError, match="the rest stays as it was drawn"):
        dataclasses.replace(alone, init=None)
    with pytest.raises(ValueError, match="nothing is learned"):
        dataclasses.replace(named, denoising_weight=0.0)


def test_semantic_latents_are_pulled_towards_the_clean_ones_where_that_has_a_weight(named):
    batch, keys = random_batch(named), jax.random.split(jax.random.key(0), 3)
    painter = random_module(lambda: diffusion.Painter(named, rngs=ShapeRngs()))
    plain, metrics = diffusion.loss_fn(named, painter, batch, keys)
    assert "semantic" not in metrics
    pulled, metrics = diffusion.loss_fn(
        dataclasses.replace(named, semantic_weight=0.5), painter, batch, keys
    )
    _, semantic = diffusion.conditions(painter, batch, named.model.dit.num_frames)
    want = np.mean((np.asarray(semantic) - np.asarray(batch["latents"], np.float32)) ** 2)
    np.testing.assert_allclose(metrics["semantic"], want, rtol=1e-5)
    np.testing.assert_allclose(pulled - plain, 0.5 * want, rtol=1e-3)
    with pytest.raises(ValueError, match="semantic_weight must not be negative"):
        dataclasses.replace(named, semantic_weight=-1.0)


def test_detail_of_latents_adds_up_to_as_much_whatever_its_size(named):
    latents = np.full((1, 3, 6, 6, 2), 0.5, np.float32)
    latents[0, 0, 2, 3] = 4.0
    latents[0, 1, :, :3] = -1.0
    got = diffusion.detail(jnp.asarray(latents))[0, ..., 0]
    np.testing.assert_allclose(got.mean((1, 2)), (1, 1, 0), atol=1e-5)
    np.testing.assert_allclose(got[0, 2, 3], 35, rtol=1e-5)  # 36 (35 / 36)**2 of the variance
    np.testing.assert_allclose(got[1], 1, rtol=1e-5)  # both halves are as far from their mean
    # Latents of two values in equal parts: every place counts as many times more.
    batch, keys = random_batch(named), jax.random.split(jax.random.key(0), 3)
    shape = batch["latents"].shape
    halves = np.where(np.arange(shape[-2]) % 2, 1.0, -1.0)[:, None].astype(np.float32)
    batch = batch | {"latents": jnp.asarray(np.broadcast_to(halves, shape))}
    painter = random_module(lambda: diffusion.Painter(named, rngs=ShapeRngs()))
    losses = [
        diffusion.loss_fn(
            dataclasses.replace(named, semantic_weight=0.5, detail_weight=weight),
            painter,
            batch,
            keys,
        )[0]
        for weight in (0.0, 2.0)
    ]
    np.testing.assert_allclose(losses[1], 3 * losses[0], rtol=1e-4)
    with pytest.raises(ValueError, match="detail_weight must not be negative"):
        dataclasses.replace(named, detail_weight=-1.0)


def test_the_first_latents_alone_are_seen_and_learned_where_that_is_asked(named):
    batch, keys = random_batch(named), jax.random.split(jax.random.key(0), 3)
    painter = random_module(lambda: diffusion.Painter(named, rngs=ShapeRngs()))
    config = dataclasses.replace(named, num_latents=1, prefix_share=0.0, semantic_weight=0.5)
    loss, metrics = diffusion.loss_fn(config, painter, batch, keys)
    other = dict(batch, latents=batch["latents"].at[:, 1:].multiply(-2))
    np.testing.assert_array_equal(diffusion.loss_fn(config, painter, other, keys)[0], loss)
    _, semantic = diffusion.conditions(painter, batch, named.model.dit.num_frames)
    errors = np.asarray(semantic)[:, :1] - np.asarray(batch["latents"], np.float32)[:, :1]
    np.testing.assert_allclose(metrics["semantic"], np.mean(errors**2), rtol=1e-5)
    for wrong in (0, named.model.dit.num_frames + 1):
        with pytest.raises(ValueError, match="num_latents must be from 1 to"):
            dataclasses.replace(named, num_latents=wrong)
    with pytest.raises(ValueError, match="something to learn of 1 latents"):
        dataclasses.replace(named, num_latents=1, prefix_share=0.5)


def test_what_does_not_fit_is_said_before_a_run(named, tmp_path, models):
    data = write_cache(tmp_path / "c", tokenizer="b" * 64)
    with pytest.raises(UserError, match="shapes is no cache"):
        diffusion.settle(dataclasses.replace(named, data=DataConfig()))
    with pytest.raises(UserError, match=r"--semantic-tokenizer MODEL[\s\S]*--text-encoder MODEL"):
        diffusion.settle(dataclasses.replace(CONFIG, data=data))
    other = dataclasses.replace(
        MODEL, upsampler=dataclasses.replace(MODEL.upsampler, feature_dim=12)
    )
    mismatched = dataclasses.replace(SEMANTIC, feature_dim=12)
    with pytest.raises(UserError, match=r"tokenizer does not fit the config: features of 2x3x11"):
        diffusion.settle(dataclasses.replace(named, data=data, model=other, semantic=mismatched))
    words = diffusion.read_words(named)
    with pytest.raises(UserError, match=r"made with another tokenizer than .* \(bbbbbbbbbbbb, not"):
        open_windows(dataclasses.replace(named, data=data), words, "train")
    short = write_cache(tmp_path / "s", (2,), tokenizer=weights.hash_module(f"{models}/tokenizer"))
    with pytest.raises(UserError, match="holds no window of 3 latents"):
        open_windows(dataclasses.replace(named, data=short), words, "train")
    wide = write_cache(
        tmp_path / "w", latent=(4, 4, 3), tokenizer=weights.hash_module(f"{models}/tokenizer")
    )
    with pytest.raises(UserError, match=r"latents \(4, 4, 3\), the model's are \(4, 6, 3\)"):
        open_windows(dataclasses.replace(named, data=wide), words, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_known": 3}, "leaves something to learn of 3 latents"),
        ({"num_known": 0}, "above 0 with a prefix_share"),
        ({"prefix_share": 1.5}, "prefix_share must be in"),
        ({"model": EVEN}, "num_frames must be odd, got 2"),
        ({"window_step": -1}, "window_step must not be negative"),
        ({"base": "a", "init": "b"}, "init brings the base too"),
        ({"base": "a", "control_start": "drawn"}, "control that is drawn spoils its base"),
        ({"trained": "control"}, "a base that was never trained cannot stay"),
        ({"text": dataclasses.replace(TEXT, embed_dim=8)}, "vectors of 8 numbers"),
        ({"semantic": dataclasses.replace(SEMANTIC, grid=(2, 2))}, "features of 2x2x11 make"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("name", "trained"),
    [("shapes_diffusion", None), ("released_diffusion", 979_141_968 - 2 * 1920 - 34_129_920)],
)
def test_configs_have_their_sizes(name, trained):
    config = config_lib.load_config_file(CONFIGS / f"{name}.py")
    stage = build_stage(config)
    flat = nnx.to_flat_state(nnx.state(blank(stage.create)))
    count = sum(x.size for path, x in flat if stage.is_trained(path, None))
    assert count == (trained or count)
    assert config_lib.from_dict(type(config), config_lib.to_dict(config)) == config
    if trained:  # without the norm that is not used, and positions
        assert config.segments == 1
    else:
        assert config.segments == 2
        assert (
            config.model.dit.text_dim
            == config_lib.load_config_file(CONFIGS / "shapes_lm.py").model.text_dim
        )

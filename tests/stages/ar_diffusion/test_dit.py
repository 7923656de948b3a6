"""Stage 2 of AR-Diffusion: its configs and loss, what learns, what it reads and writes."""

import ast
import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_training
from flax import nnx
from tiny_ar_diffusion import DIT, VAE, alive

from dicode_jax import config as config_lib
from dicode_jax.data import encoded_cache
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import Example, Spec, shard_path
from dicode_jax.data.records import BrokenRecord
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE
from dicode_jax.nn.rngs import blank
from dicode_jax.pipelines.ar_diffusion import ARDiffusionPipeline
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.ar_diffusion import dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.stages.ar_diffusion.examples import Classes, open_latents
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.setup import plan_stage, prepare

FOLDER = pathlib.Path(__file__).parents[3] / "configs" / "ar_diffusion"
RELEASED = {  # parameters of the original but for the table of positions, which is none here
    "sky_dit": 672_513_796 - 589_824,
    "sky_rope_dit": 671_932_072 - 36,  # but for rotary frequencies
    "taichi_dit": 672_513_796 - 589_824,
    "ucf101_dit": 672_513_796 - 589_824,
    "ucf101_class_dit": 678_486_532 - 589_824,
    "face_dit": 672_513_796 - 589_824,
    "finetune_dit": 672_513_796 - 589_824,
    "sky_ablations": 671_932_072 - 36,
    "sky_full_sequence": 672_513_796 - 589_824,
    **{
        f"{name}_diff_forcing": 672_513_796 - 589_824
        for name in ("sky", "taichi", "ucf101", "face")
    },
}
NAMES = ("red circle", "red cross", "blue circle")
CONFIG = DiTTrainConfig(
    model=DenoiserConfig(dit=DIT, num_classes=3),
    data=DataConfig(path="unused", kind="cache", num_frames=4),
    optim=OptimConfig(lr=3e-3, warmup_steps=0, clip_norm=0.0),
    context_dropout=0.5,
    num_steps=20,
    batch_size=6,
    class_names=NAMES,
    sample_steps=6,
    sample_lag=2,
)
BATCH = {
    "latents": jax.random.normal(jax.random.key(3), (6, 4, 3, 4)),
    "classes": jnp.array([0, 1, 2, 2, 1, 0]),
}


def load(name):
    return config_lib.load_config_file(FOLDER / f"{name}.py")


@functools.cache
def count(model):
    state = nnx.state(blank(Denoiser, model))
    return sum(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", RELEASED)
def test_a_config_survives_json_and_has_the_released_number_of_parameters(name):
    config = load(name)
    assert config_lib.from_dict(type(config), config_lib.to_dict(config)) == config
    plain = dataclasses.replace(config.model.dit, mask="none")  # what has no parameters
    assert (
        count(
            DenoiserConfig(dit=plain, num_classes=config.model.num_classes, null=config.model.null)
        )
        == RELEASED[name]
    )
    assert build_stage(config).batch_shapes(2)["latents"].shape == (2, 16, 32, 4)
    assert not build_stage(config).is_trained(("context",), None)


def test_all_configs_of_the_release_are_there():
    others = {"released_dit", "released_vae", "shapes_dit", "__init__"}
    assert {p.stem for p in FOLDER.glob("*.py") if "_vae" not in p.stem} - others == set(RELEASED)


def test_the_ladder_of_ablations_changes_what_the_release_changes():
    """Each rung of the docstring, through the parser of the command."""
    base = load("sky_ablations")
    text = ast.get_docstring(ast.parse((FOLDER / "sky_ablations.py").read_text()))
    commands = [
        c.split("--workdir ")[1].split() for c in text.replace("\\\n", " ").split("python -m")[1:]
    ]
    found = {}
    for rung, *args in commands:
        config = config_lib.from_args(type(base), args, default=base)
        dit, schedule = config.model.dit, config.model.schedule
        found[rung.removeprefix("runs/")] = (
            config.timesteps, dit.rotary and dit.qk_norm, dit.mask, schedule.parameterization
        )  # fmt: skip
        assert dit.rotary == dit.qk_norm
        assert (schedule.linear_start, schedule.linear_end) == (1e-4, 2e-2)
    causal = "video_temporal_causal"
    assert found == {
        "base": ("fopp", True, causal, "x0"),
        "base-1": ("fopp", False, causal, "x0"),
        "base-2": ("uniform_paths", False, causal, "x0"),
        "base-3": ("uniform_paths", False, "none", "x0"),
        "base-4": ("uniform_paths", False, "none", "x0"),
        "base-5": ("uniform_paths", False, "none", "eps"),
        "base-6": ("independent", False, "none", "eps"),
    }


def paths_of(state):
    return {path for path, _ in nnx.to_flat_state(state)}


class Plain:
    """Stands in for the denoiser: gives its input back, and notes what it is told."""

    cfg = CONFIG.model

    def __init__(self):
        self.classes, self.times, self.x = [], [], np.zeros(())

    def contexts(self, classes):
        self.classes.append(np.asarray(classes))

    def __call__(self, x, timesteps, context):
        self.times.append(np.asarray(timesteps))
        self.x = np.asarray(x)
        return x


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_the_loss_is_the_error_of_unit_tokens_at_the_noise_of_each_frame(kind):
    """Written out anew in NumPy and float64, for both ranges of betas."""
    start, end = (1e-4, 2e-2) if kind == "x0" else (8.5e-4, 1.2e-2)
    schedule = NoiseSchedule(linear_start=start, linear_end=end, parameterization=kind)
    model, rng = Plain(), np.random.default_rng(1)
    model.cfg = dataclasses.replace(CONFIG.model, schedule=schedule)
    times = np.array([[0, 3, 500, 999]] * 6)
    noise = rng.normal(size=(6, 4, 3, 4)).astype(np.float32)
    latents = np.asarray(BATCH["latents"], np.float64)
    x0 = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
    betas = np.linspace(np.sqrt(start), np.sqrt(end), 1000) ** 2
    level = np.cumprod(1 - betas)[times][..., None, None]
    noisy = np.sqrt(level) * x0 + np.sqrt(1 - level) * noise
    v = np.sqrt(level) * noise - np.sqrt(1 - level) * x0
    errors = np.square(noisy - {"x0": x0, "eps": noise, "v": v}[kind]).mean((0, 2, 3))
    loss, metrics = dit.denoising_loss(
        model,
        5 * BATCH["latents"],
        BATCH["classes"],
        jnp.asarray(times),
        jnp.asarray(noise),
        frame_weight_rise=0.5,
    )
    np.testing.assert_allclose(loss, (errors * [1, 1.125, 1.25, 1.375]).mean(), rtol=1e-4)
    np.testing.assert_allclose([metrics["first"], metrics["last"]], errors[[0, -1]], rtol=1e-4)
    np.testing.assert_array_equal(model.times[0], times)


def test_what_is_dropped_gets_the_null_context_and_only_that_share():
    model, keys = Plain(), jax.random.split(jax.random.key(0), 300)
    batch = {"latents": jnp.ones((300, 4, 3, 4)), "classes": jnp.full(300, 1)}
    dit.loss_fn(CONFIG, model, batch, keys)
    dit.loss_fn(CONFIG, model, batch, keys, deterministic=True)
    assert set(model.classes[0]) == {-1, 1}
    assert abs((model.classes[0] == -1).mean() - 0.5) < 0.08
    assert (model.classes[1] == 1).all()


@pytest.mark.parametrize("mode", ["fopp", "uniform_paths", "independent", "shared"])
def test_frames_are_as_noisy_as_the_mode_says(mode):
    model, config = Plain(), dataclasses.replace(CONFIG, timesteps=mode)
    dit.loss_fn(config, model, BATCH, jax.random.key(1))
    steps = np.diff(model.times[0], axis=1)
    assert (steps == 0).all() == (mode == "shared")
    assert (steps >= 0).all() == (mode != "independent")


def test_the_loss_falls_contexts_learn_and_the_model_is_a_pipeline_of_the_same_bits(tmp_path):
    weights.save_module(tmp_path / "vae", alive(FrameVAE(VAE, rngs=nnx.Rngs(1)), 1), VAE)
    config = dataclasses.replace(CONFIG, vae=str(tmp_path / "vae"), ema_decay=0.9)
    stage = build_stage(config)
    prepared = prepare(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))
    first = np.array(prepared.model_of(prepared.state).context[...])
    state, losses = prepared.state, []
    for _ in range(20):
        state, metrics = prepared.train_step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    model = prepared.model_of(state)
    assert (np.abs(model.context[...] - first).max((1, 2)) > 1e-3).all()  # the null one as well
    stage.export(model, tmp_path / "model")
    pipe = ARDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe.config.class_names == NAMES
    assert (pipe.config.sampling.lag, pipe.config.sampling.num_frames, pipe.config.fps) == (2, 4, 8)
    got, want = (nnx.to_flat_state(nnx.state(x)) for x in (pipe.parts["denoiser"], model))
    for (path, x), (_, y) in zip(got, want, strict=True):
        np.testing.assert_array_equal(x[...], y[...], path)
    again = dataclasses.replace(config, init=str(tmp_path / "model"))
    assert build_stage(again).load().keys() == {path for path, _ in want}


def test_fixed_contexts_are_not_stepped_and_not_in_the_norm():
    config = dataclasses.replace(CONFIG, train_context=False)
    plan = plan_stage(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))
    assert paths_of(plan.frozen) == {("context",)}
    assert {path[0] for path in paths_of(plan.state.params)} == {"dit"}
    own = dataclasses.replace(config, model=DenoiserConfig(dit=DIT), class_names=())
    plan = plan_stage(build_stage(own), make_mesh(ShardingConfig(), jax.devices()[:1]))
    assert paths_of(plan.frozen) == {("context",), ("null",)}


def write_cache(folder, lengths, *, encoder="a" * 64, shape=(3, 4), captions=NAMES, settings=None):
    """Videos of these lengths; frame i of video v holds 100 v + i."""
    schema = {"latents": Spec("float32", (None, *shape))}
    encoded_cache.write_plan(folder, {"encoder": encoder, "settings": settings or {}})
    examples = [
        Example(
            name=f"{v}.mp4",
            captions=(captions[v % len(captions)],),
            arrays={"latents": np.full((n, *shape), 100 * v) + np.arange(n)[:, None, None]},
        )
        for v, n in enumerate(lengths)
    ]
    encoded_cache.write_shard(shard_path(folder, 0, 1), examples, schema, {})
    encoded_cache.write_manifest(folder, 1, schema)
    return dataclasses.replace(
        CONFIG, data=DataConfig(path=str(folder), num_frames=4, validation=0.0)
    )


def test_clips_of_a_cache_start_at_every_step_and_know_their_class(tmp_path):
    config = dataclasses.replace(write_cache(tmp_path / "c", [9, 3, 6]), clip_step=2)
    config = dit.settle(config)
    assert config.data.kind == "cache"
    clips = open_latents(config, "train")
    starts = [0, 2, 4, 200, 202]  # video 1 is too short
    rng = np.random.default_rng(0)
    read = [clips(i, rng) for i in range(len(clips))]
    assert [int(x["latents"][0, 0, 0]) for x in read] == starts
    assert all((x["latents"][-1] == s + 3).all() for x, s in zip(read, starts, strict=True))
    assert [int(x["classes"]) for x in read] == [0, 0, 0, 2, 2]
    assert clips.name(4) == "2.mp4 from 2"
    assert len(open_latents(config, "validation")) == 0


def test_late_clips_begin_anywhere_behind_the_first_frame_and_know_some_frames(tmp_path):
    config = dataclasses.replace(
        write_cache(tmp_path / "c", [9, 3, 6, 4]), late_share=0.4, num_known=2, clip_step=2
    )
    clips = open_latents(dit.settle(config), "train")
    assert [clips.name(i) for i in range(len(clips))] == [
        "0.mp4 from 0", "2.mp4 from 0", "3.mp4 from 0"
    ]  # fmt: skip
    rng, count = np.random.default_rng(0), 600
    read = [clips(0, rng) for _ in range(count)]
    starts = np.array([int(x["latents"][0, 0, 0]) for x in read])
    assert set(starts) == set(range(6))
    np.testing.assert_allclose((starts > 0).mean(), 0.4, atol=0.06)
    assert all(x["known"] == (2 if s else 0) for x, s in zip(read, starts, strict=True))
    assert all(x["latents"].shape == (4, 3, 4) for x in read)
    assert {int(clips(2, rng)["known"]) for _ in range(40)} == {0}  # a clip long, begins at once
    shapes = build_stage(clips_config := dit.settle(config)).batch_shapes(1)
    assert {n: (x.shape, x.dtype) for n, x in read[0].items()} == {
        n: (x.shape[1:], x.dtype) for n, x in shapes.items()
    }
    held_out = dataclasses.replace(
        clips_config, data=dataclasses.replace(clips_config.data, validation=0.9)
    )
    calm = open_latents(held_out, "validation")
    assert {int(calm(i, rng)["known"]) for i in range(len(calm)) for _ in range(20)} == {0}
    with pytest.raises(UserError, match="have 4 frames, which is one clip"):
        open_latents(
            dataclasses.replace(config, data=write_cache(tmp_path / "d", [4]).data), "train"
        )


def test_known_frames_have_no_noise_and_do_not_count():
    config = dataclasses.replace(CONFIG, late_share=0.5, num_known=2, context_dropout=0.0)
    b = len(BATCH["latents"])
    known = np.arange(b) % 2 * 2
    is_known = np.arange(4) < known[:, None]
    model, keys = Plain(), jax.random.split(jax.random.key(3), b)
    loss, metrics = dit.loss_fn(config, model, BATCH | {"known": jnp.asarray(known)}, keys)
    x0 = np.asarray(unit(BATCH["latents"]))
    np.testing.assert_array_equal(model.x[is_known], x0[is_known])
    # As the sampler tells of frames that are done, and without a caption.
    assert (model.times[0][is_known] == 1).all()
    assert (np.asarray(model.classes[0]) == -1).tolist() == (known > 0).tolist()
    errors = np.square(model.x - x0).mean((2, 3))  # Plain says what it is given
    assert (errors[~is_known] > 0).all()
    by_sample = [row[~seen].mean() for row, seen in zip(errors, is_known, strict=True)]
    np.testing.assert_allclose(loss, np.mean(by_sample), rtol=1e-5)
    np.testing.assert_allclose(metrics["first"], errors[::2, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["last"], errors[:, 3].mean(), rtol=1e-5)


def test_late_clips_come_from_a_cache_of_longer_videos():
    videos = DataConfig(num_frames=4)
    with pytest.raises(UserError, match=r"encode those by train\.encode"):
        dit.settle(dataclasses.replace(CONFIG, data=videos, late_share=0.5, num_known=2))
    longer = dataclasses.replace(CONFIG, data=DataConfig(num_frames=9))
    with pytest.raises(UserError, match=r"clips of 4 frames, data\.num_frames is 9"):
        dit.settle(longer)
    with pytest.raises(ValueError, match="num_known must lie between 0 and that, got 4"):
        dataclasses.replace(CONFIG, late_share=0.5)
    with pytest.raises(ValueError, match="late_share must be in"):
        dataclasses.replace(CONFIG, late_share=1.0)


def test_a_cache_of_another_vae_or_of_other_tokens_is_refused(tmp_path):
    weights.save_module(tmp_path / "vae", alive(FrameVAE(VAE, rngs=nnx.Rngs(1)), 1), VAE)
    config = write_cache(tmp_path / "a", [9])
    other = dataclasses.replace(config, vae=str(tmp_path / "vae"))
    with pytest.raises(UserError, match=r"made with another VAE than .*vae now holds \(aaaaaaaaaa"):
        open_latents(other, "train")
    same = write_cache(tmp_path / "b", [9], encoder=weights.hash_module(tmp_path / "vae"))
    assert len(open_latents(dataclasses.replace(same, vae=other.vae), "train")) == 6
    with pytest.raises(UserError, match=r"holds 2 tokens of 4 numbers for a frame, .* makes 3 of"):
        open_latents(write_cache(tmp_path / "d", [9], shape=(2, 4)), "train")
    with pytest.raises(UserError, match="has no video of 4 frames"):
        open_latents(write_cache(tmp_path / "e", [3]), "train")
    own = write_cache(tmp_path / "f", [9], settings={"run": "ar_diffusion_dit", "seed": 5})
    with pytest.raises(UserError, match=r"f is what a run encoded for itself.*train.encode --out"):
        open_latents(own, "train")
    narrow = dataclasses.replace(DIT, num_tokens=5)
    wrong = dataclasses.replace(other, model=DenoiserConfig(dit=narrow, num_classes=3))
    with pytest.raises(UserError, match="makes 3 tokens of 4 numbers for a frame, the model 5 of"):
        dit.settle(wrong)


def test_latents_of_a_vae_with_a_temporal_decoder_are_learned_too(tmp_path):
    path = tmp_path / "vae" / weights.CONFIG_FILE
    path.parent.mkdir()
    config_lib.to_json(dataclasses.replace(VAE, temporal=True), path)
    assert dit.settle_videos(dataclasses.replace(CONFIG, vae=str(path.parent))).frame_size == 8


def test_names_of_classes_are_read_from_a_list(tmp_path):
    (tmp_path / "list.txt").write_text("1 red circle\n2 Red Cross\n\nblue circle\n")
    base = dataclasses.replace(CONFIG, class_list=str(tmp_path / "list.txt"))
    assert dit.settle(base).class_names == ("red circle", "Red Cross", "blue circle")
    (tmp_path / "list.txt").write_text("1 red circle\n")
    with pytest.raises(UserError, match="class_names has 1 names for 3 classes"):
        dit.settle(base)
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        dit.settle(dataclasses.replace(CONFIG, class_list="none.txt"))


def test_videos_without_a_vae_or_a_number_of_clips_are_refused():
    config = dataclasses.replace(CONFIG, data=DataConfig(num_frames=4))
    with pytest.raises(UserError, match=r"name a VAE \(--vae MODEL\)"):
        dit.settle(config)


@pytest.mark.parametrize(
    ("options", "name", "caption", "wanted"),
    [
        ({}, "a.mp4", "a large Red  Cross moves left on a gray background", 1),
        ({}, "a.mp4", "blue circle", 2),
        ({}, "a.mp4", "2", 2),
        ({"told_by": "folder"}, "train/red circle/a.mp4", "blue circle", 0),
        ({"names": ()}, "a.mp4", "1", 1),
        ({"names": ("walk", "walk dog", "run")}, "a.mp4", "walk", 0),
        ({"names": (), "count": 0}, "a.mp4", "anything", 0),
        ({}, "a.mp4", "a redder circle", "none of the classes"),
        ({}, "a.mp4", "3", "none of the classes"),
        ({}, "a.mp4", "a red circle and a red cross", "several classes"),
    ],
)
def test_a_video_tells_its_class(options, name, caption, wanted):
    classes = Classes(**{"count": 3, "names": NAMES} | options)
    if isinstance(wanted, int):
        assert classes(name, (caption,)) == wanted
    else:
        with pytest.raises(BrokenRecord, match=f"{name}: its caption .* names {wanted}"):
            classes(name, (caption,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(num_frames=3)}, "data.num_frames is 3, model.dit.num_frames 4"),
        ({"class_names": ("a", "b")}, "2 names for 3 classes"),
        ({"class_names": ("a", "b", "A")}, "a name twice"),
        ({"context_dropout": 1.0}, "context_dropout must be in"),
        ({"sample_lag": 7}, "want sample_lag <= sample_steps"),
        ({"timesteps": "fop"}, "timesteps must be one of"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.slow
@pytest.mark.multi_device
def test_eight_devices_give_the_losses_of_one():
    """Data, fsdp and tensor axes of two devices each; noise, timesteps and dropped classes act."""
    command = [sys.executable, sharded_training.__file__, "losses", "denoiser", "one", "all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = sharded_training.read_report(done.stdout)
    np.testing.assert_allclose(found["all"]["losses"], found["one"]["losses"], rtol=1e-5)
    assert len(set(found["one"]["losses"])) == 5
    assert not found["all"]["whole"]

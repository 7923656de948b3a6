"""Checkpoints of tiny runs become folders that pipelines load."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from fake_hub import FakeHub
from tiny import tiny_pipeline, with_latent_prior

from dicode_jax import cli, kinds
from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.pipelines.dicode import DiCoDePipeline
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.config import AutoencoderTrainConfig
from dicode_jax.stages.dicode.configs import ARTrainConfig, TokenizerTrainConfig
from dicode_jax.stages.dicode.trainable import TrainableParts
from dicode_jax.stages.export import _pipeline_config, _with_settings, export, read_run_config
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.checkpoint import Checkpointer
from dicode_jax.training.setup import prepare


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pipe_folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    pipe.save_pretrained(folder)
    return folder


def write_run(config, workdir):
    """A run with two checkpoints; weights of step s are those at its start + s, the average + s/2.

    Returns the arrays at the start.
    """
    workdir.mkdir()
    config_lib.to_json(config, workdir / "config.json")
    prepared = prepare(build_stage(config), make_mesh(ShardingConfig(), jax.devices()[:1]))
    checkpoints = Checkpointer(workdir)
    start = weights.named_arrays(prepared.model_of(prepared.state))
    start = {name: np.asarray(x) for name, x in start.items()}
    for step in (1, 2):
        add = lambda n: jax.tree.map(lambda x: x + n, prepared.state.params)  # noqa: E731
        ema = add(step / 2) if config.ema_decay else None
        checkpoints.save(step, prepared.state.replace(params=add(step), ema=ema), {})
    checkpoints.close()
    return start


@pytest.fixture(scope="module")
def lm_run(pipe, pipe_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm") / "run"
    config = ARTrainConfig(
        model=pipe.language_model.cfg,
        tokenizer=str(pipe_folder),
        text_length=14,
        num_keyframes=2,
        frame_size=16,
        ema_decay=0.9,
    )
    return workdir, write_run(config, workdir)


@pytest.fixture(scope="module")
def tokenizer_run(pipe, pipe_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tokenizer") / "run"
    config = TokenizerTrainConfig(
        tokenizer=pipe.tokenizer.cfg,
        decoder=pipe.decoder.cfg,
        init=str(pipe_folder),
        trainable=TrainableParts(
            unet=False, first_block=False, image_projections=False, lora_rank=2, lora_alpha=4.0
        ),
        data=DataConfig(num_frames=4, fps=5.0),
        frame_size=16,
        sample_steps=3,
        sample_guidance=2.0,
        fs=7,
    )
    return workdir, write_run(config, workdir)


@pytest.mark.parametrize(
    ("which", "options", "added"),
    [
        ("", [], 1.0),
        ("", ["--no-ema"], 2.0),
        ("", ["--step", "1"], 0.5),
        ("checkpoints/1", ["--no-ema"], 1.0),
        ("checkpoints", ["--no-ema"], 2.0),
    ],
)
def test_language_model_run_becomes_a_pipeline(
    lm_run, pipe, tmp_path, capsys, which, options, added
):
    workdir, start = lm_run
    out = tmp_path / "models/mine"  # folders on the way are made
    argv = ["export", str(workdir / which), "--out", str(out), *options]
    assert cli.main(argv) == 0
    step = 1 if "1" in which or "1" in options else 2
    assert f"step {step}; dicode generate" in capsys.readouterr().out
    got = DiCoDePipeline.from_pretrained(out)
    for name, array in weights.named_arrays(got.language_model).items():
        np.testing.assert_array_equal(array, start[f"lm.{name}"] + np.float32(added))
    for part in ("tokenizer", "decoder"):
        want = weights.named_arrays(getattr(pipe, part))
        for name, array in weights.named_arrays(getattr(got, part)).items():
            np.testing.assert_array_equal(array, want[name])
    assert got.config == pipe.config  # of the pipeline that the tokenizer lies in
    assert got.text.encode(["a red circle"], 14).ids.tolist() == (
        pipe.text.encode(["a red circle"], 14).ids.tolist()
    )


@pytest.mark.slow
def test_tokenizer_run_becomes_a_pipeline_with_additions_folded_in(tokenizer_run, pipe, tmp_path):
    workdir, start = tokenizer_run
    out = tmp_path / "model"
    assert cli.main(["export", str(workdir), "--out", str(out)]) == 0
    got = DiCoDePipeline.from_pretrained(out)
    assert got.language_model is None
    sampling = got.config.sampling
    assert (got.config.frame_size, got.config.fps) == (16, 5.0)
    assert (sampling.num_frames, sampling.num_inference_steps) == (4, 3)
    assert (sampling.guidance_scale, sampling.fs) == (2.0, 7)
    assert (got.tokenizer.cfg.resize, got.tokenizer.cfg.antialias) == ("crop", True)
    arrays = weights.named_arrays(got.decoder)
    before = weights.named_arrays(pipe.decoder)
    assert arrays.keys() == before.keys()  # nothing of the additions is left
    changed = {name for name in arrays if not np.array_equal(arrays[name], before[name])}
    kernels = {name for name in changed if name.startswith("unet.")}
    assert kernels
    assert all(
        name.endswith(
            ("q.kernel", "k.kernel", "v.kernel", "k_image.kernel", "v_image.kernel", "out.kernel")
        )
        for name in kernels
    )
    assert changed - kernels == {"null_tokens"}  # made anew by the trained resampler
    tokenizer = weights.named_arrays(got.tokenizer)
    for name, array in tokenizer.items():
        moved = 2.0 if name.startswith("resampler") else 0.0
        np.testing.assert_array_equal(array, start[f"tokenizer.{name}"] + np.float32(moved))
    null = np.asarray(got.tokenizer.null_tokens())
    np.testing.assert_allclose(arrays["null_tokens"], null, atol=1e-4)  # weights above 2


@pytest.mark.slow
def test_language_model_run_takes_sizes_from_the_run_of_its_tokenizer(
    lm_run, tokenizer_run, tmp_path
):
    """The tokenizer's `model` folder, as the loop leaves it, beside the config of its run."""
    lm, (run, _) = lm_run[0], tokenizer_run
    assert cli.main(["export", str(run), "--out", str(run / "model")]) == 0
    (run / "model/config.json").unlink()
    out = tmp_path / "model"
    assert cli.main(["export", str(lm), "--out", str(out), "--tokenizer", str(run / "model")]) == 0
    config = DiCoDePipeline.from_pretrained(out).config
    assert (config.fps, config.sampling.fs, config.text_length) == (5.0, 7, 14)


def test_language_model_run_takes_a_tokenizer_of_the_hub(
    lm_run, pipe_folder, tmp_path, monkeypatch
):
    fake, out = FakeHub(tmp_path / "cache", monkeypatch), tmp_path / "model"
    fake.repositories["me/tokens"] = pipe_folder
    assert cli.main(["export", str(lm_run[0]), "--out", str(out), "--tokenizer", "me/tokens"]) == 0
    one, two = (path / "tokenizer/model.safetensors" for path in (out, pipe_folder))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_can_say_how_sharply_its_mixtures_are_drawn_from(lm_run, pipe, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "model"
    shutil.copytree(lm_run[0], workdir)
    told = json.loads((workdir / "config.json").read_text())
    assert told["logits_temperature"] is None  # which leaves it to the tokenizer's pipeline
    (workdir / "config.json").write_text(json.dumps(told | {"logits_temperature": 0.3}))
    assert cli.main(["export", str(workdir), "--out", str(out)]) == 0
    got = DiCoDePipeline.from_pretrained(out).config.generation
    assert got == dataclasses.replace(pipe.config.generation, logits_temperature=0.3)


def test_settings_go_into_the_pipelines_config(lm_run, pipe, tmp_path):
    out, settings = (
        tmp_path / "model",
        ["generation.var-scale=0.1", "sampling.num_inference_steps=7"],
    )
    assert cli.main(["export", str(lm_run[0]), "--out", str(out), "--set", *settings]) == 0
    config = DiCoDePipeline.from_pretrained(out).config
    assert (config.generation.var_scale, config.sampling.num_inference_steps) == (0.1, 7)
    generation, sampling = pipe.config.generation, pipe.config.sampling
    assert dataclasses.replace(config.generation, var_scale=generation.var_scale) == generation
    steps = sampling.num_inference_steps
    assert dataclasses.replace(config.sampling, num_inference_steps=steps) == sampling


@pytest.mark.parametrize("name", ["uniform_trailing", '"uniform_trailing"'])
def test_a_name_is_set_with_and_without_marks(name, pipe):
    config = _with_settings(pipe.config, [f"sampling.spacing={name}"])
    assert config.sampling.spacing == "uniform_trailing"


def test_what_paints_about_a_prior_is_not_guided(pipe, tmp_path):
    of_run = {"frame_size": 16, "text_length": 14, "logits_temperature": None}
    run = types.SimpleNamespace(tokenizer_folder=tmp_path, **of_run)
    cfg = pipe.decoder.cfg
    scales = [
        _pipeline_config(run, x).sampling.guidance_scale for x in (cfg, with_latent_prior(cfg))
    ]
    assert scales == [7.5, 1.0]


def test_mistakes_cost_one_line_and_leave_nothing(lm_run, tokenizer_run, tmp_path, capsys):
    lm, tokenizer = str(lm_run[0]), str(tokenizer_run[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    out = ["--out", str(tmp_path / "model")]
    for argv, message in (
        ([lm, *out, "--step", "9"], "holds no checkpoint of step 9; it holds 1, 2"),
        ([lm + "/checkpoints/1", *out, "--step", "2"], "is not the checkpoint of step 2"),
        ([str(tmp_path), *out], "no checkpoints in"),
        ([lm, "--out", str(tmp_path / "full")], "full is already there; name a new folder"),
        ([lm, "--out", str(tmp_path / "full/file/model")], "cannot write"),
        ([lm, *out, "--tokenizer", str(tmp_path)], "no tokenizer and no decoder in"),
        ([lm, "--out", f"{lm}/checkpoints/model"], "which is read; name another folder"),
        ([tokenizer, *out, "--tokenizer", lm], "trained no language model"),
        ([lm, *out, "--set", "generation.var-scales=0.1"], "fit PipelineConfig: "),
        ([lm, *out, "--set", "generations.var-scale=0.1"], "got 'generations.var-scale=0.1'"),
        ([lm, *out, "--set", "var-scale"], "want settings of a pipeline"),
        ([lm, *out, "--set", "fps=" + "[" * 9000], "want settings of a pipeline"),
    ):
        assert cli.main(["export", *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_settings_of_a_run_that_gives_no_pipeline_are_refused(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    config_lib.to_json(
        AutoencoderTrainConfig(model=AutoencoderKLConfig()), tmp_path / "run/config.json"
    )
    with pytest.raises(UserError, match="gives no pipeline, so that --set says nothing"):
        export(tmp_path / "run", tmp_path / "out", settings=["fps=4"])
    assert not (tmp_path / "out").exists()


def test_every_kind_of_run_is_told_by_its_config(lm_run, tmp_path):
    assert isinstance(read_run_config(lm_run[0] / "config.json"), ARTrainConfig)
    path = tmp_path / "config.json"
    for kind in kinds.TRAININGS:  # told before the fields are looked at, which do not fit
        path.write_text(json.dumps({"kind": kind, "version": 1, "some": 1}))
        with pytest.raises(UserError, match=f"fit {kinds.config_type(kind).__name__}: .*some"):
            read_run_config(path)
    for other in ({"kind": "dicode", "version": 1}, {"learning_rate": 1}):
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match="not the configuration of a training"):
            read_run_config(path)


def test_a_run_of_the_release_before_is_told_by_its_fields():
    """One of them is gone since."""
    old = pathlib.Path(__file__).parents[1] / "old_models/run/config.json"
    with pytest.warns(UserWarning, match="validation_batches is gone: validation_examples has"):
        config = read_run_config(old)
    assert isinstance(config, ARTrainConfig)
    assert config.validation_examples == ARTrainConfig.validation_examples

"""The shared training loop: logs, checkpoints, resuming, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.dicode.stages.configs import AutoencoderTrainConfig
from dicode_jax.training.logs import read_metrics
from dicode_jax.training.optim import OptimConfig
from train import autoencoder, loop

TINY = AutoencoderTrainConfig(
    model=AutoencoderKLConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, resolution=16, num_groups=4
    ),
    optim=OptimConfig(lr=2e-3, warmup_steps=2),
    num_steps=6,
    batch_size=3,
    frame_size=16,
)


def train(workdir, steps=None, config=TINY):
    options = loop.RunOptions(
        workdir=workdir, steps=steps, log_every=1, checkpoint_every=2, sample_every=6
    )
    workdir.mkdir(parents=True, exist_ok=True)
    loop.claim(workdir, config)
    return loop.run(autoencoder.build(config, workdir), options)


def losses(workdir):
    return [record["loss"] for record in read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(workdir)
    return workdir


def test_run_leaves_config_metrics_checkpoints_samples_and_weights(whole_run):
    assert json.loads((whole_run / "config.json").read_text())["num_steps"] == 6
    records = read_metrics(whole_run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "psnr"} <= set(records[0])
    assert (whole_run / "checkpoints" / "6").is_dir()
    assert (whole_run / "samples" / "000006.png").stat().st_size > 0
    assert (whole_run / "model" / "model.safetensors").is_file()


def test_stopped_run_goes_on_with_the_same_losses(whole_run, tmp_path):
    train(tmp_path / "parts", steps=2)
    train(tmp_path / "parts", steps=4)
    train(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(whole_run)  # bitwise: same data, same keys


def test_run_that_is_done_does_nothing(whole_run, capsys):
    before = (whole_run / "metrics.jsonl").read_text()
    assert np.isnan(train(whole_run))
    assert "nothing to do" in capsys.readouterr().out
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_workdir_of_another_config_is_refused_with_the_field_named(whole_run):
    other = dataclasses.replace(TINY, batch_size=5)
    with pytest.raises(loop.UserError, match="batch_size 3 -> 5"):
        train(whole_run, config=other)


def test_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    config = dataclasses.replace(TINY, optim=OptimConfig(lr=1e30, warmup_steps=0, clip_norm=0))
    with pytest.raises(loop.UserError, match=r"the loss is (nan|inf) at step \d"):
        train(tmp_path / "nan", config=config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "nowhere.py", "--workdir", "w"], "no config file at nowhere.py"),
        (["--config", "configs/gpt2_large.py", "--workdir", "w"], "wants AutoencoderTrainConfig"),
    ],
)
def test_command_line_says_in_one_line_what_is_wrong(argv, message, capsys, tmp_path, monkeypatch):
    argv = [str(tmp_path / "w") if a == "w" else a for a in argv]
    status = loop.main("train.autoencoder", autoencoder.build, (AutoencoderTrainConfig,), argv)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_unwritable_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(loop.UserError, match="cannot write"):
        loop.claim(tmp_path / "file" / "run", TINY)


def test_torn_last_line_of_the_metrics_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]

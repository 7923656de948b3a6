"""Options of a training and the fields of its config, read by one parser."""

import pathlib

import pytest

from dicode_jax.errors import UserError
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.stages.dicode.configs import (
    ARTrainConfig,
    RepresentationTrainConfig,
    TokenizerTrainConfig,
)
from train import command, loop

KINDS = (RepresentationTrainConfig, TokenizerTrainConfig)


def options(name):
    return loop.RunOptions(workdir=pathlib.Path("runs", name))


def parse(*args, kinds=(ARTrainConfig,)):
    return command.parse(args, kinds, options, prog="train.x", about="Trains.")


def test_both_kinds_of_options_are_read_and_what_was_said_is_known():
    said = parse(
        *("--config", "configs/gpt2_small.py", "--steps", "7", "--optim.lr=0.5", "--wandb"),
        *("--batch-size", "3", "--coordinator", "host:1", "--num-processes", "2"),
    )
    assert (said.options.steps, said.options.wandb) == (7, ())
    assert (said.config.optim.lr, said.config.batch_size) == (0.5, 3)
    assert (said.processes.coordinator, said.processes.num_processes) == ("host:1", 2)
    assert said.said >= {"steps", "optim.lr", "batch_size"}
    assert "num_steps" not in said.said


def test_the_folder_of_a_run_is_named_after_its_config():
    said = parse("--config", "configs/gpt2_small.py")
    assert said.options.workdir == pathlib.Path("runs/gpt2_small")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "say what to do by --config FILE"),
        (("--config", "no.py"), "no config file at no.py"),
        (("--config", "configs/shapes_autoencoder.py"), "wants ARTrainConfig"),
        (("--config", "configs/shapes_ar.py", "--num-steps", "0"), "num_steps must be at least 1"),
        (("--config", "configs/shapes_ar.py", "--keep", "0"), "keep must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(args, line):
    with pytest.raises(UserError, match=line) as caught:
        parse(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("--stps", "--steps"), ("--optim.lrr", "--optim.lr"), ("--coord", "--coordinator")],
)
def test_a_misspelt_option_of_any_kind_gets_the_nearest(wrong, right, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--config", "configs/shapes_ar.py", wrong, "3")
    assert caught.value.code == 2
    assert f"{right} " in capsys.readouterr().err


def shown(capsys, *args, kinds):
    with pytest.raises(SystemExit) as caught:
        parse(*args, kinds=kinds)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_fields_are_listed_with_a_config_or_without(capsys):
    text = shown(capsys, "--help-config", kinds=(ARTrainConfig,))
    assert "--model.body.embed-dim" in text
    assert "--workdir" not in text
    large = ("--help-config", "--config", "configs/gpt2_large.py")
    text = shown(capsys, *large, kinds=(ARTrainConfig,))
    assert "--model.body.embed-dim INT (default: 1280)" in text
    text = shown(capsys, "--help-config", kinds=KINDS)
    assert "--probe-weight" in text
    assert "--decoder.unet.model-channels" in text
    assert "Examples per step" in shown(capsys, "--help-config", "-H", kinds=KINDS)
    text = shown(capsys, "--help-config", kinds=(DiTTrainConfig,))  # of a folder of configs
    assert "--context-dropout" in text


def test_help_lists_the_options_of_the_run_alone(capsys):
    text = shown(capsys, "--help", kinds=KINDS)
    assert "--checkpoint-every" in text
    assert "--coordinator" in text
    assert "--optim.lr" not in text

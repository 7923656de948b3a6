"""The folder of a run is held before anything is written, and only things of ours are replaced."""

import contextlib
import fcntl
import json
import os

import pytest
import tiny_training
from tiny_training import TinyConfig

from dicode_jax.errors import UserError
from dicode_jax.training.logs import MetricsLog
from dicode_jax.training.workdir import RUN_FILES, claim, hold

TINY = TinyConfig(num_steps=2)


def contents(folder):
    """Bytes and time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@contextlib.contextmanager
def another_run(workdir):
    """Holds the folder as another process does."""
    with (workdir / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def main(tmp_path):
    (tmp_path / "config").mkdir()
    config = tiny_training.write_config(tmp_path / "config")
    options = ["--config", str(config), "--num-steps", "2", "--workdir"]
    return lambda workdir, *more: tiny_training.main([*options, str(workdir), *more])


def test_a_refused_second_run_changes_nothing(tmp_path, main, monkeypatch, capsys):
    built = []

    def build(config, workdir):
        """Would write a cache."""
        built.append(config)

    monkeypatch.setattr(tiny_training, "build", build)
    workdir = tmp_path / "run"
    claim(workdir, TINY)
    before = contents(workdir)
    with another_run(workdir):
        assert main(workdir, "--seed", "9") == 2
        assert "another run is at work" in capsys.readouterr().err
        with pytest.raises(UserError, match="another run is at work"):
            claim(workdir, TinyConfig(num_steps=2, seed=9))
    assert contents(workdir) == before
    assert built == []


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_folder_with_somebody_elses_things_is_no_workdir(tmp_path, main, capsys, name):
    workdir = tmp_path / "run"
    (workdir / name).parent.mkdir()
    if "." in name:
        (workdir / name).write_text("mine")
    else:
        (workdir / name).mkdir()
        (workdir / name / "notes.txt").write_text("mine")
    before = contents(workdir)
    assert main(workdir) == 2
    assert f"holds {name}, but no config.json of a training" in capsys.readouterr().err
    assert contents(workdir) == before  # not even a lock


@pytest.mark.parametrize("text", ['{"n_embd": 8}', "{}", "[1]", "{", "[" * 100_000])
def test_a_config_that_is_no_trainings_is_left_alone(tmp_path, main, capsys, text):
    (tmp_path / "config.json").write_text(text)
    before = contents(tmp_path)
    assert main(tmp_path) == 2
    assert "config.json is not the config of a training" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_run_leaves_what_lies_beside_it(tmp_path, main, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "notes.txt").write_text("mine")
    (workdir / ".lock").write_text("mine")
    (workdir / "samples").mkdir()  # empty: nobody's
    assert main(workdir) == 0
    assert (workdir / ".lock").read_text() == (workdir / "notes.txt").read_text() == "mine"

    (workdir / "model/notes.txt").write_text("mine")
    metrics = (workdir / "metrics.jsonl").read_text()
    assert main(workdir, "--steps", "3") == 2  # said before a step is done
    assert "model holds notes.txt, which was not written here" in capsys.readouterr().err
    assert (workdir / "model/notes.txt").read_text() == "mine"
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_nothing_is_written_through_a_link(tmp_path):
    workdir, mine = tmp_path / "run", tmp_path / "mine.json"
    workdir.mkdir()
    mine.write_text("precious")
    (workdir / "config.json.tmp").symlink_to(mine)
    claim(workdir, TINY)
    assert not (workdir / "config.json").is_symlink()
    (workdir / ".lock").unlink()
    (workdir / ".lock").symlink_to(mine)
    with pytest.raises(UserError, match=r"\.lock is a link; remove it"), hold(workdir):
        pass
    assert mine.read_text() == "precious"
    (workdir / ".lock").unlink()
    os.rename(workdir / "config.json", mine)  # of a run that did nothing yet
    (workdir / "config.json").symlink_to(mine)
    with pytest.raises(UserError, match="is a link"):
        claim(workdir, TinyConfig(num_steps=2, seed=9))
    assert json.loads(mine.read_text())["seed"] == TINY.seed


LINKS = (
    *("config.json", "metrics.jsonl", "samples", "samples/step_000002.png", "tensorboard"),
    *("tensorboard/events", "profile", "profile/plugins", "nonfinite/step_000001.npz", "encoded"),
    *("encoded/encoded-00000-of-00001.arrayrecord", "checkpoints", "checkpoints/1", "body"),
    *("tokenizer.json", "wandb_id.txt", "model", "wandb"),
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_the_place_of_what_a_run_writes_is_refused(tmp_path, main, capsys, name):
    workdir, mine = tmp_path / "run", tmp_path / "mine"
    claim(workdir, TINY)
    mine.mkdir()
    path = workdir / name
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(mine)
    assert main(workdir) == 2
    assert f"{path} is a link" in capsys.readouterr().err
    assert not list(mine.iterdir())


def test_a_pipe_in_the_place_of_a_log_is_refused_without_waiting_for_it(tmp_path, main, capsys):
    claim(tmp_path / "run", TINY)
    os.mkfifo(tmp_path / "run/metrics.jsonl")
    assert main(tmp_path / "run") == 2
    assert "metrics.jsonl is a link, a pipe" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other/config.json")
    assert main(tmp_path / "other") == 2
    assert "config.json is a link, a pipe" in capsys.readouterr().err


def test_a_log_is_not_written_through_a_link_nor_into_a_pipe(tmp_path):
    """The library alone, whose caller has not looked."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to("mine")
    with pytest.raises(UserError, match="cannot write the logs"):
        MetricsLog(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write the logs"):
        MetricsLog(tmp_path)


def test_the_folder_of_a_run_may_be_a_link_and_hold_those_of_wandb(tmp_path, main):
    claim(tmp_path / "disk", TINY)
    (tmp_path / "disk/wandb").mkdir()
    (tmp_path / "disk/wandb/latest-run").symlink_to("run-1")
    (tmp_path / "run").symlink_to("disk")
    assert main(tmp_path / "run") == 0


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="is no file"), hold(tmp_path):
        pass

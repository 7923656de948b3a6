"""A run that is killed again and again does, in the end, what one that was left alone does."""

import dataclasses
import os
import signal

import kills
import pytest
import tiny_landiff_commands
from tiny import random_module
from tiny_landiff_training import TOKENIZER_CONFIG, TOWER

from dicode_jax.models.clip import CLIPVision
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.storage import weights
from dicode_jax.training.logs import read_metrics

OPTIONS = ["--checkpoint-every", "5"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return kills.Launcher(tmp_path_factory.mktemp("runs"))


def unbroken(launch, processes):
    workdir = launch.folder / f"unbroken_{processes}"
    statuses = kills.finish_all(launch.start_many(workdir, processes, *OPTIONS))
    assert statuses == [0] * processes
    return workdir


@pytest.mark.slow
def test_killed_run_has_the_losses_batches_and_weights_of_an_unbroken_one(launch):
    workdir = launch.folder / "killed"
    plan = ["step", "later", "save"]
    counts = kills.run_with_kills(launch, workdir, OPTIONS, kills=plan, seed=1)
    assert counts.kills == len(plan)
    assert counts.in_save >= 1
    assert counts.before_first_checkpoint < 3
    assert kills.differences(unbroken(launch, 1), workdir) == []


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_exactly(launch):
    workdir = launch.folder / "two"
    metrics = workdir / "metrics.jsonl"

    def start_and_wait(steps):
        lines = kills.count_lines(metrics) + steps
        started = launch.start_many(workdir, 2, *OPTIONS, "--sleep", "0.01")
        assert kills.wait_for(lambda: kills.count_lines(metrics) >= lines, started[0])
        return started

    # A scheduler tells only one of them: both save after the same step.
    started = start_and_wait(steps=3)
    os.kill(started[1].pid, signal.SIGTERM)
    assert kills.finish_all(started) == [0, 0]
    assert kills.whole(workdir)[-1] == kills.count_lines(metrics)
    # One of them dies: the other ends too.
    started = start_and_wait(steps=2)
    os.kill(started[0].pid, signal.SIGKILL)
    assert kills.finish(started[1], timeout=60) not in (0, None)
    # Both are killed while they save.
    plan = ["save"]
    counts = kills.run_with_kills(
        launch, workdir, [*OPTIONS, "--sleep", "0.01"], kills=plan, seed=2, processes=2
    )
    assert counts.kills == 1
    assert kills.differences(unbroken(launch, 2), workdir) == []


@pytest.mark.slow
def test_workers_outlive_a_signal_to_all_and_not_a_killed_run(launch):
    workdir = launch.folder / "workers"
    options = [*OPTIONS, "--sleep", "0.01", "--num-workers", "1"]
    metrics = workdir / "metrics.jsonl"

    def start():
        lines = kills.count_lines(metrics) + 2
        started = launch.start(workdir, *options)
        assert kills.wait_for(lambda: kills.count_lines(metrics) >= lines, started)
        return started

    started = start()
    workers = kills.children(started.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    lines = kills.count_lines(metrics) + 8  # more than are made ahead
    assert kills.wait_for(lambda: kills.count_lines(metrics) >= lines, started)
    os.killpg(started.pid, signal.SIGTERM)  # as SLURM and terminals do
    assert kills.finish(started) == 0
    assert kills.whole(workdir)[-1] == kills.count_lines(metrics)
    started = start()
    started.kill()
    kills.finish(started)
    assert kills.wait_for_end_of_group(started.pid)


@pytest.mark.slow
def test_codes_of_a_run_killed_in_a_save_go_on_as_those_of_an_unbroken_one(tmp_path):
    """From the checkpoint before, with codes that k-means has started and that still revive."""
    tower = random_module(lambda: CLIPVision(TOWER, rngs=ShapeRngs()))
    weights.save_module(tmp_path / "tower", tower, TOWER)
    own = {"features": str(tmp_path / "tower"), "num_steps": 12, "revive_below": 4.0}
    config = dataclasses.replace(TOKENIZER_CONFIG, **own)
    launch = kills.Launcher(tmp_path, config, tiny_landiff_commands.train_tokenizer)
    whole, killed = unbroken(launch, 1), tmp_path / "killed"
    counts = kills.run_with_kills(launch, killed, OPTIONS, kills=["next save"], seed=3)
    assert (counts.kills, counts.in_save, counts.before_first_checkpoint) == (1, 1, 0)
    assert counts.steps_done_twice >= 5
    assert kills.differences(whole, killed) == []
    steps = read_metrics(whole / "metrics.jsonl")
    assert [step["commitment"] > 0 for step in steps] == [False] + [True] * 11
    assert min(step["used"] for step in steps[6:]) < 1  # codes revived behind the checkpoint

"""A run that is killed again and again does, in the end, what one that was left alone does."""

import kills
import pytest

OPTIONS = ["--checkpoint-every", "5"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return kills.Launcher(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def unbroken(launch):
    workdir = launch.folder / "unbroken"
    assert kills.finish(launch.start(workdir, *OPTIONS)) == 0
    return workdir


def test_killed_run_has_the_losses_batches_and_weights_of_an_unbroken_one(launch, unbroken):
    plan = ["step", "later", "save", "later", "start", "save"]
    counts = kills.run_with_kills(launch, launch.folder / "killed", OPTIONS, kills=plan, seed=1)
    assert counts.kills == len(plan)
    assert counts.in_save >= 1
    assert counts.before_first_checkpoint < 3
    assert counts.steps_done_twice > 0
    assert kills.differences(unbroken, launch.folder / "killed") == []

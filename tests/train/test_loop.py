"""The shared training loop: logs, checkpoints, resuming, stopping, and what it refuses."""

import contextlib
import dataclasses
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny_training
from tiny_training import TinyConfig

from dicode_jax.errors import UserError
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.training import checkpoint
from dicode_jax.training.checkpoint import find_checkpoints
from dicode_jax.training.logs import MetricsLog, read_metrics
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.workdir import claim, hold
from train import loop

TINY = TinyConfig(num_steps=12)
NUMBERS = ("loss", "grad_norm", "lr", "largest")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    earlier = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0)):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, earlier):
        jax.config.update(name, value)


def train(workdir, config=TINY, at=None, **options):
    """A run; `at` gives functions by number of a batch, called when the loop asks for it."""
    if longer := claim(workdir, config):
        print(longer)
    task = tiny_training.build(config, workdir)
    if at:
        task.batches.before = lambda number: at.get(number, lambda: None)()
    options = {"log_every": 1, "checkpoint_every": 4} | options
    return loop.run(task, loop.RunOptions(workdir=workdir, **options))


def numbers(workdir):
    return [
        tuple(record[name] for name in NUMBERS)
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train(workdir)
    assert (outcome.step, outcome.stopped_by) == (12, None)
    return workdir


def test_run_leaves_config_metrics_events_checkpoints_and_weights(whole_run):
    assert json.loads((whole_run / "config.json").read_text())["num_steps"] == 12
    records = read_metrics(whole_run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert {*NUMBERS, "skipped"} <= set(records[0])
    assert list((whole_run / "tensorboard").glob("events*"))
    assert find_checkpoints(whole_run / "checkpoints") == [8, 12]
    assert (whole_run / "model" / "model.npz").is_file()
    assert not list(whole_run.glob(".model*"))


def test_stopped_run_goes_on_with_the_same_losses(whole_run, tmp_path):
    for steps in (3, 8, None):  # not at the steps of checkpoints
        train(tmp_path / "parts", steps=steps, keep=1)
    assert numbers(tmp_path / "parts") == numbers(whole_run)  # bitwise: same data, same keys


def test_run_that_is_done_does_nothing(whole_run, capsys):
    before = (whole_run / "metrics.jsonl").read_text()
    assert np.isnan(train(whole_run).loss)
    assert "nothing to do" in capsys.readouterr().out
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_model_is_written_by_the_next_start_when_a_kill_came_before_it(whole_run, tmp_path):
    train(tmp_path)
    shutil.rmtree(tmp_path / "model")
    train(tmp_path)
    with (
        np.load(tmp_path / "model/model.npz") as new,
        np.load(whole_run / "model/model.npz") as old,
    ):
        for name in old:
            np.testing.assert_array_equal(new[name], old[name])


def test_log_every_and_the_last_step_are_logged(tmp_path):
    train(tmp_path / "run", dataclasses.replace(TINY, num_steps=7), log_every=3)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 7]


def test_steps_beyond_the_schedule_are_trained_at_its_last_rate_and_a_line_says_so(
    tmp_path, capsys
):
    config = dataclasses.replace(TINY, num_steps=6)
    train(tmp_path, config, steps=8)
    said = capsys.readouterr().out
    assert said.count("--steps 8 goes beyond the schedule's 6 steps") == 1
    last = config.optim.lr * config.optim.final_lr_ratio
    assert f"its last learning rate, {last:.3g}; --num-steps 8 stretches it" in said
    rates = [record["lr"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    np.testing.assert_allclose(rates[6:], last, rtol=1e-5)
    assert min(rates) > 0


def test_a_run_may_become_longer_and_takes_the_rates_of_the_longer_one(whole_run, tmp_path, capsys):
    train(tmp_path, dataclasses.replace(TINY, num_steps=8))
    capsys.readouterr()
    train(tmp_path, TINY)
    said = capsys.readouterr().out
    assert "num_steps 8 -> 12: from here on the learning rate is that of a run of 12 steps" in said
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 12
    longer, whole = (
        [record["lr"] for record in read_metrics(run / "metrics.jsonl")]
        for run in (tmp_path, whole_run)
    )
    assert longer[8:] == whole[8:]
    assert longer[5:8] != whole[5:8]
    train(tmp_path, TINY)
    assert "num_steps 8" not in capsys.readouterr().out  # once
    with pytest.raises(UserError, match="num_steps 12 -> 11"):
        claim(tmp_path, dataclasses.replace(TINY, num_steps=11))


# Another config, another run


def test_workdir_of_another_config_is_refused_with_the_fields_named(whole_run):
    other = dataclasses.replace(TINY, batch_size=5, width=9)
    with pytest.raises(UserError, match=r"batch_size 4 -> 5; width 8 -> 9\); take another"):
        claim(whole_run, other)


def test_workdir_of_another_training_is_refused_in_words(whole_run):
    with pytest.raises(UserError, match="holds a run of another training"):
        claim(whole_run, OptimConfig())


def test_a_run_that_did_nothing_yet_leaves_its_folder_to_another_config(tmp_path):
    claim(tmp_path, TINY)
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, dataclasses.replace(TINY, batch_size=5))
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 5


def test_fields_that_do_not_touch_the_result_may_change(tmp_path):
    claim(tmp_path, TINY)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    other = dataclasses.replace(TINY, sharding=ShardingConfig(fsdp=2))
    claim(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text())["sharding"]["fsdp"] == 2


def test_two_runs_do_not_share_a_folder(tmp_path):
    claim(tmp_path, TINY)
    with (
        hold(tmp_path),
        pytest.raises(UserError, match="another run is at work"),
        hold(tmp_path),
    ):
        pass
    with hold(tmp_path):  # it was given back
        pass


def test_unwritable_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        claim(tmp_path / "file" / "run", TINY)


# Steps that are not finite


@pytest.fixture(scope="module")
def poisoned():
    return dataclasses.replace(TINY, poison=(7,))  # step 8, after which a checkpoint is due


def test_step_that_is_not_finite_stops_the_run_and_keeps_its_batch(poisoned, tmp_path):
    for _ in range(2):  # the same command stops at the same step
        with pytest.raises(UserError, match=r"step 8 is not finite .*gradients nan") as info:
            train(tmp_path, poisoned)
    assert "\n" not in str(info.value)
    assert find_checkpoints(tmp_path / "checkpoints") == [4]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")][-1] == 7
    records = [json.loads(line) for line in (tmp_path / "batches_0.jsonl").open()]
    (wanted,) = {tuple(record["ids"]) for record in records if record["batch"] == 7}
    with np.load(tmp_path / "nonfinite" / "step_000008.npz") as kept:
        assert tuple(kept["ids"]) == wanted
        assert all(name in str(info.value) for name in wanted)
        assert kept["x"][0, 0] == np.inf
        assert kept["y"].shape == (4, 3)


def test_skipped_step_is_counted_and_the_run_goes_on(poisoned, tmp_path):
    train(tmp_path, poisoned, on_nonfinite="skip", steps=9)
    train(tmp_path, poisoned, on_nonfinite="skip")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0] * 7 + [1] * 5
    assert "grad_norm" not in records[7]
    assert all(np.isfinite(record["loss"]) for record in records if record["step"] != 8)


def test_no_more_than_max_nonfinite_steps_are_skipped(tmp_path):
    config = dataclasses.replace(TINY, poison=(2, 5, 6))
    with pytest.raises(UserError, match=r"step 7 .*number 3 of them, --max-nonfinite is 2"):
        train(tmp_path, config, on_nonfinite="skip", max_nonfinite=2)


@pytest.mark.parametrize("place", ["[1]", "null", "{}", '{"next_batch": "a", "broken": {}}'])
def test_a_checkpoint_without_a_place_in_the_data_is_one_line(whole_run, tmp_path, place):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / "checkpoints/12/data/metadata").write_text(place)
    with pytest.raises(UserError, match="12 says no place in the data: it is damaged"):
        train(run, dataclasses.replace(TINY, num_steps=13))


# Stopping


@pytest.fixture(autouse=True)
def terminal():
    """The signal of a terminal that closes, which `nohup pytest` would have ignored here too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_the_run_goes_on_exactly(number, whole_run, tmp_path):
    kill = lambda: os.kill(os.getpid(), number)  # noqa: E731
    outcome = train(tmp_path, at={6: kill})
    assert (outcome.step, outcome.stopped_by) == (7, number)
    assert find_checkpoints(tmp_path / "checkpoints")[-1] == 7
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    train(tmp_path)
    assert numbers(tmp_path) == numbers(whole_run)


def test_repeated_sigterm_changes_nothing_and_second_ctrl_c_does(tmp_path):
    def kill(*numbers):
        return lambda: [os.kill(os.getpid(), number) for number in numbers]

    outcome = train(tmp_path, at={6: kill(signal.SIGTERM, signal.SIGTERM)})
    assert (outcome.step, outcome.stopped_by) == (7, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, at={8: kill(signal.SIGINT, signal.SIGINT)})
    assert find_checkpoints(tmp_path / "checkpoints")[-1] == 7


def test_a_closed_terminal_stops_nothing_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        outcome = train(tmp_path, at={6: lambda: os.kill(os.getpid(), signal.SIGHUP)})
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.stopped_by is None


def test_what_is_said_to_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    """The terminal hangs up in the middle of a step, after which the run has still to save."""
    code = """
import fcntl, pathlib, sys, termios, time
from dicode_jax.training.signals import StopSignals

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # now closing it is told to this process
say = lambda line: print(line, file=sys.stderr, flush=True)
with StopSignals(say) as signals:
    print("ready", flush=True)
    while not (number := signals.stop_after(1)):
        time.sleep(0.01)
    say("saving")
    print("saved", flush=True)
    pathlib.Path(sys.argv[1]).write_text(number.name)
"""
    terminal, inner = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "saved")],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert run.wait(60) == 0
    assert (tmp_path / "saved").read_text() == "SIGHUP"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_unwinds(number, tmp_path, monkeypatch, capsys):
    ended = []

    @contextlib.contextmanager
    def writing():
        try:
            yield
        finally:
            ended.append(True)  # where unfinished files are removed

    def build(config, workdir):
        """Is told to stop while it writes."""
        with writing():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(tiny_training, "build", build)
    config = tiny_training.write_config(tmp_path)
    status = tiny_training.main(["--config", str(config), "--workdir", str(tmp_path / "run")])
    assert status == 128 + number
    assert ended == [True]
    assert "goes on from the last checkpoint" in capsys.readouterr().err


# Evaluation, the best checkpoint, rates


def test_checkpoint_with_the_smallest_validation_loss_stays(tmp_path):
    train(tmp_path, dataclasses.replace(TINY, evaluate=True), checkpoint_every=2, keep=1)
    losses = {r["step"]: r.get("validation_loss") for r in read_metrics(tmp_path / "metrics.jsonl")}
    assert [losses[step] for step in (2, 4, 6, 8, 10, 12)] == [1.5, 0.5, 0.5, 1.5, 2.5, 3.5]
    assert losses[3] is None
    assert find_checkpoints(tmp_path / "checkpoints") == [6, 12]


def test_share_of_the_peak_comes_from_counted_flops(tmp_path):
    train(tmp_path, peak_tflops=1e-3)
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    # Two products with weights forward, their gradients for the weights, one for the inputs.
    step = 2 * TINY.batch_size * (2 * (6 * 8 + 8 * 3) + 8 * 3)
    share = step / (1e9 * jax.device_count())
    assert record["mfu"] == pytest.approx(share * record["steps_per_second"])
    assert record["tokens_per_second"] == pytest.approx(400 * record["steps_per_second"])


def test_profile_writes_a_trace(tmp_path):
    train(tmp_path, profile=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# Disk


def test_full_disk_stops_the_run_with_the_last_checkpoint_named(tmp_path, monkeypatch):
    free = iter([10**9, 10**9, 100])  # at the start, and at each save
    usage = lambda _: types.SimpleNamespace(free=next(free))  # noqa: E731
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    with pytest.raises(UserError, match=r"100 B free.*the last checkpoint is 4\)"):
        train(tmp_path)
    assert find_checkpoints(tmp_path / "checkpoints") == [4]


def test_disk_that_cannot_hold_the_run_is_refused_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"4 checkpoints of .* must fit"):
        train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


# Logs


def test_torn_last_line_is_skipped_and_the_next_one_is_not_glued_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    log = MetricsLog(tmp_path, first_step=2)
    log.write(2, {"loss": 1.0, "bad": float("nan")})
    log.close()
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_event_file_holds_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for first in (1, 3):
        log = MetricsLog(tmp_path, first_step=first)
        for step in (first, first + 1):
            log.write(step, {"loss": 4.0 / step})
        log.close()
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    events, data = [], second.read_bytes()
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert events[1].session_log.status == 1  # START: TensorBoard hides what came before
    assert events[1].step == 3
    values = [(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value]
    assert values == [(3, "loss", np.float32(4 / 3)), (4, "loss", 1.0)]


def test_log_that_cannot_be_written_is_one_line_and_not_a_hang(tmp_path):
    log = MetricsLog(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))

    def write_much():
        for step in range(10**5):
            log.write(step, {"loss": 1.0})

    try:
        with pytest.raises(UserError, match=r"cannot write the logs in .*: File too large"):
            write_much()
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_logging_does_not_import_torch(tmp_path):
    code = "import pathlib, sys; from dicode_jax.training.logs import MetricsLog; "
    code += (
        "log = MetricsLog(pathlib.Path(sys.argv[1])); log.write(1, {'loss': 2.0}); log.close(); "
    )
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_wandb_gets_the_same_numbers_and_goes_on_with_its_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    fake = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: f"id{len(started)}"),
        init=lambda **options: started.append(options) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        log = MetricsLog(tmp_path, wandb_project="films", config={"lr": 1})
        log.write(step, {"loss": 4.0})
        log.close()
    assert logged == [(1, {"loss": 4.0}), (2, {"loss": 4.0})]
    assert [options["id"] for options in started] == ["id0", "id0"]
    assert started[0]["project"] == "films"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"dicode-jax\[wandb\]"):
        MetricsLog(tmp_path, wandb_project="films")


# Command line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nowhere.py", "no config file at nowhere.py"),
        (
            "configs/gpt2_large.py",
            "configures ARTrainConfig; python -m tiny_training wants TinyConfig",
        ),
    ],
)
def test_command_line_says_in_one_line_what_is_wrong(config, message, capsys, tmp_path):
    status = tiny_training.main(["--config", config, "--workdir", str(tmp_path / "w")])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1

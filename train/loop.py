"""The loop that all trainings share: restore, step, look, log, evaluate, sample, save.

A training is a `Task`: a stage, its data, and how its results are looked at. The files beside this
one (`train/ar.py` and its neighbours) build one from a config; `main` does the rest.
"""

import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tqdm.contrib.logging import logging_redirect_tqdm

from dicode_jax import config as config_lib
from dicode_jax.data.stream import BatchStream
from dicode_jax.errors import Faults, UserError
from dicode_jax.runtime import allocator, compile_cache, distributed
from dicode_jax.runtime.interrupts import exit_status, polite_signals
from dicode_jax.runtime.sharding import gather_to_host, global_batch, make_mesh
from dicode_jax.storage import folders
from dicode_jax.training import flops
from dicode_jax.training.checkpoint import Checkpointer
from dicode_jax.training.logs import MetricsLog
from dicode_jax.training.nonfinite import NonFiniteGuard
from dicode_jax.training.optim import make_schedule
from dicode_jax.training.profile import Profile
from dicode_jax.training.progress import Progress
from dicode_jax.training.setup import Prepared, prepare
from dicode_jax.training.signals import StopSignals
from dicode_jax.training.stage import Stage
from dicode_jax.training.state import TrainState
from dicode_jax.training.workdir import check, claim, hold
from train import command, preflight
from train.sources import find_sources

MODEL = "model"  # the folder of the weights at the end, in that of the run
_COUNTS = ("steps", "log_every", "checkpoint_every", "sample_every", "eval_every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says about a run, whatever is trained.

    Attributes:
      workdir: Folder of the run: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
        `samples/`, `model/`.
      steps: Stop after this many steps in all; None takes the config's.
      log_every: Steps between two lines of the log.
      checkpoint_every: Steps between two checkpoints.
      sample_every: Steps between two sample sheets.
      eval_every: Steps between two evaluations; None evaluates at every checkpoint.
      keep: How many of the latest checkpoints stay; the one with the best evaluation stays too.
      on_nonfinite: `stop` at a loss or gradient that is not finite, or `skip` the step.
      max_nonfinite: How many steps may be skipped in all.
      profile: Write a trace of a few steps to `workdir/profile`.
      wandb: Log to Weights & Biases as well, to this project (dicode when none is named).
      peak_tflops: What one device can do, for `mfu`; None looks it up.
    """

    workdir: pathlib.Path
    steps: int | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 500
    eval_every: int | None = None
    keep: int = 2
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 100
    profile: bool = False
    wandb: tuple[str, ...] | None = None
    peak_tflops: float | None = None

    def __post_init__(self):
        for name in _COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclasses.dataclass(kw_only=True)
class Task:
    """Everything that one training needs.

    With several processes `evaluate` and `sample` are called on all of them, with the same model;
    only process 0 writes files.

    Attributes:
      stage: What is trained, with which loss, and how it is written out.
      batches: This process's rows of every batch, and their `ids`.
      evaluate: `model -> metrics` on held-out data; `validation_loss` tells the best checkpoint.
      sample: `(model, folder, step) -> None` writes a sample sheet.
      units: What a step works off, for the rates: `{"tokens": 8192, "clips": 32}`.
    """

    stage: Stage
    batches: BatchStream
    evaluate: Callable[[nnx.Module], Mapping[str, float]] | None = None
    sample: Callable[[nnx.Module, pathlib.Path, int], None] | None = None
    units: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its last step, that step's loss, and the signal that stopped it, if any."""

    step: int
    loss: float = float("nan")
    stopped_by: signal.Signals | None = None


def run(task: Task, options: RunOptions) -> Outcome:
    """Trains until the last step or a signal; goes on where an earlier run in the folder stopped.

    The caller holds the folder (`training.workdir.hold`).

    Raises:
      UserError: The folder cannot be written, its disk is full, a loss is not finite, too much of
        the data is broken; whatever the reason, the last good checkpoint stays.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(task.batches.close)
        checkpoints = Checkpointer(options.workdir, keep=options.keep)
        name, workdir = task.stage.name, options.workdir
        num_steps = options.steps or task.stage.config.num_steps
        done = checkpoints.latest_step or 0
        if done >= num_steps and _is_exported(checkpoints, workdir):
            print(f"{name}: {workdir} is already at step {done} of {num_steps}; nothing to do")
            return Outcome(done)
        if jax.process_index() == 0:  # before steps are spent on it
            folders.check_folder(workdir / MODEL, overwrite=True)
        if num_steps > task.stage.config.num_steps and jax.process_index() == 0:
            print(_beyond(task.stage.config, num_steps), flush=True)
        prepared, state = _start(task, checkpoints)
        if done >= num_steps:  # stopped after its last step, before the model was written
            _export(task.stage, prepared, state, workdir)
            return Outcome(done)
        loop = _Loop(task, options, checkpoints, prepared, state, num_steps, stack)
        outcome = loop.run()
        if outcome.stopped_by is None:
            _export(task.stage, prepared, loop.state, workdir)
        return outcome


def _beyond(config: Any, num_steps: int) -> str:
    rate = float(make_schedule(config.optim, config.num_steps)(config.num_steps))
    return (
        f"--steps {num_steps} goes beyond the schedule's {config.num_steps} steps: the rest is "
        f"trained at its last learning rate, {rate:.3g}; --num-steps {num_steps} stretches it"
    )


def _start(task: Task, checkpoints: Checkpointer) -> tuple[Prepared, TrainState]:
    """The compiled step and the state to go on from; moves the data to where it was."""
    prepared = prepare(task.stage, make_mesh(task.stage.config.sharding))
    checkpoints.require_space(prepared.state, whole_run=True)
    if checkpoints.latest_step is None:
        return prepared, prepared.state
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), prepared.state
    )
    jax.tree.map(lambda x: x.delete(), prepared.state)  # room for what is read
    state, position = checkpoints.restore(abstract)
    try:
        task.batches.restore(position)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        damaged = checkpoints.folder / str(checkpoints.latest_step)
        raise UserError(
            f"{damaged} says no place in the data: it is damaged; delete that folder to go on from "
            "the one before"
        ) from error
    return prepared, state


@dataclasses.dataclass(frozen=True)
class _Started:
    """A step that the devices may still be busy with."""

    step: int
    metrics: Mapping[str, Any]
    ids: Sequence[str]
    batch: Mapping[str, np.ndarray]


class _Loop:
    """Steps, the newest of which is still being computed while the one before it is looked at.

    So the devices never wait, and yet every step is looked at. Before anything is saved, all steps
    have been: without `--on-nonfinite=skip` a checkpoint never lies behind a step that was not
    finite.
    """

    def __init__(self, task, options, checkpoints, prepared, state, num_steps, stack):
        self.task, self.options, self.checkpoints = task, options, checkpoints
        self.prepared, self.state, self.num_steps = prepared, state, num_steps
        self.step, self.loss = int(state.step), float("nan")
        self.started: collections.deque[_Started] = collections.deque()
        self.guard = NonFiniteGuard(
            options.workdir,
            action=options.on_nonfinite,
            limit=options.max_nonfinite,
            skipped=int(state.skipped),
        )
        peak = _peak(options)
        self.progress = Progress(
            task.stage.name,
            num_steps,
            step=self.step,
            units=task.units,
            flops=peak and _count_flops(task.stage, prepared),
            peak=peak,
        )
        stack.callback(self.progress.close)
        stack.enter_context(logging_redirect_tqdm())  # warnings go above the bar
        if self.step:
            self.progress.write(f"resumed from step {self.step} in {options.workdir}")
        self.log = None
        if jax.process_index() == 0:
            wandb = None if options.wandb is None else " ".join(options.wandb) or "dicode"
            self.log = MetricsLog(
                options.workdir,
                first_step=self.step + 1,
                wandb_project=wandb,
                config=config_lib.to_dict(task.stage.config),
            )
            stack.callback(self.log.close)
        folder = options.workdir / "profile" if options.profile else None
        profile = Profile(folder, first=self.step, notify=self.progress.write)
        self.profile = stack.enter_context(profile)
        self.signals = stack.enter_context(StopSignals(self.progress.write))

    def run(self) -> Outcome:
        task, workdir = self.task, self.options.workdir
        stopped_by = None
        while self.step < self.num_steps and stopped_by is None:
            self.profile.before(self.step + 1, self.look)
            if is_first := self.progress.is_new:
                self.progress.compiling()
            self.start_step()
            stopped_by = self.signals.stop_after(self.step)
            evaluates = task.evaluate is not None and self.is_due(self.options.eval_every)
            samples = task.sample is not None and self.is_due(self.options.sample_every)
            saves = self.is_due(self.options.checkpoint_every) or stopped_by is not None
            if is_first:
                jax.block_until_ready(self.started[-1].metrics)
                self.progress.compiled()
            self.look(ahead=1)
            self.checkpoints.check()
            evaluation = self.evaluate() if evaluates else {}
            if evaluates or samples or saves:
                self.look(extra=evaluation)
            with self.progress.pause():
                if saves:
                    position = task.batches.state()
                    self.checkpoints.save(self.step, self.state, position, evaluation)
                if samples:
                    with jax.set_mesh(self.prepared.mesh):
                        task.sample(
                            self.prepared.model_of(self.state), workdir / "samples", self.step
                        )
        self.checkpoints.close()
        return Outcome(self.step, self.loss, stopped_by)

    def is_due(self, every: int | None) -> bool:
        every = every or self.options.checkpoint_every
        return self.step % every == 0 or self.step == self.num_steps

    def start_step(self) -> None:
        batch = next(self.task.batches)
        ids = batch.pop("ids")
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            arrays = global_batch(batch, self.prepared.mesh)
            self.state, metrics = self.prepared.train_step(self.state, arrays)
        self.step += 1
        self.started.append(_Started(self.step, metrics, ids, batch))

    def look(self, *, ahead: int = 0, extra: Mapping[str, float] | None = None) -> None:
        """Waits for all steps but the newest `ahead`, checks and logs them.

        Args:
          extra: Goes into the line of the newest step.
        """
        while len(self.started) > ahead:
            started = self.started.popleft()
            fetched = jax.device_get(dict(started.metrics))
            metrics = {name: float(value) for name, value in fetched.items()}
            try:
                is_finite = self.guard.check(started.step, metrics, started.ids, started.batch)
            except UserError:
                self.checkpoints.wait()  # a save that is going on is of an earlier step: keep it
                raise
            self.loss = metrics["loss"]
            self.progress.advance(metrics)
            is_due = started.step % self.options.log_every == 0 or started.step == self.num_steps
            if is_due or extra or not is_finite:
                metrics |= {"skipped": self.guard.skipped} | self.progress.rates() | (extra or {})
                del metrics["finite"]
                if self.log is not None:
                    self.log.write(started.step, metrics)

    def evaluate(self) -> dict[str, float]:
        jax.block_until_ready(self.started[-1].metrics)  # its time is the step's, not ours
        with self.progress.pause(), jax.set_mesh(self.prepared.mesh):
            metrics = self.task.evaluate(self.prepared.model_of(self.state))
        return {name: float(value) for name, value in metrics.items()}


def _is_exported(checkpoints: Checkpointer, workdir: pathlib.Path) -> bool:
    model, latest = workdir / MODEL, checkpoints.folder / str(checkpoints.latest_step)
    return model.is_dir() and model.stat().st_mtime >= latest.stat().st_mtime


def _export(stage: Stage, prepared: Prepared, state: TrainState, workdir: pathlib.Path) -> None:
    """Writes `workdir/model` anew, whole or not at all."""
    graph, arrays = nnx.split(prepared.model_of(state))
    model = nnx.merge(graph, gather_to_host(arrays))
    if jax.process_index() == 0:
        _write_model(stage, model, workdir)
    multihost_utils.sync_global_devices("model")  # nobody leaves before it is written


def _write_model(stage: Stage, model: nnx.Module, workdir: pathlib.Path) -> None:
    try:
        with folders.new_folder(workdir / MODEL, overwrite=True) as folder:
            stage.export(model, folder)
    except UserError as error:
        raise UserError(
            f"{error}; the checkpoint is whole, and `dicode export {workdir} --out MODEL` writes "
            "the model elsewhere"
        ) from error


def _peak(options: RunOptions) -> float | None:
    """FLOPs per second of all devices, None when unknown."""
    one = flops.peak_flops(jax.devices()[0])
    if options.peak_tflops is not None:
        one = options.peak_tflops * 1e12
    return one and one * jax.device_count()


def _count_flops(stage: Stage, prepared: Prepared) -> float | None:
    """Of one step over all devices; None when a loop's length is known only when it runs."""
    plan, batch = prepared.plan, stage.batch_shapes(stage.config.batch_size)
    try:
        with jax.set_mesh(prepared.mesh):
            return flops.count_flops(plan.step, plan.state, plan.frozen, batch).model
    except ValueError:
        return None


def main(
    prog: str,
    build: Callable[[Any, pathlib.Path], Task],
    config_types: tuple[type, ...],
    argv: Sequence[str] | None = None,
    *,
    settle: Callable[..., Any] = lambda config, workdir, faults: config,
    build_stage: Callable[[Any], Stage] | None = None,
) -> int:
    """Command line of a training: `python -m PROG --config FILE [--field value ...]`.

    Args:
      prog: Name of the module that is run.
      build: Makes the task from its config and the run's folder.
      config_types: Configs that this training takes.
      argv: Arguments, those of the process by default.
      settle: `(config, workdir, faults) -> config` fills in what the config leaves to the folders
        it names and to the run's own, before the run notes it, and tells what is wrong.
      build_stage: Makes the stage of a config; with it the batch is fitted to the machine.

    Returns:
      The exit status: 0 at the end, and after SIGTERM or SIGHUP once steps are done (143 or 129
      before), 2 after a mistake of the user, 130 after Ctrl-C.
    """
    workdir = config = None
    allocator.keep()
    try:
        with polite_signals():  # while there is no step to save
            said = command.parse(argv, config_types, _options, prog=prog, about=_first_line(build))
            options, workdir = said.options, said.options.workdir
            distributed.initialize(**dataclasses.asdict(said.processes))
            compile_cache.use()
            faults = Faults()
            config = settle(find_sources(said.config, faults), workdir, faults)
            if build_stage is not None:
                preflight.tell_found(said, config)
                config = preflight.fit(said, config, build_stage, workdir)
            check(workdir, config)  # a folder that is refused does not even get a lock
            with hold(workdir):
                if longer := claim(workdir, config):
                    print(longer, flush=True)
                outcome = run(build(config, workdir), options)
    except UserError as error:
        return leave(2, f"error: {error}")
    except KeyboardInterrupt as interrupt:
        return leave(
            exit_status(interrupt),
            f"stopped; the same command goes on from the last checkpoint in {workdir}",
        )
    except Exception as error:
        is_memory = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXH" in str(error)
        if is_memory or isinstance(error, MemoryError):
            return leave(2, f"error: {_out_of_memory(config)}")
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()  # a bug here, or another process that is gone
        return leave(
            1,
            "error: this process ends, and with it the whole run; started again on all hosts, it "
            "goes on from its last checkpoint",
        )
    if jax.process_index() != 0:
        pass
    elif outcome.stopped_by is not None:
        print(
            f"{prog}: {outcome.stopped_by.name} at step {outcome.step}, which is saved; the same "
            f"command goes on from there in {options.workdir}"
        )
    else:
        loss = f", last loss {outcome.loss:.6g}" if math.isfinite(outcome.loss) else ""
        print(f"{prog}: done{loss}; everything is in {options.workdir}")
    return 130 if outcome.stopped_by == signal.SIGINT else 0


def _out_of_memory(config: Any) -> str:
    if config is None:
        return "out of memory"
    batch, parts = config.batch_size, config.optim.accumulate_steps
    return (
        f"out of memory with batches of {batch} in {parts} part{'s' * (parts > 1)}: take "
        f"--optim.accumulate-steps {2 * parts}, which gives the same update in more parts, or a "
        f"smaller --batch-size; what was saved stays, and a run goes on from it"
    )


def _options(config_name: str) -> RunOptions:
    return RunOptions(workdir=pathlib.Path("runs", config_name))


def _first_line(build: Callable) -> str:
    return (build.__doc__ or "").splitlines()[0]


def leave(status: int, line: str) -> int:
    """Says why a run ends early; with several processes ends this one at once.

    The others would else wait for it in their next common computation, and it for them at the exit.
    """
    print(line, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(status)
    return status

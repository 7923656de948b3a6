"""The loop that all trainings share: restore, step, log, sample, save.

A training is a `Task`: what is trained, on what, with which loss, and how its samples look. The
task files (`train/ar.py` and its neighbours) build one and hand it to `run`.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says about a run, whatever is trained.

    Attributes:
      workdir: Folder of the run: `config.json`, `metrics.jsonl`, `checkpoints/`, `samples/`,
        `model/`.
      steps: Stop after this many steps in all; None takes the config's.
      log_every: Steps between two log lines.
      checkpoint_every: Steps between two checkpoints.
      sample_every: Steps between two sample sheets.
    """

    workdir: pathlib.Path
    steps: int | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 500


@dataclasses.dataclass(kw_only=True)
class Task:
    """Everything that one training needs.

    Attributes:
      name: For the progress bar.
      config: The resolved config; has `num_steps`, `optim`, `seed` and `ema_decay`.
      graph: Graph definition of the model, split into `(trained, frozen)`.
      trained: State that is trained.
      frozen: State that is not.
      loss_fn: `(model, batch, key) -> (loss, metrics)`.
      batches: Checkpointable iterator of dictionaries of arrays.
      sample: `(model, folder, step) -> metrics` writes a sample sheet; None for no samples.
      export: `(model, folder) -> None` writes the weights for later use.
    """

    name: str
    config: Any
    graph: nnx.GraphDef
    trained: nnx.State
    frozen: nnx.State
    loss_fn: Callable
    batches: Any
    sample: Callable[[nnx.Module, pathlib.Path, int], dict[str, float]] | None = None
    export: Callable[[nnx.Module, pathlib.Path], None] | None = None


def run(task: Task, options: RunOptions) -> float:
    """Trains until the last step; goes on where an earlier run in the same folder stopped.

    Returns:
      The last loss.

    Raises:
      UserError: The folder cannot be written or belongs to another config; the loss is not finite.
    """
    from tqdm import tqdm

    from dicode_jax.checkpoint import Checkpointer
    from dicode_jax.training.logs import MetricsLog
    from dicode_jax.training.optim import make_optimizer, make_schedule
    from dicode_jax.training.state import create_state, make_train_step

    config, workdir = task.config, options.workdir
    num_steps = options.steps or config.num_steps

    # Optimiser and state
    tx = make_optimizer(config.optim, config.num_steps)
    rng = jax.random.key(config.seed)
    state = create_state(task.trained, tx, rng, use_ema=config.ema_decay > 0)
    step_fn = make_train_step(
        task.graph,
        task.loss_fn,
        tx,
        make_schedule(config.optim, config.num_steps),
        ema_decay=config.ema_decay,
    )
    train_step = functools.partial(jax.jit(step_fn, donate_argnums=0), frozen=task.frozen)

    # Restore
    checkpoints = Checkpointer(workdir)
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state, task.batches)
        print(f"{task.name}: resumed from step {int(state.step)} in {workdir}", flush=True)
    step = int(state.step)
    if step >= num_steps:
        print(f"{task.name}: {workdir} is already at step {step} of {num_steps}; nothing to do")
        checkpoints.close()
        return float("nan")

    def model_of(state) -> nnx.Module:
        params = state.params if state.ema is None else state.ema
        return nnx.merge(task.graph, params, task.frozen)

    def save(state) -> None:
        checkpoints.save(int(state.step), state, task.batches)
        if task.export is not None:
            task.export(model_of(state), workdir / "model")

    # Loop
    log = MetricsLog(workdir)
    bar = tqdm(
        total=num_steps, initial=step, desc=task.name, unit="step", mininterval=1.0, file=sys.stderr
    )
    since, since_step, loss = time.perf_counter(), step, float("nan")
    try:
        while step < num_steps:
            state, metrics = train_step(state, batch=next(task.batches))
            step += 1
            bar.update()
            last = step == num_steps
            samples = task.sample is not None and (step % options.sample_every == 0 or last)
            if step % options.log_every == 0 or samples or last:
                values = {name: float(value) for name, value in metrics.items()}
                loss = values["loss"]
                if not np.isfinite(loss):
                    raise UserError(
                        f"{task.name}: the loss is {loss} at step {step}; the last checkpoint is "
                        f"step {checkpoints.latest_step}. Lower --optim.lr or look at the data"
                    )
                values["steps_per_second"] = (step - since_step) / (time.perf_counter() - since)
                if samples:
                    values |= task.sample(model_of(state), workdir / "samples", step)
                since, since_step = time.perf_counter(), step
                log.write(step, values)
                bar.set_postfix(loss=f"{loss:.4g}", lr=f"{values['lr']:.2g}", refresh=False)
            if step % options.checkpoint_every == 0 or last:
                save(state)
        checkpoints.wait()
    finally:
        bar.close()
        log.close()
        checkpoints.close()
    return loss


def claim(workdir: pathlib.Path, config: Any) -> None:
    """Makes the folder and writes the config, or checks that it is the one of the earlier run."""
    try:
        (workdir / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from error
    path = workdir / "config.json"
    if not path.is_file():
        config_lib.to_json(config, path)
        return
    earlier = _leaves(config_lib.to_dict(config_lib.from_json(type(config), path)))
    now = _leaves(config_lib.to_dict(config))
    changed = [
        f"{k} {earlier.get(k)} -> {now.get(k)}"
        for k in sorted({*earlier, *now})
        if earlier.get(k) != now.get(k)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}); "
            "take another --workdir"
        )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    out = {}
    for key, value in tree.items():
        out |= _leaves(value, f"{prefix}{key}.")
    return out


def main(
    prog: str,
    build: Callable[[Any, pathlib.Path], Task],
    config_types: tuple[type, ...],
    argv: Sequence[str] | None = None,
) -> int:
    """Command line of a training: `python -m PROG --config FILE --workdir DIR [--field value ...]`.

    Args:
      prog: Name of the module that is run.
      build: Makes the task from its config and the run's folder.
      config_types: Configs that this training takes.
      argv: Arguments, those of the process by default.

    Returns:
      The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=build.__doc__.splitlines()[0],
        epilog="Any field of the config can be overridden: --optim.lr 1e-4. "
        "`--config FILE --help-config` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="config file, such as configs/shapes_ar.py")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run")
    parser.add_argument("--steps", type=_positive, help="stop after N steps in all")
    parser.add_argument("--log-every", type=_positive, default=50, metavar="N")
    parser.add_argument("--checkpoint-every", type=_positive, default=500, metavar="N")
    parser.add_argument("--sample-every", type=_positive, default=500, metavar="N")
    parser.add_argument("--help-config", action="store_true", help="list the fields of the config")
    args, overrides = parser.parse_known_args(argv)
    try:
        config = config_lib.load_config_file(args.config)
        if not isinstance(config, config_types):
            wanted = " or ".join(kind.__name__ for kind in config_types)
            raise UserError(
                f"{args.config} configures {type(config).__name__}; {prog} wants {wanted}"
            )
        overrides = ["--help"] if args.help_config else overrides
        config = config_lib.parse_overrides(config, overrides, prog=f"python -m {prog}")
        options = RunOptions(
            workdir=args.workdir,
            steps=args.steps,
            log_every=args.log_every,
            checkpoint_every=args.checkpoint_every,
            sample_every=args.sample_every,
        )
        _use_compilation_cache()
        claim(args.workdir, config)
        loss = run(build(config, args.workdir), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last checkpoint in {args.workdir}")
        return 130
    print(f"{prog}: done, last loss {loss:.6g}; everything is in {args.workdir}")
    return 0


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the environment already says where."""
    if not jax.config.jax_compilation_cache_dir:
        folder = pathlib.Path.home() / ".cache" / "dicode_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

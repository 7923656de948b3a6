"""Commands about trainings: `dicode metrics` and `dicode export`."""

import argparse
import logging
import os
import pathlib
import shutil
import sys

from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines.options import Whole, number

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
OVERVIEW_ROWS = 20


def add_parsers(command) -> None:
    """Declares the commands' options; `command(name, summary, details)` makes a parser."""
    sub = command(
        "metrics",
        "show what a training logged",
        "A step that was done twice, because the run was killed and resumed, counts once.",
    )
    sub.add_argument("workdir", metavar="DIR", help="folder of the run")
    sub.add_argument(
        "--out", metavar="FILE", help="also draw the curves: " + _listed(PLOT_SUFFIXES)
    )
    sub.add_argument(
        "--last",
        type=number(int, Whole(1)),
        metavar="N",
        help="the last N logged steps as they are (default: means over parts of the whole run)",
    )

    sub = command(
        "export",
        "make a model of a training's checkpoint",
        "A run of the language model is put together with the tokenizer it was trained on.",
    )
    sub.add_argument(
        "checkpoint", metavar="CKPT", help="folder of a run, or one of its checkpoints"
    )
    sub.add_argument("--out", required=True, metavar="MODEL", help="the folder to make")
    sub.add_argument(
        "--step",
        type=number(int, Whole(1)),
        metavar="N",
        help="which checkpoint (default: the newest)",
    )
    sub.add_argument(
        "--no-ema", action="store_true", help="the last weights, not their moving average"
    )
    sub.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder or owner/name with `tokenizer` and `decoder` (default: what the run names)",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="storage type of the weights (default: float32)",
    )
    sub.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar="FIELD=VALUE",
        help="what else the model's config shall say, such as generation.var-scale=0.1",
    )


def metrics(args: argparse.Namespace) -> None:
    """Prints a table of what a run logged, and draws its curves."""
    from dicode_jax.storage.files import atomic_path, check_output
    from dicode_jax.training import curves
    from dicode_jax.training.logs import read_log

    if args.out is not None:
        check_output(args.out, PLOT_SUFFIXES)
    path = pathlib.Path(args.workdir) / "metrics.jsonl"
    if not os.path.isfile(path):
        raise UserError(f"no metrics.jsonl in {args.workdir}; name the --workdir of a training")
    records, passed_over = read_log(path)
    if not curves.metric_names(records):
        others = f" (lines of anything else: {passed_over})" if passed_over else ""
        raise UserError(
            f"{path} holds no step yet{others}; the training writes one every --log-every"
        )
    shown = curves.summarize(records, OVERVIEW_ROWS) if args.last is None else records[-args.last :]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(curves.table(shown, width=width))
    first, last = records[0]["step"], records[-1]["step"]
    print(f"{len(records)} logged steps, {first} to {last}")
    if passed_over:
        print(f"lines passed over, as they are no step's: {passed_over}")
    if args.out is not None:
        with atomic_path(args.out) as temporary:
            curves.plot(records, temporary, title=printable(args.workdir, 80))
        print(f"{args.out}: curves")


def export(args: argparse.Namespace) -> None:
    """Writes a pipeline folder from a checkpoint."""
    from dicode_jax.stages.export import export

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax misses a file that it does not need
    done = export(
        args.checkpoint,
        args.out,
        step=args.step,
        use_ema=not args.no_ema,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        settings=args.set,
    )
    hint = "parts that trainings read"
    if done.is_pipeline:
        command = 'generate "..."' if done.generates else "reconstruct VIDEO"
        hint = f"dicode {command} --model {args.out} --out out.mp4"
    print(f"{args.out}: step {done.step}; {hint}")


def _listed(suffixes) -> str:
    return ", ".join(suffixes[:-1]) + " or " + suffixes[-1]

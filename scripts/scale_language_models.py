"""Whether larger language models write better clips: held-out loss and prompt accuracy over size.

    python -m scripts.scale_language_models runs/lm_1 runs/lm_2 runs/lm_3 --out scaling.json

Each folder is a finished run of `train.ar` on the shapes world; all had the same data, tokenizer
and number of steps. Loss is that of captions no training saw, as the run measured it last. Accuracy
is the share of clips of such captions in which `evaluation.shapes` reads what the caption says,
with 95 % intervals of a bootstrap over clips; clip i has the same caption and seed for all models.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from flax import nnx

import dicode_jax
from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.evaluation import accuracy
from dicode_jax.stages.export import export
from dicode_jax.storage.files import atomic_path, check_output
from dicode_jax.training.logs import read_metrics

FIELDS = ("color", "shape", "motion", "background", "size", "all")
LOSS = "validation_loss"
SETTINGS = ("generation.logits_temperature=0.3", "generation.var_scale=0.1")  # as `shapes` has them
AT_ONCE = 8


def of_run(folder: pathlib.Path, num: int, seed: int, steps: int | None) -> dict:
    """Parameters, steps, last loss and accuracy of a run, of clips painted in these many steps.

    Raises:
      UserError: There is no such run, or it measured no loss.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    losses = [row[LOSS] for row in rows if LOSS in row]
    if not losses:
        raise UserError(f"{folder} is no run with a loss of held-out captions")
    with tempfile.TemporaryDirectory() as made:
        export(folder, f"{made}/model", settings=SETTINGS)
        pipe = dicode_jax.load(f"{made}/model")
    body = nnx.state(pipe.parts["language_model"], nnx.Param)
    scenes, seeds, judged = accuracy.scenes(num, seed), accuracy.seeds(num, seed), []
    for i in range(0, num, AT_ONCE):
        some = scenes[i : i + AT_ONCE]
        captions, drawn = [scene.caption for scene in some], seeds[i : i + AT_ONCE]
        clips = np.asarray(pipe(captions, seed=drawn, progress=False, num_inference_steps=steps))
        judged += [accuracy.judged(scene.attributes, clip) for scene, clip in zip(some, clips)]
    found = accuracy.summary(judged)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(body)),
        "steps": config_lib.read_json(folder / "config.json")[1]["num_steps"],
        "loss": losses[-1],
        "accuracy": {
            field: [found[field].mean, found[field].low, found[field].high] for field in FIELDS
        },
    }


def table(rows: list[dict]) -> str:
    """What was found, in Markdown."""
    lines = ["| parameters | held-out loss | " + " | ".join(FIELDS) + " |"]
    lines.append("|---" * (2 + len(FIELDS)) + "|")
    for row in rows:
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*row["accuracy"][field]) for field in FIELDS]
        lines.append(f"| {row['parameters']:,} | {row['loss']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path) -> None:
    """Loss and accuracy over parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = np.array([row["parameters"] for row in rows])
    left.plot(sizes, [row["loss"] for row in rows], marker="o")
    left.set(ylabel="loss of held-out captions")
    for i, field in enumerate(FIELDS):
        mean, low, high = np.array([row["accuracy"][field] for row in rows]).T
        places = sizes * (1 + 0.02 * (i - 2.5))  # side by side: intervals are hidden otherwise
        right.errorbar(places, mean, (mean - low, high - mean), marker=".", capsize=2, label=field)
    right.set(ylabel="share of clips as their captions say", ylim=(-0.02, 1.02))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set(xlabel="parameters of the language model", xscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder of a run of train.ar")
    parser.add_argument("--num", type=int, default=64, help="clips of each model")
    parser.add_argument("--steps", type=int, help="of a clip; the model's own by default")
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .json of all numbers")
    parser.add_argument("--plot", metavar="FILE", help="a .png of them")
    args = parser.parse_args(argv)
    if args.num < 1:
        raise UserError("--num must be at least 1")
    check_output(args.out, (".json",))
    if args.plot is not None:
        check_output(args.plot, (".png",))
    rows = [of_run(pathlib.Path(run), args.num, args.seed, args.steps) for run in args.runs]
    rows.sort(key=lambda row: row["parameters"])
    if len({row["steps"] for row in rows}) > 1:
        raise UserError("the runs took different numbers of steps: their losses do not compare")
    print(table(rows))
    with atomic_path(args.out) as temporary:
        temporary.write_text(json.dumps(rows, indent=1))
    if args.plot is not None:
        with atomic_path(args.plot) as temporary:
            plot(rows, temporary)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

"""Scores a small LanDiff of the shapes world: guidance, motion score, and how windows join.

    python -m scripts.score_landiff --model landiff-shapes --out scores.json --plot scores.png

Captions hold combinations of colour, shape and motion that are not in training; sample i has the
same seed throughout. For each scale of the language model's guidance: the shares of clips in which
`evaluation.shapes` reads what the caption says, with 95 % intervals from a bootstrap. For each
motion score: how much moves in the clips, by the measure that the score was made of. For each way
that a further window begins, and each noise on that beginning: border ratio, and the share of
videos whose last two seconds show colour, shape and background of the caption.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence

import numpy as np

import dicode_jax
from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation import long_video
from dicode_jax.evaluation.intervals import interval
from dicode_jax.models.landiff.motion import frame_motion
from dicode_jax.pipelines.load import pipeline_kind
from dicode_jax.storage import hub
from dicode_jax.storage.files import atomic_path, check_output
from scripts.score_lags import FIELDS, shares

CARRY = ("latents", "frames")


def guidance(pipe, scenes: Sequence, scales: Sequence[float], options: dict) -> dict:
    """Scale -> shares of clips with their intervals."""
    captions, found = [scene.caption for scene in scenes], {}
    for scale in scales:
        clips = np.asarray(pipe(captions, guidance_scale=scale, **options))
        found[str(scale)] = shares(scenes, clips, FIELDS)
    return found


def motion(pipe, scenes: Sequence, scores: Sequence[float], options: dict) -> dict:
    """Motion score -> mean change of grey a frame, as a share of all grey, and its interval."""
    captions, found = [scene.caption for scene in scenes], {}
    for score in scores:
        clips = np.asarray(pipe(captions, motion_score=score, **options))
        moved = interval(float(frame_motion(clip)[1:].mean()) for clip in clips)
        found[str(score)] = [moved.mean, moved.low, moved.high]
    return found


def joins(pipe, scenes: Sequence, num_clips: int, noises: Sequence[int], options: dict) -> dict:
    """Way of going on and history noise -> border ratio and what lasts, with their intervals."""
    captions, found = [scene.caption for scene in scenes], {}
    first, step = pipe.num_frames(1), pipe.num_frames(2) - pipe.num_frames(1)
    starts = range(first, pipe.num_frames(num_clips), step)
    size = round(long_video.SECONDS * pipe.config.fps)
    for carry, noise in itertools.product(CARRY, noises):
        asked = {"carry": carry, "history_noise": noise, "num_clips": num_clips, **options}
        rows = [
            long_video.measured(scene.attributes, video, size, starts)
            for scene, video in zip(scenes, np.asarray(pipe(captions, **asked)), strict=True)
        ]
        told = long_video.summary(rows)
        names = {"border": "border ratio", "last": "color, shape, background in the last clip"}
        found[f"{carry}, history noise {noise}"] = {
            key: [told[name].mean, told[name].low, told[name].high] for key, name in names.items()
        }
    return found


def tables(found: dict) -> str:
    """What was found, as tables of Markdown."""
    cell = "{:.2f} ({:.2f} to {:.2f})".format
    lines = [
        "| guidance | " + " | ".join((*FIELDS, "all")) + " |",
        "|---" * (len(FIELDS) + 2) + "|",
    ]
    for scale, row in found["guidance"].items():
        lines.append(f"| {scale} | " + " | ".join(cell(*row[f]) for f in (*FIELDS, "all")) + " |")
    lines += ["", "| motion score | change of grey a frame, of 1,000 |", "|---|---|"]
    for score, row in found["motion"].items():
        lines.append(f"| {score} | {cell(*(1000 * x for x in row))} |")
    lines += ["", "| a window begins with | border ratio | lasts |", "|---|---|---|"]
    for name, row in found["joins"].items():
        lines.append(f"| {name} | {cell(*row['border'])} | {cell(*row['last'])} |")
    return "\n".join(lines)


def plot(found: dict, path) -> None:
    """Shares over guidance, motion over the score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = list(map(float, found["guidance"]))
    for i, field in enumerate((*FIELDS, "all")):
        rows = np.array([row[field] for row in found["guidance"].values()])
        places = np.array(scales) + 0.02 * (i - 2)  # side by side: intervals are hidden otherwise
        _errors(left, places, rows, field)
    left.set(xlabel="guidance of the language model", ylabel="share of clips as their captions say")
    left.set_ylim(-0.02, 1.02)
    left.legend(fontsize=8)
    rows = 1000 * np.array(list(found["motion"].values()))
    _errors(right, np.array(list(map(float, found["motion"]))), rows, None)
    right.set(xlabel="motion score", ylabel="change of grey a frame, thousandths")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=110)


def _errors(axes, places: np.ndarray, rows: np.ndarray, label: str | None) -> None:
    mean, low, high = rows.T
    axes.errorbar(places, mean, (mean - low, high - mean), marker=".", capsize=2, label=label)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="landiff-shapes", help="a pipeline's folder or name")
    parser.add_argument("--num-clips", type=int, default=32, help="of held-out captions")
    parser.add_argument("--num-long", type=int, default=8, help="long videos of each way")
    parser.add_argument("--windows", type=int, default=9, help="of a long video")
    parser.add_argument("--guidance", type=float, nargs="+", default=(1.0, 1.5, 2.0, 3.0, 5.0))
    parser.add_argument("--motion", type=float, nargs="+", default=(0.0, 0.2, 0.4, 0.6))
    parser.add_argument("--history-noise", type=int, nargs="+", default=(0, 50), metavar="T")
    parser.add_argument("--steps", type=int, help="of a window; the model's own by default")
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .json of all numbers")
    parser.add_argument("--plot", required=True, metavar="FILE", help="a .png")
    args = parser.parse_args(argv)
    if args.num_clips < 1 or args.num_long < 1 or args.windows < 2:
        raise UserError("--num-clips and --num-long must be at least 1, --windows at least 2")
    check_output(args.out, (".json",))
    check_output(args.plot, (".png",))
    if (kind := pipeline_kind(hub.find_model(args.model))) != "landiff":
        raise UserError(f"{args.model} is of the kind {kind}, and this scores LanDiff")
    pipe = dicode_jax.load(args.model)
    count = max(args.num_clips, args.num_long)
    scenes = [shapes_world.scene_at(args.seed + 1000, i, "test") for i in range(count)]
    short, options = scenes[: args.num_clips], {"seed": args.seed, "progress": False}
    options["num_inference_steps"] = args.steps
    found = {"num_clips": len(short), "num_long": args.num_long, "windows": args.windows}
    found["guidance"] = guidance(pipe, short, args.guidance, options)
    found["motion"] = motion(pipe, short, args.motion, options)
    long = scenes[: args.num_long]
    found["joins"] = joins(pipe, long, args.windows, args.history_noise, options)
    print(tables(found))
    with atomic_path(args.out) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    with atomic_path(args.plot) as temporary:
        plot(found, temporary)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

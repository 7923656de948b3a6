"""Scores a small AR-Diffusion of the shapes world: what the lag costs and gives, and what drifts.

    python -m scripts.score_lags --model ar-shapes --out lags.json --plot lags.png

Captions hold combinations of colour, shape and motion that are not in training. For each lag one
video of a window is made for each of them, all from the same noise: calls of the network, seconds,
the shares in which `evaluation.shapes` reads what the caption says, with 95 % intervals from a
bootstrap, and FD-shapes, the Frechet distance to true clips of the same captions on features of
the packaged classifier of this world (no FVD). Then long videos with and without noise on the
frames that are done: the share of each 16 frames in which colour, shape and background are still
those of the caption. A longer video of this world goes back over its path, which a model of one
window does not know, so motion does not count there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

import dicode_jax
from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation import networks, shapes
from dicode_jax.evaluation.frechet import frechet_distance
from dicode_jax.evaluation.intervals import interval
from dicode_jax.pipelines.load import pipeline_kind
from dicode_jax.storage import hub
from dicode_jax.storage.files import atomic_path, check_output

LAGS = (0, 5, 10, 25, 50)
FIELDS = ("color", "shape", "motion", "background")
LASTING = ("color", "shape", "background")


def score(pipe, scenes: Sequence, lags: Sequence[int], options: dict, encode: Callable) -> dict:
    """Lag -> calls, seconds of a video, shares with their intervals, distance.

    Args:
      pipe: Of AR-Diffusion, with captions as its classes.
      scenes: Of `data.shapes_world`, held out.
      lags: To try.
      options: Of the pipeline besides.
      encode: Clips uint8 [f, h, w, 3] to features [b, d].
    """
    true = encode([shapes_world.render(scene)[0] for scene in scenes])
    captions, found = [scene.caption for scene in scenes], {}
    for lag in lags:
        start = time.perf_counter()
        clips = np.asarray(pipe(captions, num_frames=shapes_world.NUM_FRAMES, lag=lag, **options))
        seconds = (time.perf_counter() - start) / len(scenes)
        steps = options.get("num_inference_steps") or pipe.config.sampling.num_inference_steps
        found[str(lag)] = {
            "calls": steps + (shapes_world.NUM_FRAMES - 1) * lag,
            "seconds": seconds,
            **shares(scenes, clips, FIELDS),
            "fd_shapes": frechet_distance(encode(clips), true),
        }
    return found


def drift(pipe, scenes: Sequence, num_frames: int, noises: Sequence[int], options: dict) -> dict:
    """History noise -> the shares of each 16 frames, in order."""
    captions, found, size = [scene.caption for scene in scenes], {}, shapes_world.NUM_FRAMES
    for noise in noises:
        videos = np.asarray(pipe(captions, num_frames=num_frames, history_noise=noise, **options))
        parts = [videos[:, i : i + size] for i in range(0, num_frames, size)]
        found[str(noise)] = [shares(scenes, part, LASTING) for part in parts]
    return found


def shares(scenes: Sequence, clips: Sequence[np.ndarray], fields: Sequence[str]) -> dict:
    """Field -> the share of clips that show what their captions say, and the ends of its interval.

    `all` is that of clips in which all fields do.
    """
    judged = [
        shapes.judge(clip).matches(scene.attributes)
        for scene, clip in zip(scenes, clips, strict=True)
    ]
    rows = np.array([[match[field] for field in fields] for match in judged], float)
    told = {field: interval(rows[:, i]) for i, field in enumerate(fields)}
    told["all"] = interval(rows.min(axis=1))
    return {field: [x.mean, x.low, x.high] for field, x in told.items()}


def table(found: dict) -> str:
    """Rows of Markdown, a lag each."""
    lines = [
        "| lag | calls | s | " + " | ".join((*FIELDS, "all")) + " | FD-shapes |",
        "|---" * (len(FIELDS) + 5) + "|",
    ]
    for lag, row in found.items():
        cells = [lag, str(row["calls"]), f"{row['seconds']:.2f}"]
        cells += ["{:.2f} ({:.2f} to {:.2f})".format(*row[field]) for field in (*FIELDS, "all")]
        lines.append("| " + " | ".join([*cells, f"{row['fd_shapes']:.3f}"]) + " |")
    return "\n".join(lines)


def plot(lags: dict, drifts: dict, path) -> None:
    """Shares over calls, and over the frames of long videos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    calls = [row["calls"] for row in lags.values()]
    for field in ("color", "shape", "motion", "all"):
        mean, low, high = np.array([row[field] for row in lags.values()]).T
        left.errorbar(calls, mean, (mean - low, high - mean), marker=".", capsize=2, label=field)
    left.set_xticks(calls, [f"{row['calls']}\nlag {lag}" for lag, row in lags.items()])
    left.set_xlabel("calls of the network for 16 frames")
    for i, (noise, parts) in enumerate(drifts.items()):
        ends = shapes_world.NUM_FRAMES * (1 + np.arange(len(parts)))
        for field, line in (("color", ":"), ("shape", "--"), ("all", "-")):
            mean = [part[field][0] for part in parts]
            name = f"{field}, history noise {noise}"
            right.plot(ends, mean, line, color=f"C{i}", marker=".", label=name)
    right.set_xlabel("frame")
    for axes in (left, right):
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("share of videos as their captions say")
    figure.savefig(path, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ar-shapes", help="a pipeline's folder or name")
    parser.add_argument("--num-clips", type=int, default=64, help="of held-out captions")
    parser.add_argument("--num-long", type=int, default=16, help="long videos; 0 for none")
    parser.add_argument("--num-frames", type=int, default=128, help="of a long video")
    parser.add_argument("--lags", type=int, nargs="+", default=LAGS)
    parser.add_argument("--long-lag", type=int, default=5, help="of long videos")
    parser.add_argument("--history-noise", type=int, nargs="+", default=(0, 20), metavar="T")
    parser.add_argument("--steps", type=int, help="of each frame; the model's own by default")
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .json of all numbers")
    parser.add_argument("--plot", required=True, metavar="FILE", help="a .png")
    args = parser.parse_args(argv)
    if args.num_clips < 2 or args.num_long < 0:
        raise UserError("--num-clips must be at least 2, --num-long at least 0")
    if args.num_frames % shapes_world.NUM_FRAMES or args.num_frames < 1:
        raise UserError(f"--num-frames must be a multiple of {shapes_world.NUM_FRAMES}")
    check_output(args.out, (".json",))
    check_output(args.plot, (".png",))
    if (kind := pipeline_kind(hub.find_model(args.model))) != "ar_diffusion":
        raise UserError(f"{args.model} is of the kind {kind}, which has no lag")
    pipe = dicode_jax.load(args.model)
    count = max(args.num_clips, args.num_long)
    scenes = [shapes_world.scene_at(args.seed + 1000, i, "test") for i in range(count)]
    options = {"seed": args.seed, "num_inference_steps": args.steps}
    lags = score(pipe, scenes[: args.num_clips], args.lags, options, networks.shapes())
    print(table(lags))
    long, drifts = scenes[: args.num_long], {}
    if long:
        options["lag"] = args.long_lag
        drifts = drift(pipe, long, args.num_frames, args.history_noise, options)
    for noise, parts in drifts.items():
        print(f"history noise {noise}:", *(f"{part['all'][0]:.2f}" for part in parts))
    with atomic_path(args.out) as temporary:
        report = {"num_clips": args.num_clips, "num_long": len(long), "lags": lags, "drift": drifts}
        temporary.write_text(json.dumps(report, indent=1))
    with atomic_path(args.plot) as temporary:
        plot(lags, drifts, temporary)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

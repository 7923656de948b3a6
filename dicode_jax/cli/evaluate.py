"""`dicode evaluate`: suites of measures of a model, as JSON and as a page with plots."""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from dicode_jax.cli import distances, evaluate_text, evaluated_lists, video
from dicode_jax.cli.evaluate_arguments import METRICS, OF_PAINTING
from dicode_jax.cli.evaluate_run import (
    SHEET_ROWS,
    Run,
    check_floors,
    is_named,
    made_folder,
    options_of,
    prompts_of,
    square,
    wanted,
)
from dicode_jax.errors import UserError

MAX_ROW = 4000  # of scenes; each has a million seeds of its own
AT_ONCE = 8  # clips that a model is asked for in one call


def evaluate(args: argparse.Namespace) -> None:
    """Runs `dicode evaluate`."""
    from dicode_jax.evaluation import report

    _check(args)
    out = pathlib.Path(args.out)
    earlier = report.earlier(out)  # what cannot be added to is known before anything is painted
    if args.videos is not None:
        with made_folder(out):  # known to be fit before the networks run
            found = distances.compare(args, functools.partial(wanted, args))
            print(report.table(found.values))
            page = report.write(found, out, "distances")
            check_floors(args, found.values)
            video.say(f"{page}: of {found.settings['count of each']} videos each")
            return
    folder, kind = video.find(args, "dicode", "ar_diffusion", "landiff")
    if args.lag is not None and kind != "ar_diffusion":
        raise UserError("--lag is for AR-Diffusion models")
    is_list = args.suite is None and bool(_lists(args))
    if is_list:
        evaluated_lists.plan(args)  # what is wrong is known before the model loads
    suite = args.suite or "shapes"
    if not is_list:
        _check_report(args, suite, kind, folder, earlier)
    judge = None if is_list else JUDGES.get(suite, lambda args: None)(args)
    with made_folder(out):
        pipe = video.load(args, folder)
        start = time.monotonic()
        if is_list:
            count = evaluated_lists.paint(args, folder, pipe, options_of(args, pipe))
            video.say(f"{out}: {count} videos in {time.monotonic() - start:.1f} s")
            return
        run = Run(args, out, folder, pipe, suite, judge)
        page = RUNS[suite](run)
        video.say(f"{page}: {run.num} in {time.monotonic() - start:.1f} s")


def _check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together.

    Raises:
      UserError: They do not.
    """
    lists = _lists(args)
    if (args.videos is None) != (args.reference is None):
        raise UserError("--videos and --reference go together")
    if args.videos is not None and (args.model is not None or args.suite is not None or lists):
        raise UserError("--videos goes without MODEL, --suite and lists: no model is loaded")
    painting = [name for name, off in OF_PAINTING.items() if getattr(args, name) != off]
    if args.videos is not None and painting:
        option = painting[0].replace("_", "-")
        raise UserError(f"--{option} is for models that paint: --videos loads none")
    is_text = args.suite == "text" and lists != ["--vbench-prompts"]
    if len(lists) > 1 or (lists and args.suite is not None and not is_text):
        raise UserError("--suite, --prompts and --vbench-prompts go one at a time")
    if (not lists or args.suite is not None) and args.seed > MAX_ROW:
        raise UserError(f"--seed names a row of scenes here, 0 to {MAX_ROW}; got {args.seed}")
    if args.samples_per_prompt is not None and not lists:
        raise UserError("--samples-per-prompt is for --prompts and --vbench-prompts")
    suite = "distances" if args.videos is not None else args.suite or "shapes"
    is_list = args.suite is None and bool(lists)
    of_suite = {"--lpips": "reconstruction", "--num-clips": "long", "--clip": "text"}
    for option, one in of_suite.items():
        if getattr(args, option[2:].replace("-", "_")) is not None and args.suite != one:
            raise UserError(f"{option} is for --suite {one}")
    for name in ("i3d", "inception", "features"):
        if getattr(args, name) is not None and (is_list or suite not in ("shapes", "distances")):
            raise UserError(f"--{name} is for --videos and --suite shapes")
    if args.num is not None and (is_list or args.videos is not None):
        raise UserError("--num is for suites: of folders and lists nothing is left out")
    if args.fps is not None and args.videos is None:
        raise UserError("--fps is for --videos")
    bounds = args.at_least + args.at_most
    if is_list and (args.metrics is not None or bounds):
        raise UserError(
            "--metrics, --at-least and --at-most are for suites and --videos: a list is painted"
        )
    if odd := [name for name in args.metrics or () if name not in METRICS[suite]]:
        where = "--videos" if suite == "distances" else f"--suite {suite}"
        raise UserError(f"{where} has no {odd[0]}; it has {', '.join(METRICS[suite])}")
    for name, _ in () if is_list else bounds:
        if not is_named(name, METRICS[suite]):
            raise UserError(
                f"--at-least and --at-most: {name!r} names none of {', '.join(METRICS[suite])}"
            )
        if not wanted(args, name):
            raise UserError(f"--at-least and --at-most: {name!r} is none of --metrics")
    if suite == "text" and not is_list and args.clip is None:
        raise UserError(
            "--suite text needs --clip DIR, both towers of CLIP as `python -m convert open_clip` "
            "writes them"
        )
    if args.metrics is not None and "lpips" in args.metrics and args.lpips is None:
        raise UserError("--metrics lpips needs --lpips DIR, its converted weights")


def _lists(args: argparse.Namespace) -> list[str]:
    """The options that name lists of prompts, of those that are given."""
    lists = {"--prompts": args.prompts, "--vbench-prompts": args.vbench_prompts}
    return [name for name, path in lists.items() if path is not None]


def _check_report(
    args: argparse.Namespace,
    suite: str,
    kind: str,
    folder: pathlib.Path,
    earlier: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuses what a model cannot be asked for, and reports of two models in one folder.

    Raises:
      UserError: It is such.
    """
    if suite == "tokens" and kind != "dicode":
        raise UserError("--suite tokens is for DiCoDe models, which have deep tokens")
    if suite == "long" and kind == "ar_diffusion" and args.num_frames is not None:
        raise UserError("--suite long: how long videos of this model are is --num-clips")
    for name, one in earlier.items():
        other = one["settings"].get("model")
        if other is not None and pathlib.Path(other).resolve() != folder.resolve():
            raise UserError(
                f"{args.out} holds the suite {name} of another model, {other}; name another folder"
            )


def _shapes(run: Run) -> pathlib.Path:
    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import accuracy, distribution, networks

    scenes = run.scenes()
    chosen = run.judge
    if chosen:
        distribution.check_counts(run.num, run.num)
    prompts, clips, rows = prompts_of(run.pipe, scenes), [], []

    def paint(numbers, seeds):
        return run.pipe([prompts[i] for i in numbers], seed=seeds, **run.options)

    most = evaluate_text.first_frames(run.fps)
    for scene, whole in zip(scenes, run.kept("clips", paint, AT_ONCE)):
        clip = whole[:most]
        with square(run.folder):
            rows.append(accuracy.judged(scene.attributes, clip))
        clips += [clip] * (len(clips) < SHEET_ROWS or bool(chosen))
    captions = [scene.caption for scene in scenes]
    values: dict[str, Any] = dict(accuracy.summary(rows))
    notes, told = dict(accuracy.NOTES), {}
    for network in chosen:
        network = dataclasses.replace(network, fps=network.fps or shapes_world.FPS)
        drawn = (shapes_world.render(scene)[0] for scene in scenes)
        first, second = (
            network(network.clip(one, fps, "a clip") for one in each)
            for each, fps in ((clips, run.fps), (drawn, shapes_world.FPS))
        )
        found = distribution.between(network, first, second, run.wanted)
        values |= found
        notes |= {name: note for name, note in networks.NOTES.items() if name in found}
        told |= distances.told(network)
    return run.report(
        "Do clips show what their captions say?",
        (clips[:SHEET_ROWS], captions),
        values=values,
        notes=notes,
        told=told,
        plots=accuracy.plots([scene.attributes for scene in scenes], rows),
        rows=[{"caption": caption, **row} for caption, row in zip(captions, rows)],
    )


def _reconstruction(run: Run) -> pathlib.Path:
    import numpy as np

    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import reconstruction

    scenes, pipe = run.scenes(), run.pipe
    size, length = _frame_size(pipe), run.args.num_frames or _clip_length(pipe)

    def true(number):
        return shapes_world.render(scenes[number], num_frames=length, frame_size=size)[0]

    def paint(numbers, seeds):
        if pipe.kind == "ar_diffusion":
            return [pipe.reconstruct(true(i)) for i in numbers]
        if pipe.kind == "landiff":
            told = [(true(i), scenes[i].caption) for i in numbers]
            pairs = zip(told, seeds, strict=True)
            return [pipe.reconstruct(*one, seed=seed, **run.options)[0] for one, seed in pairs]
        tokens = [pipe.encode(true(i)) for i in numbers]
        return pipe.decode(np.stack(tokens), seed=seeds, **run.options)

    if pipe.kind == "ar_diffusion":
        cfg = pipe.parts["vae"].cfg
        floor = "thumbnail of as many numbers"
        without = functools.partial(
            reconstruction.thumbnails, numbers=cfg.num_tokens * cfg.token_dim
        )
    else:
        floor, without = "repeated keyframes", reconstruction.repeated  # the first and the last
    rows, floors, sheet = [], [], []
    for i, clip in enumerate(run.kept("reconstructions", paint, AT_ONCE)):
        drawn = true(i)
        if clip.shape != drawn.shape:
            raise UserError(f"this model paints clips of {clip.shape}, not of {drawn.shape}")
        rows.append(reconstruction.measured(drawn, clip, run.judge))
        floors.append(reconstruction.measured(drawn, without(drawn), run.judge))
        sheet += [drawn, clip] if len(sheet) < SHEET_ROWS else []
    own, other = reconstruction.summary(rows), reconstruction.summary(floors)
    values = {
        **own,
        **{f"{name} of the floor": x for name, x in other.items() if name[:4] != "mean"},
        "psnr above the floor": reconstruction.above(rows, floors),
    }
    captions = [scene.caption for scene in scenes]
    labels = [f"{what}: {caption}" for caption in captions for what in ("drawn", "painted again")]
    return run.report(
        "How near do clips come to the true ones?",
        (sheet, labels),
        values=values,
        notes={**reconstruction.NOTES, "this floor": floor},
        plots=reconstruction.plots({"model": rows, floor: floors}),
        rows=[
            {"caption": caption, **{name: [float(x) for x in row[name]] for name in row}}
            for caption, row in zip(captions, rows)
        ],
    )


def _long(run: Run) -> pathlib.Path:
    from dicode_jax.evaluation import long_video

    scenes, pipe = run.scenes(), run.pipe
    prompts, found, sheet = prompts_of(pipe, scenes), [], []
    length, num_frames, starts = _long_plan(run)

    def paint(numbers, seeds):
        return [
            pipe(prompts[i], seed=seed, **run.options | length)[0]
            for i, seed in zip(numbers, seeds)
        ]

    for scene, one in zip(scenes, run.kept("videos", paint, 1, **length)):
        with square(run.folder):
            found.append(long_video.measured(scene.attributes, one, num_frames, starts))
        sheet += [one] * (len(sheet) < SHEET_ROWS)
    num_clips = len(found[0]["clips"])
    captions = [scene.caption for scene in scenes]
    return run.report(
        f"Do videos of {num_clips} clips hold together?",
        (sheet, captions),
        values=long_video.summary(found),
        notes=long_video.NOTES,
        told=length,
        plots=long_video.plots(found),
        rows=[{"caption": caption, **row} for caption, row in zip(captions, found)],
    )


def _long_plan(run: Run) -> tuple[dict[str, int], int, range | None]:
    """How long the videos are, the frames of two seconds, and where a window starts in them."""
    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import long_video

    pipe, args = run.pipe, run.args
    if pipe.kind == "ar_diffusion":  # frame after frame: of no clips but those we cut
        return {"num_frames": 16 * (args.num_clips or 8)}, 16, None
    num_clips = args.num_clips or long_video.PER_MINUTE
    if pipe.kind == "dicode":
        return {"num_clips": num_clips}, args.num_frames or pipe.config.sampling.num_frames, None
    num_frames = round(shapes_world.NUM_FRAMES / shapes_world.FPS * pipe.config.fps)
    first, windows = pipe.num_frames(1), args.num_clips or 2
    step = pipe.num_frames(2) - first
    while args.num_clips is None and pipe.num_frames(windows) < num_clips * num_frames:
        windows += 1
    return {"num_clips": windows}, num_frames, range(first, pipe.num_frames(windows), step)


def _tokens(run: Run) -> pathlib.Path:
    import numpy as np

    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import accuracy, quality, shapes, tokens
    from dicode_jax.evaluation.intervals import interval
    from dicode_jax.media.video import contact_sheet

    pipe, scenes, args = run.pipe, run.scenes(), run.args
    if run.num < 2:
        raise UserError("--suite tokens takes means over videos; give --num 2 at least")
    size, length = pipe.config.frame_size, args.num_frames or pipe.config.sampling.num_frames
    seeds = accuracy.seeds(run.num, args.seed)
    drawn = [shapes_world.render(s, num_frames=length, frame_size=size)[0] for s in scenes]
    held = np.stack([pipe.encode(clip) for clip in drawn])
    count = held.shape[2]
    changed = {f"without token {i + 1}": tokens.without(held, i) for i in range(count)}
    changed |= {f"first tokens {i}": tokens.first(held, i) for i in range(1, count + 1)}
    sets = [held, *changed.values()]

    def paint(numbers, seeds):
        asked = np.stack([sets[i // run.num][i % run.num] for i in numbers])
        return np.asarray(pipe.decode(asked, seed=seeds, **run.options))

    painted = run.kept("tokens", paint, AT_ONCE, len(sets))
    whole = np.stack([next(painted) for _ in scenes])
    found: list[dict[str, Any]] = [{"caption": scene.caption} for scene in scenes]
    sweeps: dict[str, list] = {}
    values, sheets = {}, {}
    for name in changed:
        clips = np.stack([next(painted) for _ in scenes])
        errors = quality.squared_errors(whole, clips)
        rows = [
            shapes.judge(clip).matches(scene.attributes) | {"squared error": float(error)}
            for scene, clip, error in zip(scenes, clips, errors)
        ]
        sweep = name.rpartition(" ")[0]
        sweeps.setdefault(sweep, []).append(rows)
        sheets.setdefault(sweep, []).append((clips[0], name))
        for field in (*shapes.FIELDS, "squared error"):
            values[f"{name}: {field}"] = interval(row[field] for row in rows)
        for one, row in zip(found, rows):
            one[name] = row
    for sweep, shown in sheets.items():
        shown = [(drawn[0], "drawn"), (whole[0], "all tokens"), *shown]
        contact_sheet(
            run.out / f"{sweep.replace(' ', '_')}.png",
            [clip for clip, _ in shown],
            labels=[label for _, label in shown],
        )
    way = tokens.between(held[0], held[1], 7)
    between = np.asarray(pipe.decode(way, seed=[seeds[0]] * len(way), **run.options))
    contact_sheet(run.out / "between.png", list(between))
    near = tokens.nearest(held, 3)
    shown = [(i, j) for i, others in enumerate(near[:3]) for j in (i, *others)]
    labels = [("" if i == j else "near it: ") + scenes[j].caption for i, j in shown]
    contact_sheet(run.out / "nearest.png", [drawn[j] for _, j in shown], labels=labels)
    return run.report(
        "What does each token carry?",
        (drawn[:SHEET_ROWS], [scene.caption for scene in scenes]),
        values=values,
        notes=tokens.NOTES,
        plots=tokens.plots(sweeps),
        rows=found,
        more={
            "Without each token": "without_token.png",
            "The first tokens": "first_tokens.png",
            "Between two videos": "between.png",
            "Nearest neighbours": "nearest.png",
        },
    )


def _frame_size(pipe) -> int:
    """Pixels of a side.

    Raises:
      UserError: The model paints no squares.
    """
    if pipe.kind == "landiff":
        height, width = pipe.frame_size
        if height != width:
            raise UserError(f"the drawn world is square, and this model paints {height}x{width}")
        return height
    if pipe.kind == "ar_diffusion":
        return pipe.parts["vae"].cfg.image_size
    return pipe.config.frame_size


def _clip_length(pipe) -> int:
    """Frames of a clip."""
    return pipe.num_frames(1) if pipe.kind == "landiff" else pipe.config.sampling.num_frames


def _networks(args: argparse.Namespace) -> list[Any]:
    """Those whose distances from drawn clips are asked for."""
    return distances.networks_of(args, functools.partial(wanted, args), is_default=False)


def _lpips(args: argparse.Namespace) -> Callable | None:
    """Distances of the frames of two clips, if they are asked for."""
    if args.lpips is None or not wanted(args, "lpips"):
        return None
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dicode_jax.models.lpips import LPIPS, LPIPSConfig
    from dicode_jax.storage import weights

    model, _ = weights.load_module(pathlib.Path(args.lpips), LPIPS, LPIPSConfig)
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, a, b: nnx.merge(graph, state)(a, b))

    def distances(one, other):
        one, other = (jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (one, other))
        return np.asarray(run(state, one, other), np.float64)

    return distances


RUNS = {
    "shapes": _shapes,
    "reconstruction": _reconstruction,
    "text": evaluate_text.text,
    "long": _long,
    "tokens": _tokens,
}
"""Suite -> what runs it."""
JUDGES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "shapes": _networks,
    "reconstruction": _lpips,
    "text": evaluate_text.towers,
}
"""Suite -> what loads the networks that it judges with, before the model."""

"""`dicode evaluate`: suites of measures of a model, as JSON and as a page with plots."""

import argparse
import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dicode_jax.cli import distances, evaluated_lists, video
from dicode_jax.cli.evaluate_arguments import SUITES
from dicode_jax.errors import UserError

MAX_ROW = 4000  # of scenes; each has a million seeds of its own
AT_ONCE = 8  # clips that a model is asked for in one call
SHEET_ROWS = 10


def evaluate(args: argparse.Namespace) -> None:
    """Runs `dicode evaluate`."""
    from dicode_jax.evaluation import report

    if args.lpips is not None and args.suite != "reconstruction":
        raise UserError("--lpips is for --suite reconstruction")
    if args.num_clips is not None and args.suite != "long":
        raise UserError("--num-clips is for --suite long")
    lists = {"--prompts": args.prompts, "--vbench-prompts": args.vbench_prompts}
    lists = [name for name, path in lists.items() if path is not None]
    if len(lists) > 1 or (lists and args.suite is not None):
        raise UserError("--suite, --prompts and --vbench-prompts go one at a time")
    if not lists and args.seed > MAX_ROW:
        raise UserError(f"--seed names a row of scenes here, 0 to {MAX_ROW}; got {args.seed}")
    if args.samples_per_prompt is not None and not lists:
        raise UserError("--samples-per-prompt is for --prompts and --vbench-prompts")
    out = pathlib.Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder; name another")
    if (args.videos is None) != (args.reference is None):
        raise UserError("--videos and --reference go together")
    if args.videos is not None:
        if args.model is not None or args.suite is not None or lists:
            raise UserError("--videos goes without MODEL, --suite and lists: no model is loaded")
        if args.features is None:
            raise UserError("--videos needs --features, a folder that train_shapes_features wrote")
        found = distances.compare(args)
        _make(out)
        print(report.table(found.values))
        video.say(f"{report.write(found, out)}: of {found.settings['count of each']} videos each")
        return
    folder, kind = video.find(args, "dicode", "ar_diffusion", "landiff")
    if kind == "landiff" and args.suite not in (None, "shapes"):
        raise UserError(f"--suite {args.suite} is not there for LanDiff yet; shapes and lists are")
    if args.lag is not None and kind != "ar_diffusion":
        raise UserError("--lag is for AR-Diffusion models")
    if lists:
        evaluated_lists.plan(args)  # what is wrong is known before the model loads
    pipe = video.load(args, folder)
    _make(out)
    start = time.monotonic()
    if lists:
        count = evaluated_lists.paint(args, pipe, _options(args, pipe))
        video.say(f"{out}: {count} videos in {time.monotonic() - start:.1f} s")
        return
    run = Run(args, out, folder, pipe)
    page = RUNS[run.suite](run)
    video.say(f"{page}: {run.num} in {time.monotonic() - start:.1f} s")


def _make(out: pathlib.Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror or error}") from error


class Run:
    """A model and what is asked of it."""

    def __init__(self, args: argparse.Namespace, out: pathlib.Path, folder: pathlib.Path, pipe):
        self.args, self.out, self.folder, self.pipe = args, out, folder, pipe
        self.suite = args.suite or "shapes"
        self.num = args.num or SUITES[self.suite]
        self.options = _options(args, pipe)

    def scenes(self) -> list[Any]:
        """The test split's scenes that all suites look at."""
        from dicode_jax.evaluation import accuracy

        return accuracy.scenes(self.num, self.args.seed)

    def kept(self, what: str, paint: Callable, at_once: int, **more: Any) -> Iterator[Any]:
        """Videos `[f, h, w, 3]` in order, kept in a folder of the output."""
        from dicode_jax.evaluation import accuracy, kept

        seeds = accuracy.seeds(self.num, self.args.seed)
        settings = {
            "model": str(self.folder.resolve()),
            "fingerprint": kept.fingerprint(self.folder),
            "dtype": self.args.dtype,
            "seed": self.args.seed,
            "options": self.options,
            **more,
        }
        make = lambda numbers: paint(numbers, [seeds[i] for i in numbers])  # noqa: E731
        place = self.out / what
        with video.progress_bar() as progress:
            progress("videos", 0, self.num)
            videos = kept.painted(make, self.num, place, settings, at_once=at_once)
            for i, one in enumerate(videos):
                progress("videos", i + 1, self.num)
                yield one

    def report(
        self, title: str, sheet: tuple[list, list[str]], more: dict | None = None, **found: Any
    ) -> pathlib.Path:
        """Writes the contact sheet and the report, and prints the table; gives the page's path."""
        from dicode_jax.evaluation import report
        from dicode_jax.media.video import contact_sheet

        contact_sheet(self.out / "sheet.png", sheet[0], labels=sheet[1][: len(sheet[0])])
        whole = report.Report(
            title=title,
            settings={
                "model": str(self.folder),
                "kind": self.pipe.kind,
                "suite": self.suite,
                "videos": self.num,
                "seed": self.args.seed,
                "dtype": self.args.dtype,
                **self.options,
            },
            pictures={f"The first {len(sheet[0])}": "sheet.png", **(more or {})},
            **found,
        )
        page = report.write(whole, self.out)
        print(report.table(whole.values))
        return page


def _options(args: argparse.Namespace, pipe) -> dict[str, Any]:
    """What the pipeline is called with besides prompts and seeds."""
    options = video.sampling(args)
    del options["seed"]
    if args.num_frames is not None:
        options["num_frames"] = args.num_frames
    if pipe.kind == "dicode":
        return options
    del options["clips_per_batch"]
    own = {"num_inference_steps", "guidance_scale"} | (
        {"num_frames"} if pipe.kind == "ar_diffusion" else set()
    )
    if odd := options.keys() - own:
        raise UserError(f"this model has no {', '.join(sorted(odd))}; leave it out")
    return options if args.lag is None else options | {"lag": args.lag}


def _prompts(pipe, scenes: Sequence[Any]) -> list[Any]:
    """What a pipeline is asked for scenes with: their captions, or the classes that say the same.

    Raises:
      UserError: The model has no class for a caption.
    """
    from dicode_jax.data.shapes_world import parse_caption

    if pipe.kind != "ar_diffusion":
        return [scene.caption for scene in scenes]
    named = {}
    for name in pipe.config.class_names:
        with contextlib.suppress(ValueError):
            named[parse_caption(name)] = name
    if missing := [s.caption for s in scenes if s.attributes not in named]:
        raise UserError(f"this model has no class {missing[0]!r}; it is none of the shapes world")
    return [named[scene.attributes] for scene in scenes]


def _shapes(run: Run) -> pathlib.Path:
    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import accuracy, distribution

    scenes = run.scenes()
    prompts, clips, rows = _prompts(run.pipe, scenes), [], []
    features = None
    if run.args.features is not None:
        features = distribution.shapes_features(run.args.features)

    def paint(numbers, seeds):
        return run.pipe([prompts[i] for i in numbers], seed=seeds, **run.options)

    seconds = shapes_world.NUM_FRAMES / shapes_world.FPS  # which the caption is about
    most = max(round(seconds * run.pipe.config.fps), 2)
    for scene, whole in zip(scenes, run.kept("clips", paint, AT_ONCE)):
        clip = whole[:most]
        with _square(run.folder):
            rows.append(accuracy.judged(scene.attributes, clip))
        clips += [clip] * (len(clips) < SHEET_ROWS or features is not None)
    captions = [scene.caption for scene in scenes]
    values: dict[str, Any] = dict(accuracy.summary(rows))
    notes = accuracy.NOTES
    if features is not None:
        drawn = [shapes_world.render(scene)[0] for scene in scenes]
        sets = [
            [features.clip(one, shapes_world.FPS, "a clip") for one in each]
            for each in (clips, drawn)
        ]
        values |= distribution.distances(features, *sets)
        notes |= distribution.NOTES | {"features": str(distribution.protocol(features))}
    return run.report(
        "Do clips show what their captions say?",
        (clips[:SHEET_ROWS], captions),
        values=values,
        notes=notes,
        plots=accuracy.plots([scene.attributes for scene in scenes], rows),
        rows=[{"caption": caption, **row} for caption, row in zip(captions, rows)],
    )


def _reconstruction(run: Run) -> pathlib.Path:
    import numpy as np

    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import reconstruction

    scenes, pipe = run.scenes(), run.pipe
    distances = None if run.args.lpips is None else _lpips(run.args.lpips)
    size, length = _frame_size(pipe), run.args.num_frames or pipe.config.sampling.num_frames

    def true(number):
        return shapes_world.render(scenes[number], num_frames=length, frame_size=size)[0]

    def paint(numbers, seeds):
        if pipe.kind == "ar_diffusion":
            return [pipe.reconstruct(true(i)) for i in numbers]
        tokens = [pipe.encode(true(i)) for i in numbers]
        return pipe.decode(np.stack(tokens), seed=seeds, **run.options)

    if pipe.kind == "ar_diffusion":
        cfg = pipe.parts["vae"].cfg
        floor = "thumbnail of as many numbers"
        without = functools.partial(
            reconstruction.thumbnails, numbers=cfg.num_tokens * cfg.token_dim
        )
    else:
        floor, without = "repeated keyframes", reconstruction.repeated
    rows, floors, sheet = [], [], []
    for i, clip in enumerate(run.kept("reconstructions", paint, AT_ONCE)):
        drawn = true(i)
        if clip.shape != drawn.shape:
            raise UserError(f"this model paints clips of {clip.shape}, not of {drawn.shape}")
        rows.append(reconstruction.measured(drawn, clip, distances))
        floors.append(reconstruction.measured(drawn, without(drawn), distances))
        sheet += [drawn, clip] if len(sheet) < SHEET_ROWS else []
    own, other = reconstruction.summary(rows), reconstruction.summary(floors)
    values = {
        **own,
        **{f"{name} of the floor": x for name, x in other.items() if name[:4] != "mean"},
        "psnr above the floor": own["psnr"].mean - other["psnr"].mean,
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

    scenes, pipe, args = run.scenes(), run.pipe, run.args
    prompts, found, sheet = _prompts(pipe, scenes), [], []
    is_rolled = pipe.kind == "ar_diffusion"  # frame after frame: of no clips but those we cut
    num_clips = args.num_clips or (8 if is_rolled else long_video.PER_MINUTE)
    num_frames = 16 if is_rolled else args.num_frames or pipe.config.sampling.num_frames
    length = {"num_frames": num_clips * num_frames} if is_rolled else {"num_clips": num_clips}

    def paint(numbers, seeds):
        return [
            pipe(prompts[i], seed=seed, **run.options | length)[0]
            for i, seed in zip(numbers, seeds)
        ]

    for scene, one in zip(scenes, run.kept("videos", paint, 1, **length)):
        with _square(run.folder):
            found.append(long_video.measured(scene.attributes, one, num_frames))
        sheet += [one] * (len(sheet) < SHEET_ROWS)
    captions = [scene.caption for scene in scenes]
    return run.report(
        f"Do videos of {num_clips} clips hold together?",
        (sheet, captions),
        values=long_video.summary(found),
        notes=long_video.NOTES,
        plots=long_video.plots(found),
        rows=[{"caption": caption, **row} for caption, row in zip(captions, found)],
    )


def _tokens(run: Run) -> pathlib.Path:
    import numpy as np

    from dicode_jax.data import shapes_world
    from dicode_jax.evaluation import accuracy, quality, shapes, tokens
    from dicode_jax.evaluation.intervals import interval
    from dicode_jax.media.video import contact_sheet

    pipe, scenes, args = run.pipe, run.scenes(), run.args
    if pipe.kind != "dicode":
        raise UserError("--suite tokens is for DiCoDe models, which have deep tokens")
    if run.num < 2:
        raise UserError("--suite tokens takes means over videos; give --num 2 at least")
    size, length = pipe.config.frame_size, args.num_frames or pipe.config.sampling.num_frames
    seeds = accuracy.seeds(run.num, args.seed)
    drawn = [shapes_world.render(s, num_frames=length, frame_size=size)[0] for s in scenes]
    held = np.stack([pipe.encode(clip) for clip in drawn])
    count = held.shape[2]
    whole = np.asarray(pipe.decode(held, seed=seeds, **run.options))
    changed = {
        "without token": [tokens.without(held, i) for i in range(count)],
        "first tokens": [tokens.first(held, i + 1) for i in range(count)],
    }
    sweeps, values = {}, {}
    with video.progress_bar() as progress:
        for number, (name, sets) in enumerate(changed.items()):
            places, pictures, labels = [], [drawn[0], whole[0]], ["drawn", "all tokens"]
            for i, one in enumerate(sets):
                clips = np.asarray(pipe.decode(one, seed=seeds, **run.options))
                errors = quality.squared_errors(whole, clips)
                rows = [
                    shapes.judge(clip).matches(scene.attributes) | {"squared error": float(error)}
                    for scene, clip, error in zip(scenes, clips, errors)
                ]
                places.append(rows)
                pictures.append(clips[0])
                labels.append(f"{name} {i + 1}")
                for field in shapes.FIELDS:
                    values[f"{name} {i + 1}: {field}"] = interval(float(r[field]) for r in rows)
                progress("sweeps", number * count + i + 1, 2 * count)
            sweeps[name] = places
            contact_sheet(run.out / f"{name.replace(' ', '_')}.png", pictures, labels=labels)
    way = tokens.between(held[0], held[1], 7)
    painted = np.asarray(pipe.decode(way, seed=[seeds[0]] * len(way), **run.options))
    contact_sheet(run.out / "between.png", list(painted))
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
        more={
            "Without each token": "without_token.png",
            "The first tokens": "first_tokens.png",
            "Between two videos": "between.png",
            "Nearest neighbours": "nearest.png",
        },
    )


RUNS = {"shapes": _shapes, "reconstruction": _reconstruction, "long": _long, "tokens": _tokens}


@contextlib.contextmanager
def _square(folder: pathlib.Path) -> Iterator[None]:
    """What the judge does not take becomes one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"clips of {folder} cannot be judged: {error}") from error


def _frame_size(pipe) -> int:
    if pipe.kind == "ar_diffusion":
        return pipe.parts["vae"].cfg.image_size
    return pipe.config.frame_size


def _lpips(folder: str) -> Callable:
    """Distances of the frames of two clips."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dicode_jax.models.lpips import LPIPS, LPIPSConfig
    from dicode_jax.storage import weights

    model, _ = weights.load_module(pathlib.Path(folder), LPIPS, LPIPSConfig)
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, a, b: nnx.merge(graph, state)(a, b))

    def distances(one, other):
        one, other = (jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (one, other))
        return np.asarray(run(state, one, other), np.float64)

    return distances

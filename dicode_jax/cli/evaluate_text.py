"""`dicode evaluate --suite text`: how near videos are to their prompts, by CLIP."""

import argparse
import pathlib
from typing import Any

from dicode_jax.cli import prompt_lists
from dicode_jax.cli.evaluate_run import SHEET_ROWS, Run, prompts_of, square
from dicode_jax.errors import UserError

AT_ONCE = 8  # clips that a model is asked for in one call


def first_frames(fps: float) -> int:
    """How many frames of a video of the shapes world its caption is about: two seconds."""
    from dicode_jax.data import shapes_world

    return max(round(shapes_world.NUM_FRAMES / shapes_world.FPS * fps), 2)


def towers(args: argparse.Namespace) -> Any:
    """CLIP.

    Raises:
      UserError: There is none with both towers and a vocabulary, or a list of prompts cannot be
        read.
    """
    from dicode_jax.evaluation import text as measures

    if args.prompts is not None:
        _entries(args)  # what is wrong is known before the model loads
    return measures.load(args.clip)


def _entries(args: argparse.Namespace) -> list[prompt_lists.Entry]:
    entries = prompt_lists.read_prompts(args.prompts)
    for number, entry in enumerate(entries, 1):
        if said := ["seed"] * (entry.seed is not None) + sorted(entry.options):
            raise UserError(
                f"{args.prompts}, prompt {number}: the suite text reads prompts alone, with seeds "
                f"of its own; leave {said[0]} out"
            )
    return entries


def text(run: Run) -> pathlib.Path:
    """The report of the suite.

    Of captions of the shapes world the judge reads the same clips, those of the suite `shapes`.

    Raises:
      UserError: The prompts cannot be read, or the model does not know them.
    """
    from dicode_jax.evaluation import accuracy
    from dicode_jax.evaluation import text as measures

    clip: measures.Towers = run.judge
    more: dict[str, Any] = {}
    scenes = None
    if run.args.prompts is None:
        scenes = run.scenes()
        prompts, asked = [scene.caption for scene in scenes], prompts_of(run.pipe, scenes)
        most: int | None = first_frames(run.fps)
    else:
        entries = _entries(run.args)
        count = run.args.samples_per_prompt or 1
        prompts = [entry.prompt for entry in entries for _ in range(count)]
        more = {"prompts": prompts}
        prompts = prompts[: run.args.num]
        run.num, asked, most = len(prompts), prompts, None
    texts, others = clip.texts(prompts), measures.others(prompts)

    def paint(numbers, seeds):
        return run.pipe([asked[i] for i in numbers], seed=seeds, **run.options)

    rows, right, sheet = [], [], []
    place = "clips" if scenes is not None else "text"
    for i, whole in enumerate(run.kept(place, paint, AT_ONCE, **more)):
        video, other = whole[:most], others[i]
        rows.append(
            measures.measured(clip.images(video), texts[i], None if other is None else texts[other])
        )
        if scenes is not None:
            with square(run.folder):
                right.append(accuracy.judged(scenes[i].attributes, video))
        sheet += [video] * (len(sheet) < SHEET_ROWS)
    values, notes = dict(measures.summary(rows)), dict(measures.NOTES)
    if scenes is not None:
        values |= accuracy.summary(right)
        notes |= accuracy.NOTES
    found = [{name: [float(x) for x in row[name]] for name in row} for row in rows]
    return run.report(
        "How near are videos to their prompts?",
        (sheet, prompts),
        values=values,
        notes=notes,
        told={"CLIP": f"{run.args.clip}, weights {clip.digest}"},
        plots=measures.plots(rows),
        rows=[{"prompt": prompt, **row} for prompt, row in zip(prompts, found)],
    )

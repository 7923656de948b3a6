"""`dicode generate` of many videos, and what goes on from files: `continue`, `interpolate`."""

import argparse
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from dicode_jax.cli import generate as one
from dicode_jax.cli import landiff, prompt_lists, video
from dicode_jax.cli.arguments import LANDIFF
from dicode_jax.errors import UserError
from dicode_jax.pipelines.options import MAX_CLIPS

_OF_FILES = {"image": None, "last_image": None, "video": None}


def generate(args: argparse.Namespace) -> None:
    """Runs `dicode generate`: one video, or a folder of videos."""
    if args.prompts is None and args.num_videos_per_prompt is None:
        one.generate(args)
        return
    if args.prompts is not None and args.prompt:
        raise UserError("give one prompt, or a file of them with --prompts, not both")
    if args.sheet is not None:
        raise UserError("many videos have no sheet; leave --sheet out")
    if args.num_clips > MAX_CLIPS:
        raise UserError(f"of many videos each has at most {MAX_CLIPS} clips")
    if pathlib.Path(args.out).suffix.lower() in (".mp4", ".gif", ".webp"):
        raise UserError(f"--out is the folder of many videos, not a file, got {args.out}")
    files = {name: getattr(args, name) for name in _OF_FILES if getattr(args, name) is not None}
    if args.prompts is None:
        entries = [prompt_lists.Entry(prompt=args.prompt, options=files)]
        if not args.prompt.strip() and not files:
            raise UserError("the prompt is empty; say what to show")
    elif files:
        raise UserError("name the images and videos of a list in its file, one for each prompt")
    else:
        entries = prompt_lists.read_prompts(args.prompts)
    tasks = prompt_lists.plan(
        entries,
        seed=args.seed,
        num_videos_per_prompt=args.num_videos_per_prompt or 1,
        suffix=f".{args.format}",
    )
    folder, kind = video.find(args, "dicode", "dynamicrafter", "ar_diffusion", "landiff")
    own = video.BY_KIND.get(kind)
    given = _settings(args, kind) if own is None else own.settings(args, folder)
    given.pop("seed", None)
    load = video.load if own is None else own.load

    @functools.cache  # not for a folder that is whole
    def pipe() -> Any:
        made = load(args, folder)
        if kind == "landiff":
            landiff.say_cache(made, args.num_clips, None, given.get("guidance_scale"))
        return made

    def paint(task: prompt_lists.Task, path: pathlib.Path) -> Mapping[str, Any]:
        options = {**given, "num_clips": args.num_clips, **task.options}
        made = pipe()(task.prompt or None, seed=task.seed, progress=False, **options)[0]
        made.save(path)
        frames, height, width, _ = made.shape
        return {
            "frames": frames, "height": height, "width": width, "fps": made.fps,
            "record": made.record,
        }  # fmt: skip

    settings = {**given, **prompt_lists.model_of(folder)}
    settings |= {"dtype": args.dtype, "num_clips": args.num_clips}
    settings.pop("clips_per_batch", None)  # how fast it goes, and not what comes
    prompt_lists.paint_all(tasks, args.out, settings, paint, say=video.say)
    video.say(f"{args.out}: {len(tasks)} videos, told in {prompt_lists.MANIFEST}")


def _settings(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What the pipeline is told for all prompts."""
    given = {name: x for name, x in video.sampling(args).items() if name != "seed"}
    own = [name for name in LANDIFF if name not in ("offload", "caption")]
    for name in ("num_frames", "lag", "history_noise", *own):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if kind in ("ar_diffusion", "landiff") and given.get("clips_per_batch") == "auto":
        del given["clips_per_batch"]
    return given


def continue_(args: argparse.Namespace) -> None:
    """Runs `dicode continue`."""
    vars(args).update(_OF_FILES | {"video": args.video})
    one.generate(args)


def interpolate(args: argparse.Namespace) -> None:
    """Runs `dicode interpolate`."""
    vars(args).update(_OF_FILES | {"image": args.image, "last_image": args.last_image})
    one.generate(args)

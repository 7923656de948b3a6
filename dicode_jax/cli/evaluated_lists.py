"""`dicode evaluate --prompts` and `--vbench-prompts`: videos of lists of prompts."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from dicode_jax.cli import prompt_lists, video

VBENCH_SAMPLES = {"temporal_flickering": 25}  # of a prompt, by the list's name; of others 5


def plan(args: argparse.Namespace) -> tuple[pathlib.Path, list[prompt_lists.Task]]:
    """The folder of the videos, and the videos.

    VBench's are `LIST/PROMPT-INDEX.mp4`, where the list's name is that of a dimension.

    Raises:
      UserError: The list cannot be read, or a prompt can be no file's name.
    """
    out, count = pathlib.Path(args.out), args.samples_per_prompt
    if args.vbench_prompts is None:
        entries = prompt_lists.read_prompts(args.prompts)
        return out, prompt_lists.plan(entries, seed=args.seed, num_videos_per_prompt=count or 1)
    path = pathlib.Path(args.vbench_prompts)
    return out / path.stem, prompt_lists.plan(
        prompt_lists.read_prompts(path),
        seed=args.seed,
        num_videos_per_prompt=count or VBENCH_SAMPLES.get(path.stem, 5),
        name=lambda entry, index, seed: f"{entry.prompt}-{index}",
    )


def paint(args: argparse.Namespace, model: pathlib.Path, pipe, options: dict[str, Any]) -> int:
    """Writes the videos that are not there yet; gives how many there are.

    Raises:
      UserError: A prompt is refused, or a file cannot be written.
    """
    from dicode_jax.media.video import write_video

    folder, tasks = plan(args)

    def one(task: prompt_lists.Task, path: pathlib.Path) -> Mapping[str, Any]:
        made = pipe(task.prompt, seed=task.seed, **task.options, **options)
        write_video(path, made[0], pipe.config.fps)
        return {}

    settings = {**options, **prompt_lists.model_of(model), "dtype": args.dtype}
    settings.pop("clips_per_batch", None)  # how fast it goes, and not what comes
    prompt_lists.paint_all(tasks, folder, settings, one, say=video.say)
    return len(tasks)

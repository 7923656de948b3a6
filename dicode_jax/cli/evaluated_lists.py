"""`dicode evaluate --prompts` and `--vbench-prompts`: videos of lists of prompts."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from dicode_jax.cli import prompt_lists, video
from dicode_jax.cli.evaluate_run import frame_rate

VBENCH_SAMPLES = {"temporal_flickering": 25}  # of a prompt, by the list's name; of others 5


def plan(
    args: argparse.Namespace,
) -> tuple[pathlib.Path, pathlib.Path | None, list[prompt_lists.Task]]:
    """The folder of the videos, what tells of them if it is not in that folder, and the videos.

    VBench's are `LIST/PROMPT-INDEX.mp4`, where the list's name is that of a dimension. It takes the
    first file of the folder for a video, so that no other is there. A prompt that its lists of all
    dimensions name twice is painted once; a column `name` is what a file is called by where the
    text itself is a longer one.

    Raises:
      UserError: The list cannot be read, or a prompt can be no file's name.
    """
    out, count = pathlib.Path(args.out), args.samples_per_prompt
    if args.vbench_prompts is None:
        entries = prompt_lists.read_prompts(args.prompts)
        tasks = prompt_lists.plan(entries, seed=args.seed, num_videos_per_prompt=count or 1)
        return out, None, tasks
    path = pathlib.Path(args.vbench_prompts)
    entries = {repr(entry): entry for entry in prompt_lists.read_prompts(path)}
    tasks = prompt_lists.plan(
        list(entries.values()),
        seed=args.seed,
        num_videos_per_prompt=count or VBENCH_SAMPLES.get(path.stem, 5),
        name=lambda entry, index, seed: f"{entry.name or entry.prompt}-{index}",
    )
    return out / path.stem, out / f"{path.stem}.{prompt_lists.MANIFEST}", tasks


def paint(args: argparse.Namespace, model: pathlib.Path, pipe, options: dict[str, Any]) -> int:
    """Writes the videos that are not there yet; gives how many there are.

    Raises:
      UserError: A prompt is refused, or a file cannot be written.
    """
    from dicode_jax.media.video import write_video

    folder, manifest, tasks = plan(args)
    fps = frame_rate(pipe, options)

    def one(task: prompt_lists.Task, path: pathlib.Path) -> Mapping[str, Any]:
        made = pipe(task.prompt, seed=task.seed, **task.options, **options)
        write_video(path, made[0], fps)
        return {}

    settings = {**options, **prompt_lists.model_of(model), "dtype": args.dtype}
    settings.pop("clips_per_batch", None)  # how fast it goes, and not what comes
    prompt_lists.paint_all(tasks, folder, settings, one, say=video.say, manifest=manifest)
    return len(tasks)

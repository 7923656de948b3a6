"""`dicode evaluate --prompts` and `--vbench-prompts`: videos of lists of prompts."""

import argparse
import pathlib
import re
from typing import Any

from dicode_jax.cli import video
from dicode_jax.errors import UserError, printable

VBENCH_SAMPLES = {"temporal_flickering": 25}  # of a prompt, by the list's name; of others 5
MAX_NAME = 255  # bytes of a file's name on most systems


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; empty lines are passed over.

    Raises:
      UserError: It cannot be read, holds none, or one twice.
    """
    from dicode_jax.storage.files import read_small

    try:
        lines = read_small(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    if len(set(prompts)) < len(prompts):
        twice = next(p for i, p in enumerate(prompts) if p in prompts[:i])
        raise UserError(f"{path} holds the prompt {printable(twice, 80)!r} twice")
    return prompts


def named(args: argparse.Namespace, out: pathlib.Path) -> list[tuple[str, int, pathlib.Path]]:
    """Prompt, seed and file of each video of a list.

    Of `--prompts` a name is made of the prompt's words and its seed; VBench's are
    `LIST/PROMPT-INDEX.mp4`, where the list's name is that of a dimension.

    Raises:
      UserError: The list cannot be read, or a prompt can be no file's name.
    """
    vbench = args.vbench_prompts is not None
    path = pathlib.Path(args.vbench_prompts if vbench else args.prompts)
    samples = args.samples_per_prompt or (VBENCH_SAMPLES.get(path.stem, 5) if vbench else 1)
    found = []
    for prompt in read_prompts(str(path)):
        for i in range(samples):
            seed = args.seed + i
            if vbench:
                file = out / path.stem / f"{prompt}-{i}.mp4"
                name = f"{prompt}-{i}.part.mp4"
                if "/" in prompt or "\0" in prompt or len(name.encode()) > MAX_NAME:
                    raise UserError(
                        f"the prompt {printable(prompt, 80)!r} can be no file's name, which "
                        "VBench asks for"
                    )
            else:
                words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
                file = out / f"{words.encode()[:150].decode(errors='ignore')}-{seed}.mp4"
            found.append((prompt, seed, file))
    files = [file for *_, file in found]
    if len(set(files)) < len(files):
        same = next(f for i, f in enumerate(files) if f in files[:i])
        raise UserError(f"two prompts would both be written to {same}; make one differ sooner")
    return found


def paint(args: argparse.Namespace, out: pathlib.Path, pipe, options: dict[str, Any]) -> int:
    """Writes a video for each prompt and sample that has none yet; gives how many are there.

    Raises:
      UserError: A prompt is refused, or a file cannot be written.
    """
    import numpy as np

    from dicode_jax.media.video import write_video

    videos = named(args, out)
    with video.progress_bar() as progress:
        for i, (prompt, seed, file) in enumerate(videos):
            progress("videos", i, len(videos))
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                frames = np.asarray(pipe(prompt, seed=seed, **options)[0])
                write_video(file, frames, pipe.config.fps)
        progress("videos", len(videos), len(videos))
    return len(videos)

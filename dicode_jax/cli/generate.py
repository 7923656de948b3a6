"""`dicode generate` of one video: what each kind of model is asked for."""

import argparse
import pathlib
import time
from typing import Any

from dicode_jax.cli.arguments import CLIP_FRAMES
from dicode_jax.cli.video import (
    BY_KIND,
    check_outputs,
    find,
    load,
    progress_bar,
    read_given,
    read_image,
    sampling,
    write,
    write_frames,
)
from dicode_jax.errors import UserError
from dicode_jax.pipelines.options import MAX_CLIPS, named


def generate(args: argparse.Namespace) -> None:
    """Runs `dicode generate`."""
    if args.image is None and args.last_image is not None:
        raise UserError("--last-image goes with --image, the first frame")
    if args.image is not None and args.video is not None:
        raise UserError("give --image or --video to go on from, not both")
    images = [path for path in (args.image, args.last_image) if path is not None]
    check_outputs(args, *images, *(() if args.video is None else (args.video,)))
    images = [read_image(path) for path in images]
    folder, kind = find(args, "dicode", "dynamicrafter", "ar_diffusion", "landiff")
    if kind in BY_KIND:
        BY_KIND[kind].generate(args, folder, *images)
        return
    if kind == "ar_diffusion":
        _roll(args, folder, *images)
        return
    if args.lag is not None:
        raise UserError(f"{folder} is no AR-Diffusion model; leave --lag out")
    check_clip_frames(args)
    if not images and args.video is None and not args.prompt.strip():
        raise UserError("the prompt is empty; say what to show")
    if kind == "dynamicrafter":
        _animate(args, folder, *images)
        return
    if images or args.video is not None:
        go_on(args, folder, *images)
        return
    pipe = load(args, folder)
    start = time.monotonic()
    options = {"num_clips": args.num_clips, "num_frames": args.num_frames, **sampling(args)}
    paint = lambda progress: pipe.stream(args.prompt, progress=progress, **options)  # noqa: E731
    write(args, pipe, paint, args.num_clips, start, args.prompt)


def go_on(args: argparse.Namespace, folder, image=None, last_image=None) -> None:
    """Paints what follows an image or a video, or lies between two images, with deep tokens."""
    import numpy as np

    if args.num_clips > MAX_CLIPS:
        raise UserError(f"behind an image or a video at most {MAX_CLIPS} clips are painted at once")
    pipe = load(args, folder)
    start = time.monotonic()
    given = None if args.video is None else read_given(args.video, pipe)
    with progress_bar() as progress:
        video = pipe(
            args.prompt,
            image=image,
            last_image=last_image,
            video=given,
            num_clips=args.num_clips,
            num_frames=args.num_frames,
            progress=progress,
            **sampling(args),
        )
    label = args.prompt or pathlib.Path(str(args.image or args.video)).name
    frames = [] if given is None else [given]
    new = np.split(np.asarray(video[0])[0 if given is None else len(given) :], args.num_clips)
    write_frames(args, pipe, video[0], [*frames, *new], start, label)


def _animate(args: argparse.Namespace, folder, image=None, last_image=None) -> None:
    """Paints what follows an image, or lies between two."""
    if image is None:
        raise UserError(f"{folder} goes on from an image; name it with --image")
    if args.num_clips != 1:
        raise UserError(f"{folder} paints one clip; leave --num-clips out")
    pipe = load(args, folder)
    start = time.monotonic()
    options = {"image": image, "last_image": last_image, "num_frames": args.num_frames}
    with progress_bar() as progress:
        video = pipe(args.prompt, progress=progress, **options, **sampling(args))[0]
    label = args.prompt or pathlib.Path(args.image).name
    write_frames(args, pipe, video, [video.frames], start, label)


def _roll(args: argparse.Namespace, folder, image=None, last_image=None) -> None:
    """Paints frame after frame of one video."""
    settings = roll_settings(args, folder, last_image is not None or args.num_clips != 1)
    pipe = load(args, folder)
    start = time.monotonic()
    given = None if args.video is None else read_given(args.video, pipe)
    count = args.num_frames or pipe.config.sampling.num_frames + (
        0 if given is None else len(given)
    )
    settings |= {"image": image, "video": given, "num_frames": count}
    settings |= {"lag": args.lag, "history_noise": args.history_noise}

    def paint(progress):
        return pipe.stream(args.prompt or None, progress=progress, **settings)

    row, label = pipe.parts["denoiser"].cfg.dit.num_frames, args.prompt or folder.name
    write(args, pipe, paint, count, start, label, seconds=1 / pipe.config.fps, together=row)


def roll_settings(
    args: argparse.Namespace, folder: pathlib.Path, more: bool = False
) -> dict[str, Any]:
    """Options of sampling of an AR-Diffusion model.

    Raises:
      UserError: One is asked for that it does not have, or `more` of them.
    """
    settings = sampling(args)
    own = {"seed", "num_inference_steps", "guidance_scale", "guidance_interval"}
    others = settings.keys() - own
    if more or others != {"clips_per_batch"} or settings.pop("clips_per_batch") != "auto":
        raise UserError(
            f"{folder} has one sampler, steered by --steps, --guidance-scale and "
            "--guidance-interval alone, and goes on frame by frame; leave its other options, "
            "--last-image, --num-clips and --clips-per-batch out, --num-frames says how many"
        )
    return settings


def check_clip_frames(args: argparse.Namespace) -> None:
    """Refuses lengths that a video of AR-Diffusion can have, and a clip cannot."""
    if args.num_frames is not None:
        named("argument --num-frames", CLIP_FRAMES, args.num_frames)

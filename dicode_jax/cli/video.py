"""`dicode reconstruct`, `encode` and `decode`, and the steps that all share that paint."""

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import dicode_jax
from dicode_jax.cli.arguments import VIDEO_SUFFIXES
from dicode_jax.cli.landiff_options import LANDIFF
from dicode_jax.cli.token_files import check_tokens, read_arrays
from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines.options import MAX_CLIPS, MAX_FRAMES, check_seeds

TOKEN_SUFFIXES = (".safetensors",)
SHEET_SUFFIXES = (".png",)
TOKEN_FORMAT = "dicode_jax deep tokens"

SHEET_ROWS = 24
CAN = {
    "dicode": "generates, continues, interpolates, reconstructs, encodes and decodes",
    "dynamicrafter": "generates from --image, and interpolates",
    "divot": "decodes features",
    "ar_diffusion": "generates and continues",
    "landiff": "generates, continues, reconstructs, encodes and decodes",
}
"""Kind of pipeline -> what the commands do with it."""
BY_KIND: dict[str, Any] = {}
"""Kind -> a module above this one, which has itself put in, with a function for each command."""


def reconstruct(args: argparse.Namespace) -> None:
    """Runs `dicode reconstruct`."""
    check_outputs(args, args.video)
    _check_video(args.video, args.keyframes)
    folder, kind = find(args, "dicode", "landiff")
    if kind in BY_KIND:
        BY_KIND[kind].reconstruct(args, folder)
        return
    pipe = load(args, folder)
    start = time.monotonic()
    tokens, _ = _encode_keyframes(pipe, args.video, args.keyframes)
    _decode_tokens(args, pipe, tokens, start, pathlib.Path(args.video).name)


def encode(args: argparse.Namespace) -> None:
    """Runs `dicode encode`."""
    import json

    from dicode_jax.storage.files import atomic_path, check_output

    out = check_output(args.out, TOKEN_SUFFIXES, sources=[args.video])
    if os.path.exists(out):
        check_tokens(out)
    _check_video(args.video, args.keyframes)
    folder, kind = find(args, "dicode", "landiff")
    if kind in BY_KIND:
        BY_KIND[kind].encode(args, folder)
        return
    pipe = load(args, folder)
    start = time.monotonic()
    tokens, times = _encode_keyframes(pipe, args.video, args.keyframes)
    from safetensors.numpy import save_file

    metadata = {"format": TOKEN_FORMAT, "keyframe_times": json.dumps(times)}
    with atomic_path(args.out) as temporary:
        save_file({"tokens": tokens}, temporary, metadata=metadata)
    k, n, z = tokens.shape
    took = time.monotonic() - start
    say(f"{args.out}: {k} keyframes x {n} tokens x {z} numbers, in {took:.1f} s")


def decode(args: argparse.Namespace) -> None:
    """Runs `dicode decode`."""
    check_outputs(args, args.tokens)
    label, arrays = pathlib.Path(args.tokens).name, read_arrays(args.tokens)
    folder, kind = find(args, "dicode", "divot", "landiff")
    wanted = {"divot": "features", "landiff": "semantic_tokens"}.get(kind, "tokens")
    if wanted not in arrays:
        held = ", ".join(arrays)
        raise UserError(f"{label} holds {held}; {folder}, of the kind {kind!r}, decodes {wanted}")
    if kind == "divot" and args.num_frames is not None:
        raise UserError(f"{folder} paints clips of its own length; leave --num-frames out")
    if kind in BY_KIND:
        BY_KIND[kind].decode(args, folder, arrays[wanted])
        return
    pipe = load(args, folder)
    start = time.monotonic()
    if kind == "divot":
        _decode_features(args, pipe, start, label, **arrays)
    else:
        _decode_tokens(args, pipe, arrays["tokens"], start, label)


# Steps that commands share


def say(line: str) -> None:
    """Prints a line that may hold names of files or what a model says of itself."""
    print(printable(line, 2000))


def check_outputs(args: argparse.Namespace, *sources: str) -> None:
    """Refuses a video or a sheet that cannot be written, or that is one of the files read."""
    from dicode_jax.storage.files import check_output

    check_output(args.out, VIDEO_SUFFIXES, sources=sources)
    if args.sheet is not None:
        check_output(args.sheet, SHEET_SUFFIXES, sources=sources)


def find(args: argparse.Namespace, *kinds: str) -> tuple[pathlib.Path, str]:
    """Folder and kind of the model; jax is imported here and not before.

    Raises:
      UserError: There is no such model, or it is of a kind that the command is not for.
    """
    from dicode_jax.pipelines import load
    from dicode_jax.storage import hub

    folder = hub.find_model(args.model)
    kind = load.pipeline_kind(folder)
    if kind not in kinds:
        raise UserError(
            f"{folder} is of the kind {kind!r} and does not {args.command}; it {CAN[kind]}"
        )
    given = [name for name in LANDIFF if getattr(args, name, None) not in (None, False)]
    if kind != "landiff" and given:
        raise UserError(f"{folder} is no LanDiff model; leave --{given[0].replace('_', '-')} out")
    has_history = {"ar_diffusion", "landiff"}
    if kind not in has_history and getattr(args, "history_noise", None) is not None:
        raise UserError(f"{folder} has no frames that are done; leave --history-noise out")
    return folder, kind


def load(args: argparse.Namespace, folder: pathlib.Path, how: dict[str, Any] | None = None):
    """The pipeline, with weights and computing of the type and form that are asked for.

    Raises:
      UserError: The model is broken, or the device does not compute in that type or form.
    """
    import jax
    import jax.numpy as jnp

    from dicode_jax.runtime import compile_cache, kept_programs, platform

    args.stack.enter_context(kept_programs.use())
    if args.no_compile_cache:
        args.stack.enter_context(compile_cache.off())
    if args.attention != "auto":
        args.stack.enter_context(platform.tracing_for(attention=args.attention))
    if args.attention == "cudnn" and platform.platform() != "gpu":
        raise UserError(
            f"--attention cudnn is for NVIDIA's GPUs, this is a {platform.platform()}; take auto"
        )
    if args.attention == "cudnn" and args.dtype == "float32":
        raise UserError("--attention cudnn computes in half precision; add --dtype bfloat16")
    if args.dtype == "float16" and jax.devices()[0].platform == "cpu":
        raise UserError("a CPU does not compute in float16; take --dtype float32 or bfloat16")
    how = {} if how is None else {"how": how}
    if args.dtype == "auto":
        return dicode_jax.load(folder, **how)
    dtype = jnp.dtype(args.dtype)
    return dicode_jax.load(folder, dtype=dtype, param_dtype=dtype, **how)


def read_image(path: str):
    """uint8 [h, w, 3] of a picture, as it is to be shown."""
    import numpy as np

    from dicode_jax.media.picture import open_picture
    from dicode_jax.media.shown import shown_picture

    with open_picture(path, path) as image:
        return np.asarray(shown_picture(image))


def read_given(path: str, pipe, most: int = MAX_FRAMES):
    """uint8 [f, h, w, 3]: the frames of a file at the rate and in the size of the model.

    Raises:
      UserError: There are more than `most`, or the file cannot be read.
    """
    import numpy as np

    from dicode_jax.media.given import watched_frames

    frames = []
    with progress_bar() as progress:
        for frame in watched_frames(path, pipe.config.fps, progress):
            if len(frames) == most:
                raise UserError(
                    f"{path} has more than {most} frames at {pipe.config.fps:g} a second, which is "
                    f"what a video may have; cut it to {most / pipe.config.fps:.0f} seconds"
                )
            frames.append(pipe.fit_frame(frame.image))
    return np.stack(frames)


def _check_video(path: str, mode: str) -> None:
    """Opens the file, so that a wrong or too long one is known before the model loads."""
    from dicode_jax.media import video

    length = video.probe(path).duration
    if mode == "every" and length is not None:
        _check_clips(path, int(length / video.KEYFRAME_INTERVAL))


def _check_clips(label: str, count: int) -> None:
    if count > MAX_CLIPS:
        raise UserError(
            f"{label} has {count} clips or more; at most {MAX_CLIPS} are encoded or painted at once"
        )


def _encode_keyframes(pipe, path: str, mode: str):
    """Deep tokens float32 [k, n, z] of a file's keyframes, and their times in seconds."""
    import numpy as np

    from dicode_jax.media import video

    times = []
    with progress_bar() as progress:

        def images():
            for frame in video.iter_keyframes(path, mode):
                _check_clips(path, len(times))
                times.append(round(frame.time, 6))
                yield frame.image
                progress("keyframes", len(times), None)

        return np.asarray(pipe.encode_frames(images()), np.float32), times


def _decode_tokens(args: argparse.Namespace, pipe, tokens, start: float, label: str) -> None:
    num_clips = len(tokens) - 1
    _check_clips(label, num_clips)

    def paint(progress):
        return pipe.decode_stream(
            tokens, num_frames=args.num_frames, progress=progress, **sampling(args)
        )

    write(args, pipe, paint, num_clips, start, label)


def _decode_features(
    args: argparse.Namespace, pipe, start: float, label: str, features, null_features=None
) -> None:
    """Paints a clip for each set of features, one after the other."""
    seeds = check_seeds(args.seed, len(features))
    import numpy as np

    from dicode_jax.pipelines.painting import Clip

    given = {"null_features": null_features, **sampling(args), "progress": False}
    clips = (
        Clip(i, 0, np.asarray(pipe(one, **given | {"seed": seed})[0]))
        for i, (seed, one) in enumerate(zip(seeds, features, strict=True))
    )
    write(args, pipe, lambda _: clips, len(features), start, label)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What a pipeline is asked for besides its inputs."""
    options = {
        "seed": args.seed,
        "quality": args.quality,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "sampler": args.sampler,
        "eta": args.eta,
        "deep_cache_interval": args.deep_cache_interval,
        "clips_per_batch": args.clips_per_batch,
    }
    return {name: value for name, value in options.items() if value is not None}


def write(
    args: argparse.Namespace,
    pipe,
    paint: Callable[[Any], Iterator[Any]],
    num_clips: int,
    start: float,
    label: str,
    seconds: float | None = None,
    fps: float | None = None,
    together: int = 1,
) -> None:
    """Writes clips as they come, which `paint` gives of a progress, and the sheet at the end.

    A clip lasts as long as the model was made for, or so many seconds, or as its frames at `fps`.
    Those that the sheet shows are kept, so many of them together in a row.
    """
    import numpy as np

    from dicode_jax.media.video import contact_sheet
    from dicode_jax.media.writer import VideoWriter
    from dicode_jax.storage.files import part_of

    runs = -(-num_clips // together)
    rows = min(SHEET_ROWS, runs) if args.sheet else 0
    wanted = {round(i * (runs - 1) / max(rows - 1, 1)) for i in range(rows)}
    shown, starts = collections.defaultdict(list), [0]  # frames before each clip
    with progress_bar() as progress:
        clips = (clip.frames for clip in paint(progress))
        progress("clips", 0, num_clips)
        first = next(clips)
        f, h, w, _ = first.shape
        what = f"clips in {printable(part_of(args.out).name, 60)}"
        own = f / fps if fps else pipe.config.sampling.num_frames / pipe.config.fps
        lasts = own if seconds is None else seconds
        made = record(args, pipe)
        with VideoWriter(args.out, f / lasts, keep=True, record=made) as writer:
            for index, clip in enumerate(itertools.chain([first], clips)):
                writer.append(clip)
                writer.flush()
                starts.append(starts[-1] + len(clip))
                progress(what, index + 1, num_clips)
                if index // together in wanted:
                    shown[index // together * together].append(clip)
    times, took = [count * lasts / f for count in starts], time.monotonic() - start
    say(f"{args.out}: {starts[-1]} frames of {w} x {h}, {times[-1]:g} s, in {took:.1f} s")
    if args.sheet is None:
        return
    spans = [(times[i], times[i + len(shown[i])]) for i in list(shown)[1:]]
    labels = [label, *(f"{start:g} to {end:g} s" for start, end in spans)]
    contact_sheet(args.sheet, [np.concatenate(row) for row in shown.values()], labels=labels)
    say(f"{args.sheet}: contact sheet")


def write_frames(args, pipe, video, runs, start: float, label: str) -> None:
    """Writes a video that is in memory, and runs of its frames as a sheet."""
    from dicode_jax.media.sheet import contact_sheet
    from dicode_jax.media.writer import VideoWriter

    f, h, w, _ = video.shape
    with VideoWriter(args.out, video.fps, record=record(args, pipe)) as writer:
        writer.append(video.frames)
    took = time.monotonic() - start
    say(f"{args.out}: {f} frames of {w} x {h}, {f / video.fps:g} s, in {took:.1f} s")
    if args.sheet is not None:
        rows = runs[:SHEET_ROWS]
        contact_sheet(args.sheet, rows, labels=[label, *[""] * (len(rows) - 1)])
        say(f"{args.sheet}: contact sheet")


def record(args: argparse.Namespace, pipe) -> dict[str, Any]:
    """What an mp4 says of how the command made it."""
    names = ("command", "prompt", "num_clips", "num_frames", "lag", "history_noise", "keyframes")
    told = {name: getattr(args, name, None) for name in (*names, *LANDIFF)}
    for name in ("image", "last_image", "video", "tokens"):  # files, of which the name is enough
        if isinstance(path := getattr(args, name, None), str):
            told[name] = pathlib.Path(path).name
    settings = {name: x for name, x in sampling(args).items() if name != "clips_per_batch"}
    return pipe.record(**{n: x for n, x in told.items() if x not in (None, False)}, **settings)


def progress_bar() -> contextlib.AbstractContextManager[Callable[[str, int, Any], Any]]:
    """Gives `progress(what, done, total)`: a bar on a terminal, nothing elsewhere."""
    from dicode_jax.pipelines import progress

    return progress.shown()

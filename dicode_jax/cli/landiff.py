"""What `dicode` does with a model of LanDiff: options of its own, and one function a command."""

import argparse
import json
import math
import pathlib
import sys
import time
from typing import Any

from dicode_jax.cli import video as shared
from dicode_jax.cli.landiff_options import LANDIFF
from dicode_jax.errors import UserError

TOKEN_FORMAT = "dicode_jax semantic tokens"
FRAME_BYTES = 2**31  # of a video that is encoded, as a whole in memory
OTHERS = ("seed", "num_inference_steps", "guidance_scale", "clips_per_batch")  # that it has too


def generate(args: argparse.Namespace, folder: pathlib.Path, image=None, last_image=None) -> None:
    """Runs `dicode generate`."""
    if last_image is not None or args.lag is not None:
        raise UserError(f"{folder} goes on from what is given; leave --last-image and --lag out")
    if image is None and args.video is None and not args.prompt.strip():
        raise UserError("the prompt is empty; say what to show")
    asked, pipe, start = settings(args, folder), load(args, folder), time.monotonic()
    given = None
    if args.video is not None:
        with shared.progress_bar() as progress:
            given, length = pipe.read_end(args.video, progress)
        if len(given) < length:
            shared.say(f"{args.video}: goes on from the last {len(given)} of its {length} frames")
    scale = asked.get("guidance_scale")
    label = args.prompt or pathlib.Path(str(args.image or args.video)).name
    asked |= {"image": image, "video": given, "num_clips": args.num_clips}

    def paint(progress):
        clips = pipe.stream(args.prompt, progress=progress, **asked)
        say_cache(pipe, args.num_clips, args.prompt, scale)
        return clips

    shared.write(args, pipe, paint, args.num_clips, start, label, fps=pipe.config.fps)


def say_cache(pipe: Any, num_clips: int, prompt: str | None, guidance_scale: float | None) -> None:
    """Says what the language model remembers of a video; of no prompt in particular, at most."""
    default = pipe.config.sampling.guidance_scale
    is_guided = (default if guidance_scale is None else guidance_scale) != 1
    size = pipe.cache_bytes(num_clips, prompt, is_guided=is_guided)
    size = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
    most = "at most " if prompt is None else ""
    shared.say(f"the language model takes {most}{size} for what it has written")


def encode(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Runs `dicode encode`."""
    from safetensors.numpy import save_file

    from dicode_jax.storage.files import atomic_path

    _refuse_keyframes(args, folder)
    pipe, start = load(args, folder), time.monotonic()
    frames = _whole_video(args, pipe)
    tokens = pipe.encode(frames)
    metadata = {"format": TOKEN_FORMAT, "frames": json.dumps(len(frames))}
    with atomic_path(args.out) as temporary:
        save_file({"semantic_tokens": tokens}, temporary, metadata=metadata)
    took = time.monotonic() - start
    shared.say(f"{args.out}: {len(tokens)} tokens of {len(frames)} frames, in {took:.1f} s")


def decode(args: argparse.Namespace, folder: pathlib.Path, tokens) -> None:
    """Runs `dicode decode`."""
    asked = _painting(args, folder)
    pipe, start = load(args, folder), time.monotonic()
    _paint(args, pipe, tokens, asked, start, pathlib.Path(args.tokens).name)


def reconstruct(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Runs `dicode reconstruct`."""
    _refuse_keyframes(args, folder)
    asked = _painting(args, folder)
    pipe, start = load(args, folder), time.monotonic()
    tokens = pipe.encode(_whole_video(args, pipe))
    _paint(args, pipe, tokens, asked, start, pathlib.Path(args.video).name)


def warm_up(args: argparse.Namespace, folder: pathlib.Path, pipe, prompt: str) -> None:
    """Runs a clip, a video of two, and of a longer one the first clip.

    The painter has one program for the first window and one for all behind it, the language model
    some for each length. Of a longer video the last segment, where it is a shorter one, is not run,
    as it comes behind all others; with --offload nothing of it is, as parts run to their end.
    """
    asked = settings(args, folder)
    for num_clips in range(1, min(args.num_clips, 2) + 1):
        for _ in pipe.stream(prompt, num_clips=num_clips, **asked):
            pass
    if args.num_clips > 2 and not args.offload:
        next(pipe.stream(prompt, num_clips=args.num_clips, **asked))


def describe(folder: pathlib.Path, config) -> None:
    """What `dicode info` says of its videos and tokens."""
    from dicode_jax import config as config_lib
    from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3DConfig
    from dicode_jax.models.landiff.dit import DenoiserConfig
    from dicode_jax.models.landiff.language_model import LanguageModelConfig
    from dicode_jax.storage.weights import CONFIG_FILE

    def read(kind, name):
        return config_lib.from_json(kind, folder / name / CONFIG_FILE)

    vae, dit = read(AutoencoderCausal3DConfig, "vae"), read(DenoiserConfig, "denoiser").dit
    lm, sampling = read(LanguageModelConfig, "language_model"), config.sampling
    height, width = dit.height * vae.downsampling, dit.width * vae.downsampling
    first = vae.time_factor * (dit.num_frames - 1) + 1
    step = vae.time_factor * (dit.num_frames - config.prefix_latents)
    shared.say(f"{'clip':<16} {first} frames of {width} x {height} at {config.fps:g} a second")
    shared.say(f"{'further clips':<16} {step} frames each, carried by {sampling.carry}")
    frames = lm.frames
    shared.say(
        f"{'tokens':<16} {frames.iframe} of the first frame of {frames.segment}, {frames.pframe} "
        f"of each other, {lm.codebook_size} codes"
    )
    steps = f"{sampling.num_inference_steps} steps, guidance {sampling.diffusion_guidance_scale:g}"
    shared.say(
        f"{'sampling':<16} {steps}; language model guidance {sampling.guidance_scale:g}, motion "
        f"{sampling.motion_score:g}"
    )
    shared.say(f"{'text':<16} {config.text_length} and {dit.text_len} tokens")
    reads = "frames too" if (folder / "features").is_dir() else "text alone"
    shared.say(f"{'reads':<16} {reads}")


def settings(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """What its pipeline is asked for.

    Raises:
      UserError: An option is of other families.
    """
    given = shared.sampling(args)
    if wrong := sorted(given.keys() - set(OTHERS)):
        raise UserError(f"{folder} has one sampler; leave --{wrong[0].replace('_', '-')} out")
    if args.num_frames is not None or given.pop("clips_per_batch") != "auto":
        raise UserError(
            f"{folder} paints a clip at a time, of its own length; leave --num-frames and "
            "--clips-per-batch out"
        )
    names = {*LANDIFF, "history_noise"} - {"offload", "caption"}
    own = {name: getattr(args, name, None) for name in sorted(names)}
    return given | {name: x for name, x in own.items() if x is not None}


def _painting(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """`settings` of commands that write no tokens."""
    asked = settings(args, folder)
    if "guidance_scale" in asked:
        raise UserError(
            f"--guidance-scale of {folder} is its language model's, which writes nothing here; "
            "the painter's is --diffusion-guidance-scale"
        )
    return asked


def load(args: argparse.Namespace, folder: pathlib.Path):
    """The pipeline, whole or part by part."""
    return shared.load(args, folder, {"offload": True} if getattr(args, "offload", False) else None)


def _refuse_keyframes(args: argparse.Namespace, folder: pathlib.Path) -> None:
    if args.keyframes != "every":
        raise UserError(f"{folder} reads all frames; leave --keyframes out")


def _whole_video(args: argparse.Namespace, pipe):
    """The frames of a file at the model's rate, as many of the first ones as can be coded."""
    frames = shared.read_given(args.video, pipe, FRAME_BYTES // math.prod((*pipe.frame_size, 3)))
    count = pipe.coded_frames(len(frames))
    if count < len(frames):
        shared.say(f"{args.video}: the first {count} of its {len(frames)} frames")
    return frames[:count]


def _paint(args: argparse.Namespace, pipe, tokens, asked, start: float, label: str) -> None:
    caption = getattr(args, "caption", None) or ""

    def paint(progress):
        return pipe.decode_stream(tokens, caption, progress=progress, **asked)

    count = pipe.num_clips(len(tokens))
    shared.write(args, pipe, paint, count, start, label, fps=pipe.config.fps)


shared.BY_KIND["landiff"] = sys.modules[__name__]

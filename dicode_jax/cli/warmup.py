"""`dicode warmup`: compiles ahead what `dicode generate` runs, into the cache of programs."""

import argparse
import contextlib
import time
from collections.abc import Iterator

from dicode_jax.cli import landiff
from dicode_jax.cli.generate import check_clip_frames, roll_settings
from dicode_jax.cli.video import find, load, sampling, say
from dicode_jax.errors import UserError

PROMPT = "a"  # every vocabulary can spell it, and all lengths share their programs
SHOWN = 0.2  # seconds; what is compiled in less is told together


def warmup(args: argparse.Namespace) -> None:
    """Runs `dicode warmup`.

    Raises:
      UserError: Compiled programs are not kept, or the pipeline refuses an option.
    """
    folder, kind = find(args, "dicode", "dynamicrafter", "ar_diffusion", "landiff")
    if kind != "ar_diffusion":
        check_clip_frames(args)
        if args.lag is not None:
            raise UserError(f"{folder} is no AR-Diffusion model; leave --lag out")
    pipe = load(args, folder, {"offload": True} if args.offload else None)
    from dicode_jax.runtime import compile_cache

    if not (place := compile_cache.in_use()):
        raise UserError("compiled programs are not kept, so that there is nothing to warm up")
    start = time.monotonic()
    with _compilations():
        # They are run, as what jax compiles on the way is seen in no other manner.
        if kind == "landiff":
            landiff.warm_up(args, folder, pipe, PROMPT)
        elif kind == "dynamicrafter":
            _animate(args, pipe)
        elif kind == "ar_diffusion":
            _roll(args, folder, pipe)
        else:
            _generate(args, pipe)
    say(f"{place}: ready in {time.monotonic() - start:.1f} s")


def _generate(args: argparse.Namespace, pipe) -> None:
    """A video of one clip, and what a longer one needs besides."""
    from dicode_jax.pipelines import painting

    options = {"num_frames": args.num_frames, **sampling(args)}
    next(pipe.stream(PROMPT, num_clips=1, **options))
    if args.num_clips > 1:
        most = painting.MOST if args.clips_per_batch == "auto" else args.clips_per_batch
        next(pipe.stream(PROMPT, num_clips=min(args.num_clips, most), **options))
        window = pipe.language_model.cfg.max_keyframes
        pipe.generate_tokens(PROMPT, num_clips=min(args.num_clips, window + 1))


def _animate(args: argparse.Namespace, pipe) -> None:
    import numpy as np

    image = np.zeros((*pipe.config.frame_size, 3), np.uint8)
    last = image if pipe.config.interpolation else None
    pipe(image=image, last_image=last, num_frames=args.num_frames, **sampling(args))


def _roll(args: argparse.Namespace, folder, pipe) -> None:
    """What follows a black frame: of all longer videos too."""
    import numpy as np

    size, frames = pipe.parts["vae"].cfg.image_size, args.num_frames
    if frames is None:
        frames = pipe.config.sampling.num_frames
    stream = pipe.stream(
        "0" if pipe.parts["denoiser"].cfg.num_classes else None,
        image=np.zeros((size, size, 3), np.uint8),
        num_frames=max(frames, 2),
        lag=args.lag,
        **roll_settings(args, folder),
    )
    for _, _ in zip(stream, range(2)):  # the given one, and another
        pass


@contextlib.contextmanager
def _compilations() -> Iterator[None]:
    """Says a line for each program that jax compiles or finds, and one for all small ones."""
    from jax import monitoring

    from dicode_jax.runtime import kept_programs

    hits, small = [], []

    def on_event(event: str, **kwargs: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event not in ("/jax/core/compile/backend_compile_duration", kept_programs.READ):
            return
        was_there = bool(hits) or event == kept_programs.READ
        hits.clear()
        if duration_secs < SHOWN:
            small.append(duration_secs)
            return
        program = str(kwargs.get("fun_name", "?")).removeprefix("jit(").strip("_)")
        say(f"{program:<16} {duration_secs:7.1f} s{', was there' if was_there else ''}")

    monitoring.register_event_listener(on_event)
    monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield
    finally:
        monitoring.unregister_event_listener(on_event)
        monitoring.unregister_event_duration_listener(on_duration)
    say(f"{f'{len(small)} small ones':<16} {sum(small):7.1f} s")

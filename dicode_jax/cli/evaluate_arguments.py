"""What `dicode evaluate` accepts."""

import argparse
import math
from collections.abc import Callable

from dicode_jax.pipelines.options import MAX_CLIPS, MAX_STEPS, Real, Whole, number

SUITES = {"shapes": 128, "reconstruction": 64, "text": 128, "long": 16, "tokens": 16}
"""Suite of `dicode evaluate` -> how many clips or videos, unless told otherwise."""
_WORDS = ("color", "shape", "motion", "background", "size")
DISTANCES = ("fvd", "kvd", "fid", "kid", "fd-shapes", "kvd-shapes")
METRICS = {
    "shapes": (*_WORDS, "all", "seen", "wobble", *DISTANCES),
    "reconstruction": ("psnr", "ssim", "lpips"),
    "text": ("clipsim", "score", "told apart", "consistency", *_WORDS, "all", "seen", "wobble"),
    "long": (*_WORDS, "border", "seen", "drift"),
    "tokens": (*_WORDS, "error"),
    "distances": DISTANCES,
}
"""Suite, or `distances` of --videos -> what --metrics names: a word of the numbers' names."""
OF_PAINTING = {
    "num_frames": None,
    "quality": None,
    "steps": None,
    "guidance_scale": None,
    "guidance_interval": None,
    "sampler": None,
    "eta": None,
    "deep_cache_interval": None,
    "lag": None,
    "seed": 0,
    "clips_per_batch": "auto",
    "dtype": "float32",
}
"""Option of a model that paints -> what it is where it is not given."""
PACKAGED = ""  # what --features without a folder gives


def add_parsers(
    command: Callable[..., argparse.ArgumentParser], add_sampling: Callable, add_computing: Callable
) -> None:
    """Declares the options; `command(name, summary, details)` makes a parser."""
    sub = command(
        "evaluate",
        "measure how good a model is",
        "shapes: whether clips of captions that no training saw obey them, in all and in every "
        "frame; reconstruction: how near clips come to the true ones when they are taken apart and "
        "painted again, beside what needs no model; text: how near videos are to their prompts, "
        "by CLIP; long: how videos of a minute hold together; tokens: what each deep token "
        "carries. "
        "Numbers with 95 % intervals go to results.json and report.md. Painted videos are kept in "
        "the folder too: an evaluation that was stopped goes on when it is asked for again.",
    )
    sub.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model folder, a packaged name or owner/name on the Hub (default: the packaged one)",
    )
    sub.add_argument("--suite", choices=SUITES, help="(default: shapes)")
    sub.add_argument(
        "--videos",
        metavar="DIR",
        help="no model: distances of the videos in a folder from those of --reference",
    )
    sub.add_argument("--reference", metavar="DIR", help="as many true videos")
    sub.add_argument(
        "--i3d",
        metavar="DIR",
        help="I3D's converted weights: FVD and KVD, of --videos and of the suite shapes",
    )
    sub.add_argument(
        "--inception",
        metavar="DIR",
        help="Inception-v3's converted weights: FID and KID, of every frame, of the same",
    )
    sub.add_argument(
        "--features",
        nargs="?",
        const=PACKAGED,
        metavar="DIR",
        help="weights of scripts/train_shapes_features.py, or the packaged ones: FD-shapes and "
        "KVD-shapes of the same (--videos gives them where no other network is named)",
    )
    sub.add_argument(
        "--fps",
        type=number(float, Real(0.1, 240.0)),
        metavar="X",
        help="of --videos: frames a second that I3D and Inception look at (default: those of the "
        "videos, which have to agree)",
    )
    sub.add_argument(
        "--prompts",
        metavar="FILE",
        help="no suite: a video for each line of a text file, called by its words and seed; of the "
        "suite text, what is painted in place of captions of the shapes world",
    )
    sub.add_argument(
        "--vbench-prompts",
        metavar="FILE",
        help="the same as VBench wants them: DIR/LIST/PROMPT-INDEX.mp4, five of each prompt, of "
        "temporal_flickering.txt 25",
    )
    sub.add_argument(
        "--samples-per-prompt",
        type=number(int, Whole(1, 1000)),
        metavar="N",
        help="videos of each prompt of a list, with seeds from --seed on, or "
        "of the suite's own with --suite (default: 1, or VBench's)",
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="the folder for what is found")
    sub.add_argument(
        "--num",
        type=number(int, Whole(1, 100_000)),
        metavar="N",
        help="clips or videos (default: " + ", ".join(f"{n} {s}" for s, n in SUITES.items()) + ")",
    )
    sub.add_argument(
        "--num-clips",
        type=number(int, Whole(2, MAX_CLIPS)),
        metavar="N",
        help="of each long video, of two seconds each (default: 30; 8 of AR-Diffusion)",
    )
    sub.add_argument(
        "--lpips",
        metavar="DIR",
        help="LPIPS's converted weights, for the suite reconstruction",
    )
    sub.add_argument(
        "--clip",
        metavar="DIR",
        help="CLIP's converted weights, for the suite text, which needs them",
    )
    sub.add_argument(
        "--metrics",
        nargs="+",
        choices=list(dict.fromkeys(name for names in METRICS.values() for name in names)),
        metavar="NAME",
        help="only these numbers: "
        + "; ".join(f"{suite}: {', '.join(names)}" for suite, names in METRICS.items()),
    )
    sub.add_argument(
        "--at-least",
        nargs="+",
        type=_bound,
        default=[],
        metavar="NAME=X",
        help="end with an error where a number of the report is lower, as in all=0.8",
    )
    sub.add_argument(
        "--at-most",
        nargs="+",
        type=_bound,
        default=[],
        metavar="NAME=X",
        help='the same where one is higher, as in "color wobble=2.5"',
    )
    sub.add_argument(
        "--lag", type=number(int, Whole(0, MAX_STEPS)), metavar="N", help="of AR-Diffusion"
    )
    add_sampling(sub)
    add_computing(sub)


def _bound(text: str) -> tuple[str, float]:
    """`NAME=X` of --at-least and --at-most."""
    name, equals, value = text.rpartition("=")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not (name and equals and math.isfinite(bound)):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=NUMBER, such as all=0.8")
    return name, bound

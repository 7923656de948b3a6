"""What the command line accepts: commands, options, their limits and their help."""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping

from dicode_jax.cli import app, completion, data, doctor, evaluate_arguments, runs
from dicode_jax.cli.landiff_options import LANDIFF, add_options
from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.errors import UserError
from dicode_jax.pipelines.options import (
    MAX_CLIPS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    MAX_STREAM,
    OPTIONS,
    QUALITIES,
    Real,
    Whole,
    described,
    number,
)

# As media.writer and runtime.platform, which are slow to import.
VIDEO_SUFFIXES = (".mp4", ".gif", ".webp")
CLIP_FRAMES = Whole(2, MAX_FRAMES, is_even=True)
ATTENTION = ("auto", "xla", "mapped", "cudnn")

_EPILOG = """\
examples:
  dicode generate "a red circle moves right on a black background" --out out.mp4
  dicode generate "a blue cross grows on a gray background" --out out.gif --num-clips 5 --seed 3
  dicode generate --prompts prompts.txt --out videos --num-videos-per-prompt 4
  dicode generate "a red circle grows on a navy background" --image first.png --out out.mp4
  dicode continue in.mp4 "a red circle grows on a navy background" --out out.mp4
  dicode interpolate first.png last.png --out out.mp4
  dicode reconstruct in.mp4 --out out.mp4
  dicode encode in.mp4 --out tokens.safetensors
  dicode decode tokens.safetensors --out out.mp4
  dicode warmup --num-clips 300
  dicode evaluate runs/model --suite shapes --out found
  dicode info
  dicode data inspect videos/ --sheet sheet.png
  dicode data cut film.mp4 --out clips
  dicode data filter clips
  dicode metrics runs/ar --out curves.png
  dicode doctor
  dicode app

dicode COMMAND --help explains the options of a command."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the nearest option that exists."""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ").split()
        is_unknown = message.startswith("unrecognized arguments")
        if is_unknown and unknown and unknown[0].startswith("--"):
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"unknown option {unknown[0]}{hint}"
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Lets the command's own parser report an unknown option: it knows its neighbours."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def make_parser(commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The parser; `args.run` of what it returns is the function of the chosen command.

    Mistakes are raised as `UserError`.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="dicode",
        description="Text to video through compressed deep tokens.",
        epilog=_EPILOG,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}.{details and ' ' + details}"
        added = subparsers.add_parser(
            name, help=summary, description=description, allow_abbrev=False
        )
        added.set_defaults(run=commands[name])
        return added

    sub = command(
        "generate",
        "paint a video for a prompt",
        "It may begin with an image or a video, and end with an image. A DynamiCrafter model needs "
        "one; an AR-Diffusion model takes a class as its prompt, if it has any.",
    )
    sub.add_argument(
        "prompt",
        nargs="?",
        default="",
        metavar="PROMPT",
        help="what to show, in quotes; with --image or --video it can be left out",
    )
    _add_lists(sub)
    sub.add_argument("--image", metavar="FILE", help="the first frame, a picture of any kind")
    sub.add_argument(
        "--last-image",
        metavar="FILE",
        help="the last frame, beside --image; for DiCoDe and a DynamiCrafter that interpolates",
    )
    sub.add_argument(
        "--video",
        metavar="FILE",
        help="the video to go on from, whose frames come first: for DiCoDe, AR-Diffusion, LanDiff",
    )
    _add_video_out(sub)
    sub.add_argument(
        "--num-clips",
        type=number(int, Whole(1, MAX_STREAM)),
        default=1,
        metavar="N",
        help="clips of two seconds each, written as they are painted (default: 1)",
    )
    _add_lag(sub)
    _add_history_noise(sub, "AR-Diffusion and LanDiff")
    add_options(sub, "motion_score", "temperature", "top_k", "top_p")
    _add_sampling(sub, Whole(1, MAX_STREAM), "; of the video, any number, for AR-Diffusion")
    _add_model(sub)

    sub = command(
        "continue",
        "go on from a video",
        "The result begins with its frames, in the model's rate and size. A DiCoDe model goes on "
        "from the deep tokens of its keyframes, an AR-Diffusion model from its frames.",
    )
    sub.add_argument("video", metavar="VIDEO", help="a video file of any kind")
    _add_going_on(sub)

    sub = command(
        "interpolate",
        "paint what lies between two images",
        "For a DiCoDe model, or a DynamiCrafter that interpolates. The same image twice makes a "
        "loop.",
    )
    sub.add_argument("image", metavar="FIRST", help="the first frame, a picture of any kind")
    sub.add_argument("last_image", metavar="LAST", help="the last frame")
    _add_going_on(sub)

    sub = command(
        "reconstruct",
        "take a video through deep tokens and back",
        "Only its keyframes reach the model; every clip is painted between two of them.",
    )
    _add_video_in(sub)
    _add_video_out(sub)
    add_options(sub, "caption")
    _add_history_noise(sub, "LanDiff")
    _add_sampling(sub)
    _add_model(sub)

    sub = command("encode", "turn a video into deep tokens")
    _add_video_in(sub)
    sub.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    _add_model(sub)

    sub = command(
        "decode",
        "paint a video from deep tokens",
        "Divot's de-tokenizer decodes features of Divot's video tokenizer: a .safetensors file "
        "with the array `features`, float [l, e] for one clip or [b, l, e] for several in a row, "
        "and, unless guidance is 1, `null_features` [l, e], those of an all-zero clip.",
    )
    sub.add_argument(
        "tokens", metavar="TOKENS", help="a file that `dicode encode` wrote, or one of features"
    )
    _add_video_out(sub)
    add_options(sub, "caption")
    _add_history_noise(sub, "LanDiff")
    _add_sampling(sub)
    _add_model(sub)

    sub = command(
        "warmup",
        "compile ahead what generate runs",
        "Programs are kept where `dicode doctor` says, for each model, kind of device and set of "
        "these options; a later start with the same ones compiles nothing.",
    )
    sub.add_argument(
        "--num-clips",
        type=number(int, Whole(1, MAX_STREAM)),
        default=2,
        metavar="N",
        help="clips of the longest video that will be asked for, as programs for one clip, for "
        "several and for a window that slides differ (default: 2)",
    )
    _add_lag(sub)
    _add_sampling(sub, Whole(1, MAX_STREAM))
    _add_model(sub)

    sub = command(
        "info",
        "describe a model",
        "A video or a file of deep tokens or features can be named too.",
    )
    sub.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a model folder, a packaged name or owner/name on the Hub (default: the packaged one)",
    )
    evaluate_arguments.add_parsers(command, _add_sampling, _add_computing)
    data.add_parsers(command)
    runs.add_parsers(command)
    doctor.add_parsers(command)
    app.add_parsers(command)
    completion.add_parsers(command)
    return parser


def _add_going_on(parser: argparse.ArgumentParser) -> None:
    """What happens, where the result goes, how long it is, and the options of sampling."""
    text = "what happens, in quotes; it can be left out"
    parser.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help=text)
    _add_video_out(parser)
    parser.add_argument(
        "--num-clips",
        type=number(int, Whole(1, MAX_CLIPS)),
        default=1,
        metavar="N",
        help="clips of two seconds each that are painted (default: 1)",
    )
    parser.set_defaults(history_noise=None)
    _add_lag(parser)
    add_options(parser, "motion_score", "temperature", "top_k", "top_p")
    _add_sampling(parser, Whole(1, MAX_STREAM), "; of the video, any number, for AR-Diffusion")
    _add_model(parser)


def _add_lists(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts: a .txt with one on each line; or a .csv or .jsonl with `prompt` and, "
        "if wanted, seed, name, num_clips, negative_prompt, image, last_image and video; --out is "
        "then a folder, and a run that was stopped goes on in it",
    )
    parser.add_argument(
        "--num-videos-per-prompt",
        type=number(int, Whole(1, MAX_STREAM)),
        metavar="N",
        help="videos of each prompt, with the seeds S, S + 1, ...; --out is then a folder",
    )
    parser.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in VIDEO_SUFFIXES],
        default="mp4",
        help="of videos in a folder (default: mp4)",
    )


def _add_video_in(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="a video file of any kind, size and length")
    parser.add_argument(
        "--keyframes",
        choices=("every", "demo"),
        default="every",
        help="every: one each two seconds (default); demo: the first and the last of the file",
    )


def _add_video_out(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(VIDEO_SUFFIXES[:-1]) + " or " + VIDEO_SUFFIXES[-1]
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=f"the video: {known}; until it is whole, its clips are in FILE with .part before the "
        "extension, and stay there when the command is stopped",
    )
    parser.add_argument("--sheet", metavar="FILE", help="also write a contact sheet, a .png")


def _add_history_noise(parser: argparse.ArgumentParser, families: str) -> None:
    parser.add_argument(
        "--history-noise",
        type=number(int, Whole(0, MAX_STEPS - 1)),
        metavar="T",
        help=f"for {families}: timestep of the noise on frames that are done or given, as the "
        "others see them (default: the model's own, mostly 0, none)",
    )


def _add_lag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lag",
        type=number(int, Whole(0, MAX_STEPS)),
        metavar="N",
        help="for AR-Diffusion: steps between the starts of neighbouring frames",
    )


def _add_sampling(
    parser: argparse.ArgumentParser, frames: Whole = CLIP_FRAMES, more: str = ""
) -> None:
    parser.add_argument(
        "--num-frames",
        type=number(int, frames),
        metavar="N",
        help=f"frames per clip, an even number{more} (default: the model's own, mostly 16)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, Whole(0, MAX_SEED)),
        default=0,
        metavar="S",
        help="another seed paints another video (default: 0)",
    )
    parser.add_argument(
        "--quality",
        choices=QUALITIES,
        help="; ".join(f"{name}: {described(name)}" for name in QUALITIES)
        + " (default: standard); options beside it go before it",
    )
    parser.add_argument(
        "--steps",
        type=number(int, Whole(1, MAX_STEPS)),
        metavar="N",
        help="denoising steps; fewer are faster and coarser (default: the model's own, mostly 50)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=number(float, Real(0.0, MAX_GUIDANCE, is_open=True)),
        metavar="X",
        help="how strongly a clip follows its deep tokens, as 7.5; 1 switches guidance off "
        "(default: the model's own)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=number(float, Real()),
        nargs=2,
        action=_Checked,
        metavar=("START", "END"),
        help="shares of the steps between which guidance is on, as 0 0.5 for the noisier half; the "
        "others cost half (default: the model's own, mostly 0 1)",
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="the update rule; dpm++ and unipc are of higher order (default: the model's own, "
        "mostly ddim)",
    )
    parser.add_argument(
        "--eta",
        type=number(float, Real(0.0, 1.0)),
        metavar="X",
        help="0: no fresh noise at the steps, 1: as much as ancestral sampling adds (default: the "
        "model's own, mostly 1)",
    )
    parser.add_argument(
        "--deep-cache-interval",
        type=number(int, Whole(1, MAX_STEPS)),
        metavar="N",
        help="run the whole UNet every N steps and its shallow part in between (default: the "
        "model's own, mostly 1)",
    )
    parser.add_argument(
        "--clips-per-batch",
        type=_clips_per_batch,
        default="auto",
        metavar="N",
        help="clips that each device paints at once; 1 gives the first soonest (default: auto, as "
        "many as are fast and fit into memory)",
    )


def _clips_per_batch(text: str) -> int | str:
    try:
        return text if text == "auto" else number(int, Whole(1, MAX_CLIPS))(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or auto") from None


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a model folder, a packaged name or owner/name on the Hub (default: the packaged one)",
    )
    _add_computing(parser)


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="type of weights and computing (default: float32); auto: float32 on CPUs, a half "
        "precision that the device has on others",
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="form of attention: one large product, a loop over heads, or NVIDIA's kernels, which "
        "compute in half precision (default: auto, what suits device and sizes)",
    )
    text = f"for LanDiff: {LANDIFF['offload'][1]}"
    parser.add_argument("--offload", action="store_true", help=text)
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="neither read nor keep compiled programs, which else make the next start faster",
    )


class _Checked(argparse.Action):
    """Keeps values that the rule of the option in `options.OPTIONS` takes together."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, OPTIONS[self.dest](values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        import dicode_jax

        sys.stdout.write(f"dicode {dicode_jax.__version__}\n")
        parser.exit()

"""A model that is evaluated: what it is asked, what it painted, and the report of a suite."""

import argparse
import contextlib
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dicode_jax.cli import video
from dicode_jax.cli.evaluate_arguments import SUITES
from dicode_jax.errors import UserError

SHEET_ROWS = 10


@contextlib.contextmanager
def made_folder(out: pathlib.Path) -> Iterator[None]:
    """A folder for what is found, which can be written to; it goes again if that came to nothing.

    Raises:
      UserError: It cannot be made, or not be written to.
    """
    try:
        missing = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {out}: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()  # which leaves a folder that holds something
        raise


def wanted(args: argparse.Namespace, name: str) -> bool:
    """Whether a number or a plot is one of `--metrics`, which are words of its name."""
    return args.metrics is None or is_named(name, args.metrics)


def is_named(name: str, words: Iterable[str]) -> bool:
    """Whether one of some words is in the name of a number or a plot."""
    name = name.replace("_", " ")
    return any(
        re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", name, re.IGNORECASE) for word in words
    )


def check_floors(args: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Holds the numbers of a report to `--at-least` and `--at-most`.

    Raises:
      UserError: One is lower or higher, or is not there.
    """
    for option, bounds, sign in (("least", args.at_least, 1), ("most", args.at_most, -1)):
        for name, bound in bounds:
            if name not in values:
                raise UserError(
                    f"--at-{option}: there is no {name!r}; there are {', '.join(values)}"
                )
            found = getattr(values[name], "mean", values[name])
            if not sign * found >= sign * bound:
                raise UserError(f"{name} is {found:.4g}, and {bound:g} at {option} is asked for")


class Run:
    """A model and what is asked of it.

    Attributes:
      args: Of the command.
      out: The folder for what is found.
      folder: The model's.
      pipe: The pipeline.
      suite: Which one.
      judge: The networks that it judges with, if any.
      num: How many clips or videos.
      options: What the pipeline is called with besides prompts and seeds.
      fps: Frames a second of what it paints then.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        out: pathlib.Path,
        folder: pathlib.Path,
        pipe: Any,
        suite: str,
        judge: Any,
    ):
        self.args, self.out, self.folder, self.pipe = args, out, folder, pipe
        self.suite, self.judge = suite, judge
        self.num: int = args.num or SUITES[self.suite]
        self.options = options_of(args, pipe)
        self.fps = frame_rate(pipe, self.options)

    def wanted(self, name: str) -> bool:
        """Whether a number is one of `--metrics`."""
        return wanted(self.args, name)

    def scenes(self) -> list[Any]:
        """The test split's scenes that all suites look at."""
        from dicode_jax.evaluation import accuracy

        return accuracy.scenes(self.num, self.args.seed)

    def kept(
        self, what: str, paint: Callable, at_once: int, times: int = 1, **more: Any
    ) -> Iterator[Any]:
        """Videos `[f, h, w, 3]` in order, kept in a folder of the output.

        Args:
          what: The folder's name.
          paint: Makes the videos of some numbers with some seeds.
          at_once: Most numbers in a call of it.
          times: How often each seed's turn comes: numbers go up to `times * num`.
          more: What the videos depend on besides.
        """
        from dicode_jax.evaluation import accuracy, kept

        seeds = accuracy.seeds(self.num, self.args.seed)
        settings = {
            "model": str(self.folder.resolve()),
            "fingerprint": kept.fingerprint(self.folder),
            "dtype": self.args.dtype,
            "seed": self.args.seed,
            "options": {n: x for n, x in self.options.items() if n != "clips_per_batch"},
            **more,
        }
        make = lambda numbers: paint(numbers, [seeds[i % self.num] for i in numbers])  # noqa: E731
        place, count = self.out / what, times * self.num
        with video.progress_bar() as progress:
            progress("videos", 0, count)
            videos = kept.painted(make, count, place, settings, fps=self.fps, at_once=at_once)
            for i, one in enumerate(videos):
                progress("videos", i + 1, count)
                yield one

    def report(
        self,
        title: str,
        sheet: tuple[list, list[str]],
        *,
        values: Mapping[str, Any],
        plots: Sequence[Any] = (),
        more: Mapping[str, str] | None = None,
        told: Mapping[str, Any] | None = None,
        **found: Any,
    ) -> pathlib.Path:
        """Writes the contact sheet and the report, and prints the table; gives the page's path.

        Args:
          sheet: Clips and their labels.
          more: Pictures beside the sheet.
          told: Settings of this suite alone.

        Raises:
          UserError: A number is lower than `--at-least` asks for.
        """
        from dicode_jax.evaluation import report
        from dicode_jax.media.video import contact_sheet

        picture = f"{self.suite}_sheet.png"
        contact_sheet(self.out / picture, sheet[0], labels=sheet[1][: len(sheet[0])])
        whole = report.Report(
            title=title,
            settings={
                "model": str(self.folder),
                "kind": self.pipe.kind,
                "suite": self.suite,
                "videos": self.num,
                "seed": self.args.seed,
                "dtype": self.args.dtype,
                **self.options,
                **(told or {}),
            },
            values={name: value for name, value in values.items() if self.wanted(name)},
            plots=[plot for plot in plots if self.wanted(plot.name)],
            pictures={f"The first {len(sheet[0])}": picture, **(more or {})},
            **found,
        )
        page = report.write(whole, self.out, self.suite)
        print(report.table(whole.values))
        check_floors(self.args, whole.values)
        return page


def options_of(args: argparse.Namespace, pipe) -> dict[str, Any]:
    """What the pipeline is called with besides prompts and seeds."""
    options = video.sampling(args)
    del options["seed"]
    if args.num_frames is not None:
        options["num_frames"] = args.num_frames
    if pipe.kind == "dicode":
        return options
    del options["clips_per_batch"]
    own = {"num_inference_steps", "guidance_scale"} | (
        {"num_frames", "guidance_interval"} if pipe.kind == "ar_diffusion" else set()
    )
    if odd := options.keys() - own:
        raise UserError(f"this model has no {', '.join(sorted(odd))}; leave it out")
    return options if args.lag is None else options | {"lag": args.lag}


def frame_rate(pipe, options: Mapping[str, Any]) -> float:
    """Frames a second of what a pipeline paints: a clip of DiCoDe lasts as long as ever."""
    if pipe.kind != "dicode":
        return float(pipe.config.fps)
    own = pipe.config.sampling.num_frames
    return float(pipe.config.fps * options.get("num_frames", own) / own)


def prompts_of(pipe, scenes: Sequence[Any]) -> list[Any]:
    """What a pipeline is asked for scenes with: their captions, or the classes that say the same.

    Raises:
      UserError: The model has no class for a caption.
    """
    from dicode_jax.data.shapes_world import parse_caption

    if pipe.kind != "ar_diffusion":
        return [scene.caption for scene in scenes]
    named = {}
    for name in pipe.config.class_names:
        with contextlib.suppress(ValueError):
            named[parse_caption(name)] = name
    if missing := [s.caption for s in scenes if s.attributes not in named]:
        raise UserError(f"this model has no class {missing[0]!r}; it is none of the shapes world")
    return [named[scene.attributes] for scene in scenes]


@contextlib.contextmanager
def square(folder: pathlib.Path) -> Iterator[None]:
    """What the judge does not take becomes one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"clips of {folder} cannot be judged: {error}") from error

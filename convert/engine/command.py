"""What all conversion commands share: options, a whole or absent output, errors on one line."""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import dicode_jax
from convert.engine.plan import DTYPES, Plan, write_module
from convert.engine.rules import ConversionError
from convert.engine.sources import Source
from dicode_jax.errors import UserError, print_any_name
from dicode_jax.runtime.interrupts import exit_status, polite_signals
from dicode_jax.storage import folders, hub, model_card
from dicode_jax.storage.files import atomic_path, check_no_source, resolve_output
from dicode_jax.storage.weights import write_config

REPORT_FILE = folders.REPORT  # lies in every converted model
_ADVICE = "choose another --out, or add --overwrite"
output_folder = functools.partial(folders.new_folder, advice=_ADVICE)
check_folder = functools.partial(folders.check_folder, advice=_ADVICE)


class Result(Protocol):
    """What a command has found, before anything is written.

    Attributes:
      report: What there is to say, ready for JSON.
      problems: One line each; with any, nothing is written.
      summary: Lines to print when all is written.
    """

    report: Mapping[str, Any]
    problems: Sequence[str]
    summary: str

    def write(self, args: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
        """Writes the output and gives the whole report, which began as the one that is passed."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A module to write.

    Attributes:
      plan: What goes where.
      config: Builds it.
      origin: Keys of `dicode_jax.storage.model_card.LICENCES`, with commas between.
    """

    plan: Plan
    config: Any
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checkpoint that was looked through, by shapes alone: a `Result`.

    Attributes:
      origin: As of `Part`, of the whole.
      sources: What is read; their hashes are kept.
      reads: Files and folders that OUT must not touch.
      parts: Folder in OUT, or "" for OUT itself, which is no model and gets no card then -> module.
      settings: The pipeline's configuration, if it is one.
      text: Folder in OUT -> tokenizer to save there.
    """

    origin: str
    sources: Sequence[Source]
    reads: Sequence[pathlib.Path]
    parts: Mapping[str, Part]
    report: Mapping[str, Any]
    summary: str
    problems: Sequence[str] = ()
    settings: Any = None
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, args: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
        """Writes the folder, whole or not at all; see `Result`."""
        report = report | {"sources": hashes(*self.sources)}
        with output_folder(args.out, overwrite=args.overwrite, sources=self.reads) as folder:
            for name, part in self.parts.items():
                to, notes = folder / name, metadata(part.origin, report)
                write_module(to, part.plan, part.config, dtype=args.dtype, metadata=notes)
            if self.settings is not None:
                write_config(folder, self.settings, metadata(self.origin, report))
            for name, tokenizer in self.text.items():
                tokenizer.save(folder / name)
            if "" not in self.parts:
                model_card.write(folder, name=pathlib.Path(args.out).name)
            _write_report(str(folder / REPORT_FILE), report)
        return report


def parser(
    name: str,
    description: str,
    *,
    source: str,
    alias: str | None = None,
    required: bool = True,
    reads: Sequence[str] = (),
    out: str = "DIR",
    dtype: str | None = "float32",
) -> argparse.ArgumentParser:
    """A parser with what all commands take: SOURCE, `--out --overwrite --dtype --report`.

    Args:
      name: Of the module, `convert.dicode`.
      description: The first lines of `--help`.
      source: What SOURCE is.
      alias: The option that named SOURCE in earlier releases; it does still.
      required: Whether SOURCE has to be given.
      reads: Names of the other options that name files or folders to read (see `sources`).
      out: What is written, "DIR" or "FILE".
      dtype: The default; None keeps the types as they are stored.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.set_defaults(reads=("source", *reads), source=None)
    group = options.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "source", nargs="?", metavar="SOURCE", default=argparse.SUPPRESS, help=source
    )
    if alias is not None:
        group.add_argument(alias, dest="source", help=argparse.SUPPRESS)
    add = options.add_argument
    add("--out", required=True, metavar=out, help="where to write")
    add("--overwrite", action="store_true", help="replace what is there")
    kinds = f"storage type ({dtype or 'as it is'})"
    add("--dtype", choices=sorted(DTYPES), default=dtype, help=kinds)
    add("--report", metavar="FILE", help="write the whole report as JSON; - prints it")
    return options


def run(
    main: Callable[[argparse.Namespace], Result],
    options: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command and gives its exit status.

    Args:
      main: Gets the options and looks through the sources. What it finds is written here, and so
        is the report, even when the conversion fails.
      options: See `parser`.
      argv: Arguments instead of the command line's.

    Returns:
      0, 2 after an error of the user's (one line on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    print_any_name()
    args = options.parse_args(argv)
    try:
        with polite_signals():
            print(perform(main, args, options.prog))
        return 0
    except (UserError, OSError) as error:
        print(f"{options.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{options.prog}: interrupted, nothing half-written is left", file=sys.stderr)
        return exit_status(interrupt)


def perform(main: Callable[[argparse.Namespace], Result], args: Any, prog: str) -> str:
    """What `run` does with its parsed arguments; returns the summary.

    Raises:
      UserError: As `main`, or something does not fit.
    """
    report: dict[str, Any] = {"converter": converter(prog)}
    _check_report(args)
    try:
        result = main(args)
        report |= result.report
        if result.problems:
            raise ConversionError(sorted(result.problems))
        report = result.write(args, report)
        return result.summary
    except ConversionError as error:
        report["problems"] = error.problems
        raise UserError(_summary(error, args.report)) from error
    except (UserError, KeyboardInterrupt) as error:
        report["problems"] = ["interrupted" if isinstance(error, KeyboardInterrupt) else str(error)]
        raise
    finally:
        if args.report:
            _write_report(args.report, report)


def converter(prog: str) -> str:
    """Name and version of a converter: `convert.dicode 0.1.0`."""
    return f"{prog.removeprefix('python -m ')} {dicode_jax.__version__}"


def metadata(origin: str, report: Mapping[str, Any]) -> dict[str, str]:
    """What the header of converted weights says of where they come from.

    Args:
      origin: A key of `dicode_jax.storage.model_card.LICENCES`.
      report: Names the `converter`, and under `sources` the hashes of `Source.sha256`.
    """
    sources = json.dumps(dict(report["sources"]), sort_keys=True)
    return {"origin": origin, "converter": report["converter"], "sources": sources}


def hashes(*sources: Source) -> dict[str, str]:
    """File name -> SHA-256 over several sources, each file read once.

    Files of one name have that of their folder in front.

    Raises:
      UserError: A file is damaged, or two different files have one name in folders of one name.
    """
    paths = {path for source in sources for path in source.files}
    names = collections.Counter(path.name for path in paths)
    out: dict[str, str] = {}
    done: set[pathlib.Path] = set()
    for source in sources:
        left = Source({}, tuple(path for path in source.files if path not in done))
        digests = left.sha256()
        for path in left.files:
            is_alone = names[path.name] == 1
            name = path.name if is_alone else f"{path.parent.name}/{path.name}"
            if out.setdefault(name, digests[path.name]) != digests[path.name]:
                raise UserError(f"two different source files are called {name}; rename one")
        done |= set(source.files)
    return out


def sources(args: argparse.Namespace) -> list[pathlib.Path]:
    """Files and folders that a command reads, as its options name them."""
    named = [getattr(args, name) for name in args.reads]
    return [pathlib.Path(path) for path in named if path is not None]


def check_out(args: argparse.Namespace, *patterns: str, **options: Any) -> list[pathlib.Path]:
    """Checks `--out` against all that the command reads, which is returned; see `check_folder`.

    Then SOURCE, where it is a name on the Hub, is fetched, and becomes the folder that it is in.

    Args:
      patterns, options: Of `hub.find_folder`: which files of the Hub.
    """
    check_folder(args.out, overwrite=args.overwrite, sources=sources(args))
    args.source = hub.find_folder(args.source, patterns, **options)
    return sources(args)


def _write_report(path: str, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=2, default=str) + "\n"
    if path == "-":
        print(text, end="")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _check_report(args: argparse.Namespace) -> None:
    """Refuses a report in place of anything that is no earlier report, before the work.

    One inside OUT is refused too: OUT holds its own, and is replaced only while nothing else lies
    in it.
    """
    if not args.report or args.report == "-":
        return
    path = resolve_output(args.report)
    check_no_source(args.report, sources(args))
    out = pathlib.Path(os.path.realpath(args.out))
    if out == path or out in path.parents:
        raise UserError(f"--report {args.report} lies in --out, which gets {REPORT_FILE} anyway")
    if path.exists() and not folders.is_report(path):
        raise UserError(f"{args.report} is there and is no earlier report; choose another --report")


def _summary(error: ConversionError, report: str | None) -> str:
    """The first problems of a conversion on one line."""
    first, rest = error.problems[:3], len(error.problems) - 3
    more = f"; and {rest} more" if rest > 0 else ""
    where = f" (all are in {report})" if report and report != "-" else ""
    hint = " (--report FILE lists all)" if more and not report else where
    return f"the checkpoint does not fit: {'; '.join(first)}{more}{hint}"

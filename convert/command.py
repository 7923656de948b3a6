"""What all conversion commands share: options, a whole or absent output, errors on one line."""

import argparse
import contextlib
import json
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dicode_jax
from convert.plan import DTYPES
from convert.rules import ConversionError
from convert.sources import Source
from dicode_jax.data.files import atomic_path
from dicode_jax.errors import UserError

REPORT_FILE = "conversion.json"  # lies in every converted model


def parser(
    name: str, description: str, *, out: str = "DIR", dtype: str | None = "float32"
) -> argparse.ArgumentParser:
    """A parser with the options of all commands: `--out --overwrite --dtype --report`.

    Args:
      name: Of the module, `convert.dicode`.
      description: The first lines of `--help`.
      out: What is written, "DIR" or "FILE".
      dtype: The default; None keeps the types as they are stored.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--out", required=True, metavar=out, help="where to write")
    add("--overwrite", action="store_true", help="replace what is there")
    kinds = f"storage type ({dtype or 'as it is'})"
    add("--dtype", choices=sorted(DTYPES), default=dtype, help=kinds)
    add("--report", metavar="FILE", help="write the whole report as JSON; - prints it")
    return options


def run(
    main: Callable[[argparse.Namespace, dict[str, Any]], None],
    options: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command and gives its exit status.

    Args:
      main: Gets the options and an empty report, which it fills as it goes; the report is written
        even when the conversion fails.
      options: See `parser`.
      argv: Arguments instead of the command line's.

    Returns:
      0, 2 after an error of the user's (one line on stderr), 130 after Ctrl-C.
    """
    args = options.parse_args(argv)
    report: dict[str, Any] = {"converter": converter(options.prog)}
    try:
        try:
            main(args, report)
            status = 0
        except ConversionError as error:
            report["problems"] = error.problems
            raise UserError(_summary(error, args.report)) from error
        finally:
            if args.report:
                _write_report(args.report, report)
        return status
    except (UserError, OSError) as error:
        print(f"{options.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{options.prog}: interrupted, nothing was written", file=sys.stderr)
        return 130


def converter(prog: str) -> str:
    """Name and version of a converter: `convert.dicode 0.1.0`."""
    return f"{prog.removeprefix('python -m ')} {dicode_jax.__version__}"


def metadata(origin: str, report: Mapping[str, Any], sha256: Mapping[str, str]) -> dict[str, str]:
    """What the header of converted weights says of where they come from.

    Args:
      origin: A key of `dicode_jax.model_card.LICENCES`.
      report: Of `run`; names the converter.
      sha256: Of `Source.sha256`.
    """
    sources = json.dumps(dict(sha256), sort_keys=True)
    return {"origin": origin, "converter": report["converter"], "sources": sources}


def hashes(*sources: Source) -> dict[str, str]:
    """File name -> SHA-256 over several sources, each file read once.

    Raises:
      UserError: A file is damaged, or two different files have one name.
    """
    out: dict[str, str] = {}
    done: set[pathlib.Path] = set()
    for source in sources:
        left = Source({}, tuple(path for path in source.files if path not in done))
        for name, digest in left.sha256().items():
            if out.setdefault(name, digest) != digest:
                raise UserError(f"two different source files are called {name}; rename one")
        done |= set(source.files)
    return out


@contextlib.contextmanager
def output_folder(out: str | os.PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Gives a folder to write to, which becomes `out` when the block ends well.

    Otherwise it is removed, and what was at `out` stays as it was.

    Raises:
      UserError: `out` is there and `overwrite` is not set, or is a file; or it cannot be written.
    """
    out = pathlib.Path(out)
    check_folder(out, overwrite=overwrite)
    temporary = _beside(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        old = None
        if out.exists():
            old = _beside(out)
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            if old is not None:
                old.rename(out)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(out: pathlib.Path, *, overwrite: bool) -> None:
    """Refuses an output folder that is in the way; call it before long work.

    Raises:
      UserError: See `output_folder`.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is already there; choose another --out, or add --overwrite")
        if not any(out.rglob("config.json")):
            raise UserError(f"{out} is not a model, so --overwrite leaves it alone")


def write_report(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Leaves the report in a converted model."""
    _write_report(str(folder / REPORT_FILE), report)


def _write_report(path: str, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=2, default=str) + "\n"
    if path == "-":
        print(text, end="")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _summary(error: ConversionError, report: str | None) -> str:
    """The first problems of a conversion on one line."""
    first, rest = error.problems[:3], len(error.problems) - 3
    more = f"; and {rest} more" if rest > 0 else ""
    where = f" (all are in {report})" if report and report != "-" else ""
    hint = " (--report FILE lists all)" if more and not report else where
    return f"the checkpoint does not fit: {'; '.join(first)}{more}{hint}"


def _beside(path: pathlib.Path) -> pathlib.Path:
    path = path.resolve()
    return path.with_name(f".{path.name[:100]}-{secrets.token_hex(4)}")

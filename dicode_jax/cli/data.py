"""`dicode data`: what a data set holds, films to clips, and which clips are worth learning."""

import argparse
from collections.abc import Callable
from typing import Any

from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines.options import Real, Whole, number

_KINDS = ("auto", "folder", "table", "tar", "array_record", "shapes")


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `data` and what can be done with data to the parser of `dicode`."""
    data = command("data", "look at a data set, or prepare one")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "print counts, lengths, captions and broken files of a data set"
    sub = actions.add_parser(
        "inspect",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. The data set is as `docs/data.md` describes.",
        allow_abbrev=False,
    )
    sub.add_argument(
        "path",
        metavar="PATH_OR_CONFIG",
        help="a folder, table or shards of videos, `shapes`, or a training's config file (.py)",
    )
    sub.add_argument("--sheet", metavar="FILE", help="also write a contact sheet, a .png")
    sub.add_argument(
        "--limit",
        type=number(int, Whole(1)),
        metavar="N",
        help="look at N records only, evenly spread",
    )
    _add_reading(sub)
    _add_cut(actions)
    _add_filter(actions)


def _add_reading(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--kind", choices=_KINDS, help="what PATH is (default: told by its form)")
    sub.add_argument(
        "--root", metavar="FOLDER", help="where the files of a table lie; read nothing outside"
    )
    sub.add_argument("--video-column", metavar="NAME", help="column of a table with the file")
    sub.add_argument("--caption-column", metavar="NAME", help="column of a table with the caption")


def _add_cut(actions: Any) -> None:
    text = "cut films into clips of one scene each"
    sub = actions.add_parser(
        "cut",
        help=text,
        description=f"{text[0].upper()}{text[1:]}, with PySceneDetect. Clips are called by film "
        "and time; those that are there stay, so that the same command goes on where it was "
        "stopped.",
        allow_abbrev=False,
    )
    sub.add_argument("films", nargs="+", metavar="FILM", help="a video file of any kind")
    sub.add_argument("--out", required=True, metavar="DIR", help="the folder for the clips")
    sub.add_argument(
        "--min-seconds",
        type=number(float, Real(0)),
        default=2.0,
        metavar="S",
        help="leave out shorter scenes (default: 2)",
    )
    sub.add_argument(
        "--max-seconds",
        type=number(float, Real(0, is_open=True)),
        default=60.0,
        metavar="S",
        help="divide longer scenes (default: 60)",
    )
    sub.add_argument(
        "--threshold",
        type=number(float, Real(0, 255, is_open=True)),
        default=27.0,
        metavar="X",
        help="how much colours change at a cut, 0 to 255; a lower one finds more (default: 27)",
    )


def _add_filter(actions: Any) -> None:
    text = "tell which clips are too still, too dark, have text on them, or are there twice"
    sub = actions.add_parser(
        "filter",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Writes a report, filter.jsonl, and a table of "
        "those that are kept, with a place for their captions. Nothing is deleted; other bounds "
        "need no second look at the files.",
        allow_abbrev=False,
    )
    sub.add_argument(
        "path",
        metavar="PATH_OR_CONFIG",
        help="a folder or a table of videos, or a training's config file (.py)",
    )
    sub.add_argument("--out", metavar="DIR", help="also link (or copy) what is kept into a folder")
    sub.add_argument(
        "--captions",
        metavar="FILE",
        help="the table, .jsonl or .csv (default: captions.jsonl beside the report)",
    )
    for name, default, what in (
        ("--min-motion", 0.005, "leave out what moves less"),
        ("--min-light", 0.08, "leave out what is darker"),
        ("--max-text", 0.01, "leave out where lines of text cover more of the picture"),
    ):
        sub.add_argument(
            name,
            type=number(float, Real(0, 1)),
            default=default,
            metavar="X",
            help=f"{what}, 0 to 1 (default: {default:g})",
        )
    sub.add_argument(
        "--max-distance",
        type=number(int, Whole(0, 11)),
        default=8,
        metavar="N",
        help="bits of 192 in which hashes of the same video may differ (default: 8)",
    )
    _add_reading(sub)


def data(args: argparse.Namespace) -> None:
    """Runs `dicode data`."""
    {"inspect": _inspect, "cut": _cut, "filter": _filter}[args.action](args)


def _inspect(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dicode_jax.data import inspect
    from dicode_jax.storage.files import check_output

    cfg = _config(args)
    if args.sheet is not None:
        check_output(args.sheet, (".png",), sources=[cfg.path])
    with tqdm(desc="records", unit="record", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = inspect.inspect(cfg, limit=args.limit, progress=progress)
    print("\n".join(inspect.report(found)))
    if args.sheet is not None:
        if not found.sheet:
            raise UserError(f"nothing in {cfg.path} can be read: no contact sheet")
        inspect.write_sheet(args.sheet, found)
        print(f"{args.sheet}: contact sheet")


def _cut(args: argparse.Namespace) -> None:
    """A film that cannot be cut does not stop the others, and is told of in the end."""
    from tqdm import tqdm

    from dicode_jax.data.scenes import CutConfig, cut_film

    names = ("min_seconds", "max_seconds", "threshold")
    cfg = CutConfig(**{name: getattr(args, name) for name in names})
    failed = []
    for film in args.films:
        with tqdm(unit="s", leave=False, disable=None, bar_format=_SECONDS) as bar:

            def tell(what: str, done: float, total: float, bar: Any = bar) -> None:
                if done < bar.n:  # the next pass
                    bar.reset()
                bar.total = total
                bar.set_description(what, refresh=False)
                bar.update(done - bar.n)

            try:
                done = cut_film(film, args.out, cfg, tell=tell)
            except UserError as error:
                if len(args.films) == 1:
                    raise
                failed.append(str(error))
                continue
        there = len(done.clips) - done.num_written
        print(
            f"{printable(film)}: {done.num_scenes:,} scenes, {done.num_written:,} clips written"
            + (f", {there:,} were there" if there else "")
        )
    if failed:
        raise UserError(f"{len(failed)} of {len(args.films)} films: {'; '.join(failed)}")


def _filter(args: argparse.Namespace) -> None:
    import collections
    import os

    from tqdm import tqdm

    from dicode_jax.data import captions, filtering
    from dicode_jax.storage.files import check_output, make_folder

    names = ("min_motion", "min_light", "max_text", "max_distance")
    cfg = filtering.FilterConfig(**{name: getattr(args, name) for name in names})
    data_cfg = _config(args)
    videos, path = filtering.videos_of(data_cfg), data_cfg.path
    home = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if args.out is not None:
        home = make_folder(args.out)
    report = os.path.join(home, "filter.jsonl")
    table = args.captions or os.path.join(home, "captions.jsonl")
    sources = [path] * os.path.isfile(path)  # a table, of which other columns would be lost
    check_output(report, (".jsonl",), sources=sources)
    check_output(table, captions.SUFFIXES, sources=[report, *sources])
    known = captions.known_captions(table)
    with tqdm(desc="videos", unit="video", leave=False, disable=None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        measured = filtering.measure_all(videos, report, tell=tell)
    verdicts = filtering.judge(measured, cfg)
    filtering.write_report(report, verdicts)
    kept = [video for video, verdict in zip(videos, verdicts) if verdict.is_kept]
    captions.check_none_is_lost(table, known, kept)
    if args.out is not None:
        filtering.link_all(kept, args.out)
    without = captions.write_template(table, kept, known, folder=args.out)
    counts = collections.Counter(reason for verdict in verdicts for reason in verdict.reasons)
    for reason in filtering.REASONS:
        print(f"{reason:<12}{counts[reason]:,}")
    print(f"{'kept':<12}{len(kept):,} of {len(videos):,}")
    print(f"{printable(report)}: what was measured of each, and why it is left out")
    print(f"{printable(table)}: what is kept; {without:,} without a caption")


_SECONDS = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"


def _config(args: argparse.Namespace):
    """The data settings that the path is, or that its config file has, with the options."""
    import dataclasses

    from dicode_jax.config import load_config_file
    from dicode_jax.data.config import DataConfig

    cfg = DataConfig(path=args.path)
    if args.path.endswith(".py"):
        cfg = getattr(load_config_file(args.path), "data", None)
        if not isinstance(cfg, DataConfig):
            raise UserError(f"{args.path} configures no data set; give the data set itself")
    names = ("kind", "root", "video_column", "caption_column")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(cfg, **given)

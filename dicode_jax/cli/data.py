"""`dicode data inspect`: what a data set holds, before anything is trained on it."""

import argparse
from collections.abc import Callable

from dicode_jax.errors import UserError
from dicode_jax.pipelines.options import Whole, number

_KINDS = ("auto", "folder", "table", "tar", "array_record", "shapes")


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `data` and what can be done with data to the parser of `dicode`."""
    data = command("data", "look at a data set")
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
    sub.add_argument("--kind", choices=_KINDS, help="what PATH is (default: told by its form)")
    sub.add_argument(
        "--root", metavar="FOLDER", help="where the files of a table lie; read nothing outside"
    )
    sub.add_argument("--video-column", metavar="NAME", help="column of a table with the file")
    sub.add_argument("--caption-column", metavar="NAME", help="column of a table with the caption")


def data(args: argparse.Namespace) -> None:
    """Runs `dicode data inspect`."""
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

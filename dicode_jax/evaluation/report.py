"""What an evaluation found: as JSON, and as a page of Markdown with plots."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dicode_jax.errors import UserError
from dicode_jax.evaluation.intervals import Interval
from dicode_jax.storage.files import atomic_path, read_object

JSON_FILE, PAGE_FILE = "results.json", "report.md"
MAX_BYTES = 1 << 28  # of results; a clip has some hundreds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Numbers over something: lines over numbers, or bars over words.

    Attributes:
      name: Of its file, without extension.
      title, x_label, y_label: What is written at it.
      x: Numbers or words.
      lines: What each line or row of bars is called -> a number or an interval for each of `x`.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    x: Sequence[float] | Sequence[str]
    lines: Mapping[str, Sequence[float | Interval]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What is known after an evaluation.

    Attributes:
      title: Of the page.
      settings: All that was chosen, by name.
      values: The numbers, by name.
      notes: What a number means, by name.
      plots: Drawn below the numbers.
      rows: What was found of each clip or video.
      pictures: Files in the same folder that the page shows, by what they show.
    """

    title: str
    settings: Mapping[str, Any]
    values: Mapping[str, float | Interval]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plots: Sequence[Plot] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)


FIELDS = {field.name for field in dataclasses.fields(Report)}


def earlier(folder: str | os.PathLike) -> dict[str, Any]:
    """What `results.json` of a folder holds: suite -> its report; nothing where there is none.

    Raises:
      UserError: The file is none of an evaluation's.
    """
    folder = pathlib.Path(folder)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder; name another")
    path = folder / JSON_FILE
    if not os.path.lexists(path):
        return {}
    found = read_object(path, "the results of an evaluation", MAX_BYTES)
    if not all(isinstance(one, dict) and one.keys() >= FIELDS for one in found.values()):
        raise UserError(f"{path} is not of an evaluation; name another folder, or move it away")
    return found


def write(report: Report, folder: str | os.PathLike, suite: str) -> pathlib.Path:
    """Writes `results.json`, `report.md` and a picture for each plot; gives the page's path.

    What other suites left in the folder stays, and is in both files still. Each file appears when
    it is whole, the page last.

    Args:
      suite: What the report is called among those of the folder.

    Raises:
      UserError: The folder's `results.json` is none of an evaluation's.
    """
    folder = pathlib.Path(folder)
    whole = earlier(folder) | {suite: _plain(report)}
    text = "\n".join(map(page, whole.values()))
    with atomic_path(folder / JSON_FILE) as temporary:
        temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    for plot in report.plots:
        with atomic_path(folder / f"{plot.name}.png") as temporary:
            draw(plot, temporary)
    with atomic_path(folder / PAGE_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / PAGE_FILE


def page(report: Mapping[str, Any]) -> str:
    """A report, as `results.json` holds it, as Markdown; pictures are named as `write` does."""
    values = {name: _value(held) for name, held in report["values"].items()}
    lines = [f"# {report['title']}", "", table(values), ""]
    lines += [f"- **{name}**: {note}" for name, note in report["notes"].items()]
    for plot in report["plots"]:
        lines += ["", f"![{plot['title']}]({plot['name']}.png)"]
    for shown, file in report["pictures"].items():
        lines += ["", f"{shown}:", "", f"![{shown}]({file})"]
    lines += ["", "Settings:", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in report["settings"].items()]
    return "\n".join(lines) + "\n"


def table(values: Mapping[str, float | Interval]) -> str:
    """Numbers as rows of Markdown: the mean, its 95 % interval, and of how many."""
    lines = ["| measure | value | 95 % interval | of |", "|---|---|---|---|"]
    for name, value in values.items():
        if isinstance(value, Interval):
            mean, low, high = map(_number, (value.mean, value.low, value.high))
            lines.append(f"| {name} | {mean} | {low} to {high} | {value.count} |")
        else:
            lines.append(f"| {name} | {_number(value)} | | |")
    return "\n".join(lines)


def draw(plot: Plot, path: str | os.PathLike) -> None:
    """Writes a plot as a .png; intervals have bars of error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.3 * len(plot.x)), 3.4), layout="constrained")
    axes = figure.add_subplot()
    is_words = any(isinstance(x, str) for x in plot.x)
    places: list[Any] = list(range(len(plot.x))) if is_words else list(plot.x)
    width = 0.8 / max(len(plot.lines), 1)
    for row, (name, line) in enumerate(plot.lines.items()):
        means = [y.mean if isinstance(y, Interval) else y for y in line]
        ends = [(y.low, y.high) if isinstance(y, Interval) else (y, y) for y in line]
        if is_words:
            sides = [
                [mean - low for mean, (low, _) in zip(means, ends)],
                [high - mean for mean, (_, high) in zip(means, ends)],
            ]
            at = [place + (row - (len(plot.lines) - 1) / 2) * width for place in places]
            axes.bar(at, means, 0.9 * width, yerr=sides, capsize=2, label=name)
        else:
            axes.plot(places, means, marker="." if len(means) < 40 else None, label=name)
            low, high = zip(*ends, strict=True)
            axes.fill_between(places, low, high, alpha=0.2)
    if is_words:
        axes.set_xticks(places, [str(x) for x in plot.x], rotation=30, ha="right")
    if len(plot.lines) > 1:
        axes.legend(fontsize=8)
    axes.set_title(plot.title, fontsize=10, parse_math=False)
    axes.set_xlabel(plot.x_label, fontsize=8)
    axes.set_ylabel(plot.y_label, fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, format="png", dpi=110)


def _plain(value: Any) -> Any:
    """What JSON knows; what is not finite is null."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _value(held: Any) -> float | Interval:
    """A number or an interval out of what `_plain` made of it."""
    read = lambda x: math.nan if x is None else float(x)  # noqa: E731
    if isinstance(held, dict):
        mean, low, high = (read(held[end]) for end in ("mean", "low", "high"))
        return Interval(mean, low, high, held["count"])
    return read(held)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

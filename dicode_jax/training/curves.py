"""Metrics of a run as text and as curves; what they are is written by `training.logs`."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

Records = Sequence[dict]

# What is looked at first comes first, whatever else a training reports.
_FIRST = ("loss", "validation_loss", "held_out_loss", "held_out_psnr", "grad_norm", "lr")
_SMOOTHING = 50  # a running mean spans this fraction, 1/50, of the points


def metric_names(records: Records) -> list[str]:
    """Names of all numbers that were logged, the important ones first."""
    numeric = {
        name
        for record in records
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return sorted(numeric, key=lambda name: (_rank(name), name))


def _rank(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def summarize(records: Records, num_rows: int) -> list[dict]:
    """At most `num_rows` records, each the mean over a part of the run, named by its last step."""
    parts = np.array_split(np.arange(len(records)), min(num_rows, len(records)))
    names = metric_names(records)
    rows = []
    for part in parts:
        row = {"step": records[part[-1]]["step"]}
        for name in names:
            values = [records[i][name] for i in part if records[i].get(name) is not None]
            if values:
                with np.errstate(all="ignore"):  # a mean of huge numbers is none
                    row[name] = float(np.mean(values, dtype=np.float64))
        rows.append(row)
    return rows


def table(records: Records, *, width: int | None = None) -> str:
    """Records as lines under the names of their numbers, `-` where one was not logged.

    Args:
      records: Each with a `step`.
      width: Columns of the terminal; what does not fit beside goes below, under its own heading.
    """
    columns = [["step", *(str(record["step"]) for record in records)]]
    columns += [
        [name, *(_number(record.get(name)) for record in records)] for name in metric_names(records)
    ]
    sizes = [max(map(len, column)) for column in columns]
    blocks, used = [[]], sizes[0]
    for column, size in zip(columns[1:], sizes[1:], strict=True):
        if width is not None and blocks[-1] and used + 2 + size > width:
            blocks.append([])
            used = sizes[0]
        blocks[-1].append([text.rjust(size) for text in column])
        used += 2 + size
    steps = [text.rjust(sizes[0]) for text in columns[0]]
    lines = ["\n".join("  ".join(row) for row in zip(steps, *block)) for block in blocks]
    return "\n\n".join(lines)


def _number(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def plot(records: Records, path: str | pathlib.Path, *, title: str = "") -> None:
    """Writes one small diagram per number, over steps; long curves also with a running mean."""
    from matplotlib.figure import Figure

    names = metric_names(records)
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(5 * num_columns, 3 * num_rows), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for i, name in enumerate(names):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        steps, values = np.asarray(points, np.float64).T
        values = np.where(np.abs(values) < 1e300, values, np.inf)  # no axis goes further
        span = len(points) // _SMOOTHING
        if span < 2:
            axes.plot(steps, values, linewidth=1.2, marker="." if len(points) < 30 else None)
        else:
            axes.plot(steps, values, linewidth=0.6, alpha=0.35)
            mean = np.convolve(values, np.ones(span) / span, mode="valid")
            axes.plot(steps[span - 1 :], mean, linewidth=1.4, color="C0")
        axes.set_title(name, fontsize=10, parse_math=False)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    path = pathlib.Path(path)
    figure.savefig(path, format=path.suffix[1:], dpi=110)

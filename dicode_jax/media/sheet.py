"""Pictures of several clips, a row of frames each."""

import bisect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dicode_jax.media import record as record_lib
from dicode_jax.storage.files import atomic_path

_WIDEST_CELL = 8  # times the height of a cell


def contact_sheet(
    path: str | os.PathLike,
    rows: Sequence[UInt8[np.ndarray, "f h w 3"]],
    *,
    labels: Sequence[str] | None = None,
    columns: int = 12,
    cell_size: int = 112,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a picture of several clips: a row of frames each, evenly spaced in time.

    Args:
      path: the .png to write; its folder is made if need be.
      rows: clips or runs of images, uint8, each of one size.
      labels: a line above each row, cut where it is too long.
      columns: frames per row at most; the first and the last are always among them.
      cell_size: height of a frame on the sheet in pixels; of one that is more than 8 times as wide
        as high, an eighth of its width. Small frames grow by a whole factor, so that their pixels
        stay sharp.
      record: what the file says of how it was made, see `media.record`.
    """
    rows = [np.asarray(row) for row in rows]
    if not rows or any(row.ndim != 4 or row.dtype != np.uint8 or not len(row) for row in rows):
        raise ValueError(f"want rows uint8 [f, h, w, 3], got {[list(row.shape) for row in rows]}")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    gap, text_size = max(2, cell_size // 28), max(11, cell_size // 8)
    font = ImageFont.load_default(text_size)
    label_height = 0 if labels is None else round(text_size * 1.7)
    strips = []
    for row in rows:
        chosen = np.linspace(0, len(row) - 1, min(columns, len(row))).round().astype(int)
        strips.append([_cell(row[i], cell_size) for i in chosen])
    border = 4 * gap
    width = max(sum(cell.width + gap for cell in strip) - gap for strip in strips) + 2 * border
    row_gap = border if labels is None else 3 * gap
    height = sum(strip[0].height + label_height + row_gap for strip in strips) - row_gap
    sheet = Image.new("RGB", (width, height + 2 * border), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    y = border
    for strip, label in zip(strips, labels or [""] * len(strips), strict=True):
        if label_height:
            text = _shortened(label, font, width - 2 * border)
            draw.text((border, y), text, fill=(60, 62, 68), font=font)
            y += label_height
        x = border
        for cell in strip:
            sheet.paste(cell, (x, y))
            x += cell.width + gap
        y += strip[0].height + row_gap
    text = PngImagePlugin.PngInfo()
    if record is not None:
        text.add_itxt(record_lib.KEY, record_lib.to_text(record))
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True, pnginfo=text)


def in_cell(width: int, height: int, cell_size: int) -> float:
    """The factor that brings a frame to the height of a cell, and a very wide one to its width."""
    return min(cell_size / height, _WIDEST_CELL * cell_size / width)


def _cell(image: np.ndarray, size: int) -> Image.Image:
    """A frame in a cell `size` high; one that is much smaller grows by a whole factor instead."""
    picture = Image.fromarray(image)
    factor = in_cell(*picture.size, size)
    if round(factor) >= 2:
        width, height = (round(factor) * side for side in picture.size)
        return picture.resize((width, height), Image.Resampling.NEAREST)
    width, height = (max(1, round(factor * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "..."))
    return text[: max(0, fits - 1)].rstrip() + "..."

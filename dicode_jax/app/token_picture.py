"""The tokens of keyframes as a picture: a map of their numbers below each keyframe."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dicode_jax.typing import Float, UInt8

_CELL, _GAP, _PER_ROW = 112, 12, 8  # pixels, pixels, keyframes
_PAPER, _INK = (250, 250, 248), (60, 62, 68)
_CLIPPED = 99.0  # percentile of the sizes that gets the strongest colour


def draw(
    tokens: Float[np.ndarray, "k n z"], keyframes: Sequence[UInt8[np.ndarray, "h w 3"]]
) -> Image.Image:
    """Keyframes in a row, and below each its tokens: one line for a token, blue below 0, red above.

    Args:
      tokens: Of any range; all are coloured by the same scale.
      keyframes: One for each.
    """
    k, n, z = tokens.shape
    strongest = max(float(np.percentile(np.abs(tokens), _CLIPPED)), 1e-6)
    shades = matplotlib.colormaps["RdBu_r"]((tokens / strongest).clip(-1, 1) / 2 + 0.5)
    maps = np.rint(255 * shades[..., :3]).astype(np.uint8)
    font, line = ImageFont.load_default(12), 18
    height, above = 2 * _CELL + line + 2 * _GAP, line + _GAP
    rows, columns = -(-k // _PER_ROW), max(3, min(k, _PER_ROW))
    width = columns * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, above + rows * height + _GAP // 2), _PAPER)
    pen = ImageDraw.Draw(sheet)
    title = f"{n} tokens of {z} numbers each: blue below 0, red above"
    pen.text((_GAP, _GAP), title, fill=_INK, font=font)
    for i, (frame, shade) in enumerate(zip(keyframes, maps, strict=True)):
        x, y = _GAP + i % _PER_ROW * (_CELL + _GAP), above + i // _PER_ROW * height
        pen.text((x, y), f"keyframe {i}", fill=_INK, font=font)
        sheet.paste(_fitted(frame, Image.Resampling.BICUBIC), (x, y + line))
        sheet.paste(_fitted(shade, Image.Resampling.NEAREST), (x, y + line + _CELL + _GAP // 2))
    return sheet


def _fitted(pixels: np.ndarray, how: Image.Resampling) -> Image.Image:
    return Image.fromarray(pixels).resize((_CELL, _CELL), how)

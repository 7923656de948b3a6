"""Pictures as Pillow opens them: in the formats that a data set may hold, and with one error."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import IO

from PIL import Image

from dicode_jax.errors import UserError

# What the suffixes of `records.IMAGE_SUFFIXES` stand for. Pillow goes by what a file holds, not by
# its name, and would hand PostScript to another program; it tries no format but these.
FORMATS = ("AVIF", "BMP", "JPEG", "PNG", "TIFF", "WEBP")


@contextlib.contextmanager
def open_picture(
    file: str | os.PathLike | IO[bytes], name: str | os.PathLike
) -> Iterator[Image.Image]:
    """Opens a file, whose pixels are decoded inside the block, and closes it.

    Args:
      file: a path, or an open file.
      name: what errors call it.

    Raises:
      UserError: it is of none of `FORMATS`, has more pixels than Pillow deems safe
        (`PIL.Image.MAX_IMAGE_PIXELS`), or Pillow fails later inside the block.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        with image:
            yield image
    except Image.UnidentifiedImageError as error:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"{name} is not a picture: it holds no {known}") from error
    except Exception as error:  # of many kinds: every decoder of Pillow has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read as a picture ({reason})") from error

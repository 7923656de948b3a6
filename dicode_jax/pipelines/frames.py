"""Given frames in the size of a model."""

from typing import Any

import numpy as np

from dicode_jax.errors import UserError
from dicode_jax.media.resize import resize_square
from dicode_jax.pipelines import checks
from dicode_jax.typing import Float


def square(
    frame: Any, size: int, *, is_cropped: bool, antialias: bool
) -> Float[np.ndarray, "s s 3"]:
    """A frame as a square, in 0..255 and not rounded.

    Args:
      frame: uint8 `[h, w, 3]`.
      size: Side of the square.
      is_cropped: Whether it is the largest square in the middle, or all of the frame, stretched.
      antialias: See `media.resize`.

    Raises:
      UserError: It is no such frame.
    """
    frame = checks.as_array(frame, "a keyframe is uint8 [h, w, 3]")
    if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise UserError(f"a keyframe is uint8 [h, w, 3], got {frame.dtype} {frame.shape}")
    h, w, _ = frame.shape
    height, width = (min(h, w),) * 2 if is_cropped else (h, w)
    left, top = (w - width) / 2, (h - height) / 2
    box = (left, top, left + width, top + height)
    return resize_square(frame, size, box, antialias=antialias)

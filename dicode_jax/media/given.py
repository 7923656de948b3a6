"""What a caller may give as an image or a video: an array, an image of Pillow, a path."""

import collections
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dicode_jax.errors import UserError, printable
from dicode_jax.media.picture import open_picture
from dicode_jax.media.shown import shown_picture
from dicode_jax.media.video import Frame, iter_frames_at, probe, read_video
from dicode_jax.media.videos import Video, Videos

READ_STEP = 32  # frames between two words about how far a file is read


def read_image(given: Any, name: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """An image as it is to be seen: turned as its camera says, transparency on white.

    Args:
      given: uint8 `[h, w, 3]`, `[h, w, 4]` with alpha or grey `[h, w]`; an image of Pillow; or the
        path of a picture.
      name: What errors call it.

    Raises:
      UserError: It is none of these, is empty, or cannot be read.
    """
    if isinstance(given, str | os.PathLike):
        with open_picture(given, given) as image:
            return np.asarray(shown_picture(image))
    if isinstance(given, Image.Image):
        return np.asarray(shown_picture(given))
    wanted = f"{name} is uint8 [h, w, 3], a picture of Pillow or a path"
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{wanted}, got {printable(repr(given), 60)}") from error
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise UserError(f"{wanted}, got {_described(given, array)}")
    if array.ndim == 3 and array.shape[-1] == 3:
        return array
    return np.asarray(shown_picture(Image.fromarray(array)))


def read_images(given: Any, name: str = "image") -> list[UInt8[np.ndarray, "h w 3"]]:
    """One image, or several: a list of what `read_image` takes, or an array `[b, h, w, 3]`.

    Raises:
      UserError: There is none, or as `read_image`.
    """
    many = isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 4
    images = [read_image(one, name) for one in (given if many else [given])]
    if not images:
        raise UserError(f"{name}: the list is empty; give one at least")
    return images


def read_frames(
    given: Any,
    name: str = "video",
    *,
    fps: float | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a video.

    Args:
      given: uint8 `[f, h, w, 3]`, a `Video`, a batch of one, images of Pillow, or the path of a
        file.
      name: What errors call it.
      fps: Rate at which a file is read; None for all its frames.
      progress: See `watched_frames`; of a file that is read at a rate.

    Raises:
      UserError: It is none of these, is empty, or cannot be read.
    """
    if isinstance(given, str | os.PathLike):
        if fps is None:
            return read_video(given).frames
        return np.stack([frame.image for frame in watched_frames(given, fps, progress)])
    if isinstance(given, Video | Videos):
        return given.frames
    if isinstance(given, list | tuple) and given and isinstance(given[0], Image.Image | str):
        images = read_images(given, name)
        if len({image.shape for image in images}) > 1:
            raise UserError(f"{name}: its frames differ in size")
        return np.stack(images)
    wanted = f"{name} is uint8 [f, h, w, 3] or a path"
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{wanted}, got {printable(repr(given), 60)}") from error
    if array.ndim == 5:
        if len(array) != 1:
            raise UserError(f"{name}: there are {len(array)} videos; give one, such as videos[0]")
        array = array[0]
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
        raise UserError(f"{wanted}, got {_described(given, array)}")
    return array


def _described(given: Any, array: np.ndarray) -> str:
    if array.ndim == 0 or array.dtype == object:
        return printable(repr(given), 60)
    return f"{array.dtype} {list(array.shape)}"


def read_last(
    path: str | os.PathLike,
    most: int,
    *,
    fps: float,
    fit: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[str, int, int], Any] | None = None,
) -> tuple[UInt8[np.ndarray, "f y x 3"], int]:
    """The last frames of a file, `most` at most, and how many it has; no others are held.

    Args:
      fps: Rate at which it is read.
      fit: From a frame uint8 `[h, w, 3]` to one of the wanted size.
      progress: See `watched_frames`.

    Raises:
      UserError: It cannot be read.
    """
    last, count = collections.deque(maxlen=most), 0
    for frame in watched_frames(path, fps, progress):
        last.append(fit(frame.image))
        count += 1
    return np.stack(last), count


def watched_frames(
    path: str | os.PathLike, fps: float, progress: Callable[[str, int, int], Any] | None
) -> Iterator[Frame]:
    """Frames as `iter_frames_at` reads them, which a long file takes minutes for.

    Args:
      progress: Told how far it is, as `("frames read", done, total)`; the total is 0 where the file
        does not know its length.

    Raises:
      UserError: It cannot be read.
    """
    total = round((probe(path).duration or 0) * fps) if progress else 0
    for done, frame in enumerate(iter_frames_at(path, fps)):
        if progress is not None and done % READ_STEP == 0:
            progress("frames read", done, max(total, done) if total else 0)
        yield frame

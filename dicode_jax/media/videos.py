"""A video in memory: its frames, and what is known of how they came about."""

import base64
import dataclasses
import html
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, overload

import numpy as np
from jaxtyping import Float, UInt8

from dicode_jax.errors import UserError, printable
from dicode_jax.media.sheet import contact_sheet
from dicode_jax.media.writer import VIDEO_SUFFIXES, VideoWriter
from dicode_jax.storage.files import check_output

SHEET_SUFFIX = ".png"
_SHOWN = 8  # videos of a batch that a notebook shows
_LEAST_WIDTH = 256  # pixels on screen; smaller frames are shown larger


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Video:
    """One video. It stands for its frames where an array is wanted, and shows itself in a notebook.

    Attributes:
      frames: uint8 `[f, h, w, 3]` in [0, 255].
      fps: Frames per second.
      times: When each frame appears, in seconds, of one that was read from a file.
      prompt, seed: What it was painted from.
      tokens: Its deep tokens `[k, n, z]`, where the model has such.
      record: All that is needed to paint it again, see `media.record`.
    """

    frames: UInt8[np.ndarray, "f h w 3"]
    fps: float
    times: Float[np.ndarray, " f"] | None = None
    prompt: str | None = None
    seed: int | None = None
    tokens: Float[np.ndarray, "k n z"] | None = None
    record: Mapping[str, Any] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _array(self.frames, dtype, copy)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.frames)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.frames[key]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frames.shape

    @property
    def dtype(self) -> np.dtype:
        return self.frames.dtype

    @property
    def ndim(self) -> int:
        return self.frames.ndim

    def __repr__(self) -> str:
        f, h, w, _ = self.frames.shape
        said = "" if self.seed is None else f", seed {self.seed}"
        said += "" if not self.prompt else f", {printable(self.prompt, 60)!r}"
        return f"Video({f} frames of {w} x {h}, {f / self.fps:.3g} s{said})"

    def save(self, path: str | os.PathLike, *, fps: float | None = None) -> None:
        """Writes .mp4, .gif or .webp, or a .png: the contact sheet of its frames.

        An mp4 and a png keep `record`, which `dicode info FILE` shows.

        Args:
          path: The file, which appears when it is whole.
          fps: Another rate than its own.

        Raises:
          UserError: The path cannot be written, or `fps` is no rate.
        """
        if pathlib.Path(path).suffix.lower() == SHEET_SUFFIX:
            check_output(path, [SHEET_SUFFIX])
            labels = [self.prompt] if self.prompt else None
            contact_sheet(path, [self.frames], labels=labels, record=self.record)
            return
        check_output(path, [*VIDEO_SUFFIXES, SHEET_SUFFIX])
        rate = self.fps if fps is None else fps
        with VideoWriter(path, rate, record=self.record) as writer:
            writer.append(self.frames)

    def _repr_html_(self) -> str:
        """The video itself, as h264 within the page."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "video.mp4")
            self.save(path)
            data = base64.b64encode(path.read_bytes()).decode()
        width = max(self.shape[2], _LEAST_WIDTH)
        title = html.escape(repr(self), quote=True)
        style = f"width: {width}px; max-width: 100%; image-rendering: pixelated"
        return (
            f'<video controls loop autoplay muted playsinline title="{title}" style="{style}" '
            f'src="data:video/mp4;base64,{data}"></video>'
        )


class Videos:
    """What a pipeline paints in one call: a video for each prompt, and for each wanted of it.

    A sequence of `Video`, prompt by prompt. As an array it is `[b, f, h, w, 3]`, and one that holds
    a single video also has what `Video` has: `frames`, `save` and the others.

    Args:
      videos: One or more, all of one shape.
    """

    def __init__(self, videos: Iterable[Video]):
        self._videos = list(videos)

    @property
    def only(self) -> Video:
        """The video of a batch of one.

        Raises:
          UserError: There are several.
        """
        if len(self._videos) != 1:
            raise UserError(f"there are {len(self)} videos; take one, such as videos[0]")
        return self._videos[0]

    def __len__(self) -> int:
        return len(self._videos)

    def __iter__(self) -> Iterator[Video]:
        return iter(self._videos)

    @overload
    def __getitem__(self, key: int) -> Video: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    @overload
    def __getitem__(self, key: Any) -> Any: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | np.integer):
            return self._videos[key]
        if isinstance(key, slice):
            return type(self)(self._videos[key])
        return np.asarray(self)[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if len(self) == 1:
            return _array(self.only.frames[None], dtype, copy)
        if copy is False:
            raise ValueError("several videos become one array by a copy alone")
        return _array(np.stack([video.frames for video in self]), dtype, None)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *(self._videos[0].shape if self._videos else ())

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def frames(self) -> UInt8[np.ndarray, "f h w 3"]:
        return self.only.frames

    @property
    def fps(self) -> float:
        return self.only.fps

    @property
    def prompt(self) -> str | None:
        return self.only.prompt

    @property
    def seed(self) -> int | None:
        return self.only.seed

    @property
    def tokens(self) -> Float[np.ndarray, "k n z"] | None:
        return self.only.tokens

    @property
    def record(self) -> Mapping[str, Any] | None:
        return self.only.record

    def save(self, path: str | os.PathLike, *, fps: float | None = None) -> None:
        """Writes the only video; see `Video.save`.

        Raises:
          UserError: There are several, or it cannot be written.
        """
        self.only.save(path, fps=fps)

    def __repr__(self) -> str:
        return f"Videos({', '.join(map(repr, self._videos[:_SHOWN]))}{self._more()})"

    def _repr_html_(self) -> str:
        shown = "\n".join(video._repr_html_() for video in self._videos[:_SHOWN])
        return shown + html.escape(self._more())

    def _more(self) -> str:
        more = len(self) - _SHOWN
        return f" and {more} more" if more > 0 else ""


def _array(frames: np.ndarray, dtype: Any, copy: bool | None) -> np.ndarray:
    if dtype is not None and np.dtype(dtype) != frames.dtype:
        if copy is False:
            raise ValueError(f"frames are {frames.dtype}; another type needs a copy")
        return frames.astype(dtype)
    return frames.copy() if copy else frames

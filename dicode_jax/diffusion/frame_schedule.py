"""Which frame takes which step when: each starts `lag` rows after the one before it.

AR-Diffusion (arXiv 2503.07418, section 3.4), the adaptive-difference schedule: lag 0 denoises all
frames together, the number of steps one frame after the other. A row is one call of the network. It
sees a window of frames, which moves on when the next one starts.

The original counts row by row; here all is said in closed form, so that a run of any length takes
no memory. It lets frames start within the window only when those given in front are replayed, cuts
frames off before their last step when the lag is small, and has nothing to say about it; here given
frames are done from the start, and such a lag is refused.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from dicode_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FrameSchedule:
    """All rows of a run; `frame_schedule` makes one.

    Attributes:
        num_frames: of the video, given ones among them.
        num_steps: of every frame.
        lag: rows between the starts of neighbouring frames.
        window: frames that the network sees.
        num_given: frames in front that are known.
    """

    num_frames: int
    num_steps: int
    lag: int
    window: int
    num_given: int = 0

    @property
    def num_rows(self) -> int:
        """Calls of the network."""
        return self.num_steps + (self.num_frames - self.num_given - 1) * self.lag

    def steps_at(self, rows: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Steps that frames have taken before rows (after the last: row `num_rows`).

        Args:
            rows, frames: their numbers, of shapes that broadcast.
        """
        begins = (frames - self.num_given) * self.lag
        steps = np.clip(rows - begins, 0, self.num_steps)
        return np.where(frames < self.num_given, self.num_steps, steps).astype(np.int32)

    def starts_at(self, rows: np.ndarray) -> np.ndarray:
        """The first frame of the window in rows."""
        f, g, window = self.num_frames, self.num_given, self.window
        if self.lag:
            end = np.maximum(max(window, g + 1), g + 1 + rows // self.lag)
        else:
            end = max(window, min(f, g + window)) + 1 + rows
        return (np.minimum(end, f) - window).astype(np.int32)

    @property
    def steps(self) -> np.ndarray:
        """`steps_at` of all rows and frames, int ``[rows + 1, frames]``."""
        return self.steps_at(np.arange(self.num_rows + 1)[:, None], np.arange(self.num_frames))

    @property
    def starts(self) -> np.ndarray:
        """`starts_at` of all rows, ``[rows]``."""
        return self.starts_at(np.arange(self.num_rows))

    @property
    def moves(self) -> np.ndarray:
        """Whether a frame takes a step in a row, bool ``[rows, frames]``."""
        return np.diff(self.steps, axis=0) > 0

    def parts(self) -> Iterator[tuple[int, int]]:
        """Runs of rows, the first and that behind the last, at whose ends frames are done.

        One frame at most, or with lag 0 all of them; the first run may be shorter than the others.
        From the first row of one to that of the next the window moves by one frame at most.
        """
        stop, size = self.num_steps, self.lag or self.num_steps
        for start in range(stop % size - size if stop % size else 0, self.num_rows, size):
            yield max(start, 0), start + size

    def check(self) -> "FrameSchedule":
        """The schedule itself.

        Raises:
            UserError: a frame would have to move outside of the window.
        """
        fits = self.num_frames - self.num_given <= self.window
        if not fits and self.window * self.lag < self.num_steps:
            least = -(-self.num_steps // self.window)
            raise UserError(
                f"lag: {self.num_frames} frames do not fit the window of {self.window}, and frames "
                f"would leave it before their last step: {self.window} * lag must reach the "
                f"{self.num_steps} steps, so lag {least} at least, got {self.lag}"
            )
        return self


def frame_schedule(
    num_frames: int, num_steps: int, lag: int, *, window: int, num_given: int = 0
) -> FrameSchedule:
    """The rows of a run, ``num_steps + (num_frames - num_given - 1) * lag`` of them.

    Args:
        num_frames: of the video, given ones among them.
        num_steps: of every frame.
        lag: rows between the starts of neighbouring frames, 0..num_steps.
        window: frames that the network sees at most.
        num_given: frames in front that are known; the first other one starts in the first row.

    Raises:
        UserError: the lag is out of its range, or nothing is left to do.
    """
    if not 0 <= lag <= num_steps:
        raise UserError(f"lag: want a whole number from 0 to the {num_steps} steps, got {lag}")
    if not 0 <= num_given < num_frames:
        raise UserError(
            f"{num_given} frames are given, so num_frames must be above, got {num_frames}"
        )
    return FrameSchedule(num_frames, num_steps, lag, min(window, num_frames), num_given)

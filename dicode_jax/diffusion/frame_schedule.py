"""Which frame takes which step when: each starts `lag` rows after the one before it.

AR-Diffusion (arXiv 2503.07418, section 3.4), the adaptive-difference schedule: lag 0 denoises all
frames together, the number of steps one frame after the other. A row is one call of the network. It
sees a window of frames, which moves on when the next one starts.

The original lets frames start within the window only when those given in front are replayed, cuts
frames off before their last step when the lag is small, and has nothing to say about it; here given
frames are done from the start, and such a lag is refused.
"""

import dataclasses

import numpy as np

from dicode_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class FrameSchedule:
    """All rows of a run.

    Attributes:
        steps: how many steps a frame has taken before each row, and after the last; int
            ``[rows + 1, frames]``.
        starts: first frame of the window, ``[rows]``.
        window: frames of the window.
        lag: rows between the starts of neighbouring frames.
    """

    steps: np.ndarray
    starts: np.ndarray
    window: int
    lag: int

    @property
    def moves(self) -> np.ndarray:
        """Whether a frame takes a step in a row, bool ``[rows, frames]``."""
        return self.steps[1:] != self.steps[:-1]

    def check(self) -> "FrameSchedule":
        """The schedule itself.

        Raises:
            UserError: a frame would have to move outside of the window.
        """
        frames = np.arange(self.steps.shape[1])
        seen = (frames >= self.starts[:, None]) & (frames < self.starts[:, None] + self.window)
        if (self.moves & ~seen).any():
            num_steps = int(self.steps[-1, -1])
            least = -(-num_steps // self.window)
            raise UserError(
                f"lag: {len(frames)} frames do not fit the window of {self.window}, and frames "
                f"would leave it before their last step: {self.window} * lag must reach the "
                f"{num_steps} steps, so lag {least} at least, got {self.lag}"
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
    row = np.arange(num_steps + (num_frames - num_given - 1) * lag + 1)[:, None]
    begins = (np.arange(num_frames) - num_given) * lag
    steps = np.clip(row - begins, 0, num_steps)
    steps[:, :num_given] = num_steps
    window = min(window, num_frames)
    moves = steps[1:] != steps[:-1]
    end = max(window, min(num_frames, num_given + (window if lag == 0 else 1)))
    starts = np.empty(len(moves), np.int32)
    for i, moving in enumerate(moves):
        if end < num_frames and moving[end]:
            end += 1
        starts[i] = end - window
    return FrameSchedule(steps.astype(np.int32), starts, window, lag)

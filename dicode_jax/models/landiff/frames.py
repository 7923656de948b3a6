"""How LanDiff's semantic tokens lie: one I frame, then P frames of fewer tokens, in segments.

Yin et al., "The Best of Both Worlds: Integrating Language Models and Diffusion Models for Video
Generation" (arXiv 2503.04606). A semantic frame stands for four frames of a video, as a latent
does.
"""

import dataclasses

import jax
import jax.core
import numpy as np


def check_codes(codes: jax.Array | np.ndarray, size: int) -> None:
    """Refuses codes that a codebook of `size` has not, where they can be known (not under `jit`).

    Raises:
      ValueError: There is one.
    """
    if isinstance(codes, jax.core.Tracer):
        return
    wrong = np.asarray(codes)
    wrong = wrong[(wrong < 0) | (wrong >= size)]
    if wrong.size:
        raise ValueError(
            f"semantic tokens are codes from 0 to {size - 1}, got {wrong.flat[0]} "
            f"({wrong.size} such)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameTokens:
    """Tokens of a frame; the defaults are the release's.

    Attributes:
      iframe: Of the first frame of a segment.
      pframe: Of every other frame.
      segment: Frames of a segment; the last one may have fewer.

    Raises:
      ValueError: A count is not positive or far too large.
    """

    iframe: int = 330
    pframe: int = 74
    segment: int = 13

    def __post_init__(self):
        for name in ("iframe", "pframe", "segment"):
            if not 1 <= getattr(self, name) <= 2**16:
                raise ValueError(f"{name} must be from 1 to {2**16}, got {getattr(self, name)}")

    def segments(self, num_frames: int) -> tuple[int, ...]:
        """Frames of each segment of a video.

        Raises:
          ValueError: There is no frame.
        """
        if num_frames < 1:
            raise ValueError(f"a video has at least one semantic frame, got {num_frames}")
        full, rest = divmod(num_frames, self.segment)
        return (self.segment,) * full + ((rest,) if rest else ())

    def per_frame(self, num_frames: int) -> tuple[int, ...]:
        """Tokens of each frame."""
        return tuple(
            self.iframe if frame == 0 else self.pframe
            for length in self.segments(num_frames)
            for frame in range(length)
        )

    def count(self, num_frames: int) -> int:
        """Tokens of a video."""
        first = -(-num_frames // self.segment)  # one in each segment
        return first * self.iframe + (num_frames - first) * self.pframe

    def num_frames(self, count: int) -> int:
        """Frames of which a video with so many tokens is made.

        Raises:
          ValueError: No video has so many.
        """
        whole = self.iframe + (self.segment - 1) * self.pframe
        full, rest = divmod(count, whole)
        frames = full * self.segment
        if count > 0 and rest == 0:
            return frames
        more, left = divmod(rest - self.iframe, self.pframe)
        if rest < self.iframe or left:
            raise ValueError(
                f"{count} tokens make no video: a segment has {self.iframe} and then "
                f"{self.pframe} for each of up to {self.segment - 1} more frames"
            )
        return frames + 1 + more

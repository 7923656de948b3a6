"""How much moves in a video, by a plain definition that is ours: the release says none.

Its language model is told a score that its authors are said to derive from optical flow. Here it is
the mean change of grey from frame to frame, so that a cut or a flicker counts as motion too; a
training may scale it (`motion_scale`).
"""

import itertools

import numpy as np
from jaxtyping import Float, UInt8

from dicode_jax.models.landiff.features import STRIDE, num_semantic_frames

WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)


def frame_motion(frames: UInt8[np.ndarray, "f h w 3"]) -> Float[np.ndarray, " g"]:
    """Motion of each semantic frame: mean absolute change of grey a frame, as a share of all grey.

    Semantic frame i stands for the frames 4 i - 3 to 4 i, each compared with the one before it; the
    first stands for one frame alone and has 0. Float32 in [0, 1], and seldom above 0.1.

    Raises:
      ValueError: There are not 4k + 1 frames.
    """
    count = num_semantic_frames(len(frames))
    grey = [frame.astype(np.float32) @ WEIGHTS for frame in frames]
    changes = [np.abs(after - before).mean() for before, after in itertools.pairwise(grey)]
    motion = np.zeros(count, np.float32)
    motion[1:] = np.reshape(changes, (count - 1, STRIDE)).mean(1) / 255
    return motion

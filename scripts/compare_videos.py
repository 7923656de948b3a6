"""A contact sheet of two videos, one above the other, at equal times.

python scripts/compare_videos.py input.mp4 decoded.mp4 --out comparison.png
"""

import argparse
import sys

import numpy as np
from PIL import Image

from dicode_jax.errors import UserError
from dicode_jax.media.video import KEYFRAME_INTERVAL, contact_sheet, iter_frames


def end_of(path: str) -> float:
    """When the last frame leaves the screen, in seconds."""
    for frame in iter_frames(path):
        end = frame.time + frame.duration
    return end


def frames_at(path: str, times: np.ndarray) -> list[np.ndarray]:
    """What is on screen at each of the rising `times`, uint8 [h, w, 3]."""
    found, shown = [], None
    for frame in iter_frames(path):
        while len(found) < len(times) and shown is not None and times[len(found)] < frame.time:
            found.append(shown)
        shown = frame.image
    return found + [shown] * (len(times) - len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", help="the upper row, shown at the size of the lower one")
    parser.add_argument("decoded", help="the lower row")
    parser.add_argument("--out", required=True, help="a .png")
    parser.add_argument("--columns", type=int, default=12)
    args = parser.parse_args()

    original_end, decoded_end = end_of(args.original), end_of(args.decoded)
    times = (np.arange(args.columns) + 0.5) / args.columns * decoded_end
    lower = frames_at(args.decoded, times)
    # An original shorter than a clip was stretched to one.
    stretch = original_end / decoded_end if original_end < KEYFRAME_INTERVAL else 1.0
    size = lower[0].shape[1::-1]
    upper = [
        np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
        for frame in frames_at(args.original, times * stretch)
    ]
    contact_sheet(
        args.out,
        [np.stack(upper), np.stack(lower)],
        labels=[args.original, args.decoded],
        columns=args.columns,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

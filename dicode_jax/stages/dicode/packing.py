"""Several videos in one row of a batch: how the row is laid out (`data.rows` says which).

A video takes `l + k (n + 1)` positions, `text | <img> | n tokens | <img> | n tokens ...` with the
text padded to `l`, exactly as it stands alone: a model that attends inside a video only, and counts
positions and keyframes from its start, sees what it sees in generation.

Letters: t positions of a row, f keyframes of a row, l text ids, k keyframes of a video, n deep
tokens of a keyframe, z their width.
"""

from collections.abc import Sequence

import numpy as np


def video_length(num_keyframes, *, text_length: int, num_tokens: int):
    """Positions of a video; `num_keyframes` may be an array."""
    return text_length + num_keyframes * (num_tokens + 1)


def pack_row(
    texts: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    *,
    row_length: int,
    max_frames: int,
    image_id: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Lays videos out one behind the other.

    Args:
      texts: Text ids int32 [l] of each video, padded to the same length.
      tokens: Deep tokens [k, n, z] of each video; `k` may differ.
      row_length: Positions of the row, `t`.
      max_frames: Keyframes that the arrays have room for, `f`.
      image_id: Id of `<img>`.
      pad_id: Fills what no id stands at.

    Returns:
      `input_ids` int32 [t] (anything where a deep token goes), `segment_ids` int32 [t] (the
      number of the video from 1 on, 0 behind the last), `positions` int32 [t] inside the video,
      `token_mask` bool [t], `tokens` [f, n, z] and `frame_segments` int32 [f] (0 for no keyframe).

    Raises:
      ValueError: The videos need more room.
    """
    _, n, z = tokens[0].shape
    row = {
        "input_ids": np.full(row_length, pad_id, np.int32),
        "segment_ids": np.zeros(row_length, np.int32),
        "positions": np.zeros(row_length, np.int32),
        "token_mask": np.zeros(row_length, bool),
        "tokens": np.zeros((max_frames, n, z), tokens[0].dtype),
        "frame_segments": np.zeros(max_frames, np.int32),
    }
    start = frame = 0
    for number, (text, video) in enumerate(zip(texts, tokens, strict=True), 1):
        length, k = len(text), len(video)
        end = start + video_length(k, text_length=length, num_tokens=n)
        if end > row_length or frame + k > max_frames:
            raise ValueError(
                f"{number} videos need {end} positions and {frame + k} keyframes, the row has "
                f"{row_length} and {max_frames}"
            )
        offsets = np.arange(end - start)
        is_image = (offsets >= length) & ((offsets - length) % (n + 1) == 0)
        ids = np.full(end - start, pad_id, np.int32)
        ids[:length], ids[is_image] = text, image_id
        row["input_ids"][start:end] = ids
        row["segment_ids"][start:end] = number
        row["positions"][start:end] = offsets
        row["token_mask"][start:end] = (offsets >= length) & ~is_image
        row["tokens"][frame : frame + k] = video
        row["frame_segments"][frame : frame + k] = number
        start, frame = end, frame + k
    return row

"""Which sequences share a row of a batch."""

from collections.abc import Sequence

import numpy as np


def plan_rows(
    lengths: Sequence[int] | np.ndarray, row_length: int, *, seed: int, most: int | None = None
) -> list[np.ndarray]:
    """Puts every sequence into exactly one row, by first fit over a seeded order.

    Args:
      lengths: Positions of each sequence.
      row_length: Positions of a row.
      seed: Of the order.
      most: Sequences that a row has room for, whatever their length; None for any number.

    Returns:
      Rows in the order in which they were begun: indices, int64. The last ones may be
      far from full.

    Raises:
      ValueError: A sequence is longer than a row.
    """
    sizes = np.asarray(lengths)
    if len(sizes) and sizes.max() > row_length:
        longest = int(sizes.argmax())
        raise ValueError(
            f"video {longest} needs {sizes[longest]} positions, a row has {row_length}"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    rows: list[list[int]] = []
    room: list[int] = []
    # Rows only fill up, so the first row that takes a length never moves back: one mark for each
    # length makes the search linear.
    first = dict.fromkeys(np.unique(sizes).tolist(), 0)
    for index, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        row = first[length]
        while row < len(rows) and room[row] < length:
            row += 1
        first[length] = row
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(index)
        is_full = most is not None and len(rows[row]) == most
        room[row] = 0 if is_full else room[row] - length
    return [np.asarray(row, np.int64) for row in rows]

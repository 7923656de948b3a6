"""How large frames are read: squares, as most models take them, or any height and width."""

from dicode_jax.errors import UserError

FrameSize = int | tuple[int, int]
"""The side of square frames, or height and width, in pixels."""


def sides(frame_size: FrameSize) -> tuple[int, int]:
    """Height and width."""
    return (frame_size, frame_size) if isinstance(frame_size, int) else frame_size


def square_side(frame_size: FrameSize) -> int:
    """The side of frames of the drawn world.

    Raises:
      UserError: They are to be no squares.
    """
    height, width = sides(frame_size)
    if height != width:
        raise UserError(f"the drawn world is a square, its frames cannot be {height} x {width}")
    return height

"""Reads the synthetic world back from pixels, so that a generated clip can be held to its prompt.

The judge knows the words of `data.shapes_world` and how the shapes are drawn, and nothing
else of how a clip came to be. It looks at one clip, the first of a video: later clips go back over
the same path and do not obey the caption. What fits no word is judged ``"unclear"``, which counts
as wrong.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8

from dicode_jax.data import shapes_world as synthetic

UNCLEAR = "unclear"
FIELDS = ("color", "shape", "motion", "background", "size")

_BLURS = (0.0, 0.7, 1.4, 2.2)  # standard deviations, in world units, at which shapes are compared
_WINDOW = 1.9  # radii around the object within which its pixels are counted
_MIN_AREA = 25.0  # below it there is no object: a fifth of the smallest one
_STILL = 6.0  # an object whose path spans less than this has not moved
_MIN_TRAVEL = 12.0  # half of the shortest straight move
_MIN_GROWTH = 1.35
_MIN_TURN = np.pi  # of a circular path, which takes 1.6 pi in full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a clip shows: words of the grammar, or `UNCLEAR`; `size` may be "medium"."""

    color: str
    shape: str
    motion: str
    background: str
    size: str

    def matches(self, attributes: synthetic.Attributes) -> dict[str, bool]:
        """Which of `FIELDS` show what the caption says."""
        return {field: getattr(self, field) == getattr(attributes, field) for field in FIELDS}


def judge(clip: UInt8[np.ndarray, "f h w 3"]) -> Judgement:
    """Reads one clip. Frames are square and of any size.

    Raises:
      ValueError: not a clip of square frames.
    """
    clip = np.asarray(clip)
    if clip.ndim != 4 or clip.shape[1] != clip.shape[2] or clip.shape[3] != 3 or len(clip) < 2:
        raise ValueError(f"want a clip [f, h, w, 3] of two square frames or more, got {clip.shape}")
    pixels = clip.astype(np.float32)
    background, back = _background(pixels)
    color, cover = _color(pixels, back)
    if color == UNCLEAR:
        return Judgement(
            color=UNCLEAR, shape=UNCLEAR, motion=UNCLEAR, background=background, size=UNCLEAR
        )
    x, y, area, cover = _track(cover)
    seen = area > _MIN_AREA
    if seen.sum() < 0.8 * len(clip):
        shape = motion = size = UNCLEAR
    else:
        shape = _shape(cover[seen], x[seen], y[seen], area[seen])
        radius = np.sqrt(area / _UNIT_AREA[shape])
        motion = _motion(np.flatnonzero(seen) / (len(clip) - 1), x[seen], y[seen], radius[seen])
        size = _size(radius[seen], motion)
    return Judgement(color=color, shape=shape, motion=motion, background=background, size=size)


def score(
    captions: Iterable[str | synthetic.Attributes], clips: Iterable[UInt8[np.ndarray, "f h w 3"]]
) -> dict[str, float]:
    """Shares of clips that obey their captions.

    Returns:
      for each of `FIELDS` the share that show it, for `all` the share in which colour, shape,
      motion and background are all right, and the number of clips as `count`.
    """
    rows = []
    for caption, clip in zip(captions, clips, strict=True):
        said = synthetic.parse_caption(caption) if isinstance(caption, str) else caption
        rows.append(judge(clip).matches(said))
    if not rows:
        raise ValueError("nothing to score")
    result = {field: float(np.mean([row[field] for row in rows])) for field in FIELDS}
    spoken = [all(row[field] for field in FIELDS if field != "size") for row in rows]
    return result | {"all": float(np.mean(spoken)), "count": float(len(rows))}


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The nearest background's name, and the colour [3] that is really there."""
    border = max(1, pixels.shape[1] // 32)
    edge = np.ones(pixels.shape[1:3], bool)
    edge[border:-border, border:-border] = False
    back = np.median(pixels[:, edge].reshape(-1, 3), axis=0)
    names = list(synthetic.BACKGROUNDS)
    known = np.array(list(synthetic.BACKGROUNDS.values()), np.float32)
    distances = np.linalg.norm(known - back, axis=1)
    nearest = int(distances.argmin())
    return (names[nearest] if distances[nearest] < 60 else UNCLEAR), back


def _color(pixels: np.ndarray, back: np.ndarray) -> tuple[str, np.ndarray]:
    """The object's colour, and how much of each pixel it covers, [f, h, w] in 0..1.

    Blur mixes an object with the background, so a colour is the one towards which the pixels that
    differ most leave the background, not merely the one that they are nearest to.
    """
    away = pixels - back
    distance = np.linalg.norm(away, axis=-1)
    strong = distance > max(40.0, 0.75 * float(np.percentile(distance, 99.5)))
    if strong.mean() < 0.002:
        return UNCLEAR, distance
    samples = away[strong]
    errors = {}
    for name, rgb in synthetic.COLORS.items():
        axis = np.array(rgb, np.float32) - back
        share = np.clip(samples @ axis / (axis @ axis), 0.5, 1.1)
        errors[name] = float(np.linalg.norm(samples - share[:, None] * axis, axis=1).mean())
    color = min(errors, key=errors.__getitem__)
    axis = np.median(samples, axis=0)
    cover = np.clip(away @ axis / (axis @ axis), 0.0, 1.0)
    return (color if errors[color] < 60 else UNCLEAR), cover


def _track(
    cover: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centroid and area per frame, in world units, and the coverage with all far away set to 0."""
    size = cover.shape[1]
    scale = synthetic.WORLD_SIZE / size
    centers = (np.arange(size, dtype=np.float32) + 0.5) * scale
    near = np.where(cover > 0.5, cover, 0.0)
    for _ in range(2):  # once to find the object, once to count its soft edge too
        mass = np.maximum(near.sum((1, 2)), 1e-6)
        x, y = (near.sum(1) @ centers) / mass, (near.sum(2) @ centers) / mass
        reach = _WINDOW * np.sqrt(mass * scale**2 / np.pi) + 2.0
        inside = np.maximum(
            np.abs(centers[None, None, :] - x[:, None, None]),
            np.abs(centers[None, :, None] - y[:, None, None]),
        )
        near = np.where((inside < reach[:, None, None]) & (cover > 0.08), cover, 0.0)
    return x, y, near.sum((1, 2)) * scale**2, near


def _shape(cover: np.ndarray, x: np.ndarray, y: np.ndarray, area: np.ndarray) -> str:
    """The shape that, drawn at the same place and area and equally blurred, differs least."""
    size = cover.shape[1]
    scale = synthetic.WORLD_SIZE / size
    centers = (np.arange(size, dtype=np.float32) + 0.5) * scale
    blurs = [_blur_matrix(centers, sigma) for sigma in _BLURS]
    errors = {}
    for shape in synthetic.SHAPES:
        radius = np.sqrt(area / _UNIT_AREA[shape]).astype(np.float32)[:, None, None]
        dx = centers[None, None, :] - x.astype(np.float32)[:, None, None]
        dy = centers[None, :, None] - y.astype(np.float32)[:, None, None]
        dy = dy + np.float32(_CENTROID[shape]) * radius
        distance = synthetic.outline_distance(shape, dx, dy, radius)
        drawn = np.clip(0.5 - distance / np.float32(scale), 0.0, 1.0)
        errors[shape] = min(float(((m @ drawn @ m.T - cover) ** 2).mean()) for m in blurs)
    return min(errors, key=errors.__getitem__)


def _motion(time: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> str:
    """The motion of an object whose place and radius are known at times [f] in 0..1."""
    start, end = (np.polyval(np.polyfit(time, radius, 1), t) for t in (0.0, 1.0))
    growth = max(end, 1.0) / max(start, 1.0)
    span = np.ptp(x), np.ptp(y)
    if growth > _MIN_GROWTH or growth < 1 / _MIN_GROWTH:
        return UNCLEAR if max(span) > _MIN_TRAVEL else "grows" if growth > 1 else "shrinks"
    if max(span) < _STILL:
        return "stays still"
    if min(span) > _STILL:
        middle_x, middle_y = _circle_center(x, y)
        turn = np.diff(np.unwrap(np.arctan2(y - middle_y, x - middle_x))).sum()
        return "moves in a circle" if abs(turn) > _MIN_TURN else UNCLEAR
    path, words = (x, ("left", "right")) if span[0] > span[1] else (y, ("up", "down"))
    slope = np.polyfit(time, path, 1)[0]
    return UNCLEAR if abs(slope) < _MIN_TRAVEL else f"moves {words[int(slope > 0)]}"


def _size(radius: np.ndarray, motion: str) -> str:
    """The size word; of an object that grows or shrinks, the smallest radius counts."""
    if motion in ("grows", "shrinks"):
        ends = np.polyval(np.polyfit(np.arange(len(radius)), radius, 1), (0, len(radius) - 1))
        smallest = float(min(ends))
    else:
        smallest = float(np.median(radius))
    ranges = synthetic.RADII
    small, medium, large = (ranges[size] for size in synthetic.SIZES)
    if smallest < (small[1] + medium[0]) / 2:
        return "small"
    return "medium" if smallest < (medium[1] + large[0]) / 2 else "large"


def _circle_center(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The centre of the circle that fits the points best (linear least squares)."""
    rows = np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1)
    solution = np.linalg.lstsq(rows, x**2 + y**2, rcond=None)[0]
    return float(solution[0]), float(solution[1])


def _blur_matrix(centers: np.ndarray, sigma: float) -> Float[np.ndarray, "h h"]:
    """Gaussian blur along one axis, as a matrix; the edges lose what leaves the frame."""
    if sigma == 0:
        return np.eye(len(centers), dtype=np.float32)
    weights = np.exp(-0.5 * ((centers[:, None] - centers[None, :]) / sigma) ** 2)
    return (weights / weights.sum(axis=1).max()).astype(np.float32)


def _unit_shapes() -> tuple[dict[str, float], dict[str, float]]:
    """Area of each shape of radius 1, and how far below its centre its centroid lies."""
    grid = np.linspace(-1.1, 1.1, 1101)
    areas, centroids = {}, {}
    for shape in synthetic.SHAPES:
        inside = synthetic.outline_distance(shape, grid[None, :], grid[:, None], 1.0) < 0
        areas[shape] = float(inside.sum() * (grid[1] - grid[0]) ** 2)
        centroids[shape] = float((inside.sum(1) @ grid) / inside.sum())
    return areas, centroids


_UNIT_AREA, _CENTROID = _unit_shapes()

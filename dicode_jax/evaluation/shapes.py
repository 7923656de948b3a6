"""Reads the synthetic world back from pixels, so that a generated clip can be held to its prompt.

The judge knows the words of `data.shapes_world` and how the shapes are drawn, and nothing
else of how a clip came to be. It looks at one clip, the first of a video: later clips go back over
the same path and do not obey the caption. What fits no word is judged ``"unclear"``, which counts
as wrong. Beside the whole clip every frame is read by itself, so that a shape that is another for
two frames is seen.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from dicode_jax.data import shapes_world as synthetic

UNCLEAR = "unclear"
FIELDS = ("color", "shape", "motion", "background", "size")
FRAME_FIELDS = ("color", "shape", "background", "size")  # what a single frame shows

_BLURS = (0.0, 0.7, 1.4, 2.2)  # standard deviations, in world units, at which shapes are compared
_WINDOW = 1.9  # radii around the object within which its pixels are counted
_MIN_AREA = 25.0  # below it there is no object: a fifth of the smallest one
_STILL = 6.0  # an object whose path spans less than this has not moved
_MIN_TRAVEL = 12.0  # half of the shortest straight move
_MIN_GROWTH = 1.35
_MIN_TURN = np.pi  # of a circular path, which takes 1.6 pi in full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames:
    """What each frame of a clip shows by itself.

    Attributes:
      color, shape, background, size: Words [f], or `UNCLEAR`; the size is that of an object which
        grows or shrinks when it is smallest.
      rgb: The object's colour, the median inside of it, in 0..255; NaN where none is seen.
      x, y, radius: Place and radius of the object in units of the world; NaN where none is seen.
    """

    color: tuple[str, ...]
    shape: tuple[str, ...]
    background: tuple[str, ...]
    size: tuple[str, ...]
    rgb: Float[np.ndarray, "f 3"]
    x: Float[np.ndarray, " f"]
    y: Float[np.ndarray, " f"]
    radius: Float[np.ndarray, " f"]

    @property
    def wobble(self) -> float:
        """Standard deviation of the object's colour over the frames, in 0..255, mean of channels.

        0 for a drawn clip, NaN where fewer than two frames show an object.
        """
        seen = self.rgb[np.isfinite(self.rgb).all(axis=1)]
        return float(seen.std(axis=0).mean()) if len(seen) > 1 else float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a clip shows: words of the grammar, or `UNCLEAR`; `size` may be "medium"."""

    color: str
    shape: str
    motion: str
    background: str
    size: str
    frames: Frames

    def matches(self, attributes: synthetic.Attributes) -> dict[str, bool]:
        """Which of `FIELDS` show what the caption says."""
        return {field: getattr(self, field) == getattr(attributes, field) for field in FIELDS}

    def steady(self, attributes: synthetic.Attributes) -> dict[str, bool]:
        """Which of `FRAME_FIELDS` every single frame shows as the caption says."""
        return {
            field: set(getattr(self.frames, field)) == {getattr(attributes, field)}
            for field in FRAME_FIELDS
        }


def judge(clip: UInt8[np.ndarray, "f h w 3"]) -> Judgement:
    """Reads one clip. Frames are square and of any size.

    Raises:
      ValueError: not a clip of square frames.
    """
    clip = np.asarray(clip)
    if clip.ndim != 4 or clip.shape[1] != clip.shape[2] or clip.shape[3] != 3 or len(clip) < 2:
        raise ValueError(f"want a clip [f, h, w, 3] of two square frames or more, got {clip.shape}")
    pixels, f = clip.astype(np.float32), len(clip)
    backgrounds, back = _backgrounds(pixels)
    color, cover, strong = _color(pixels, back)
    shape = motion = size = UNCLEAR
    shapes = sizes = colors = (UNCLEAR,) * f
    x, y, radius = np.full((3, f), np.nan)
    rgb = np.full((f, 3), np.nan)
    if color != UNCLEAR:
        x, y, area, cover = _track(cover)
        seen = area > _MIN_AREA
        x, y = np.where(seen, x, np.nan), np.where(seen, y, np.nan)
        colors = tuple(
            _word_of(frame[mask] - back, back) if mask.any() else UNCLEAR
            for frame, mask in zip(pixels, strong & seen[:, None, None])
        )
        for i in np.flatnonzero(seen):
            rgb[i] = np.median(pixels[i][cover[i] > 0.9 * cover[i].max()], axis=0)
        if seen.sum() >= 0.8 * f:
            shape, each = _shape(cover[seen], x[seen], y[seen], area[seen])
            shapes = _at(seen, each)
            radius = np.where(seen, np.sqrt(area / _UNIT_AREA[shape]), np.nan)
            time = np.flatnonzero(seen) / (f - 1)
            motion = _motion(time, x[seen], y[seen], radius[seen])
            size, each = _size(time, radius[seen], motion)
            sizes = _at(seen, each)
    return Judgement(
        color=color,
        shape=shape,
        motion=motion,
        background=_name_of(back),
        size=size,
        frames=Frames(
            color=colors,
            shape=shapes,
            background=backgrounds,
            size=sizes,
            rgb=rgb,
            x=x,
            y=y,
            radius=radius,
        ),
    )


def _at(seen: np.ndarray, words: list[str]) -> tuple[str, ...]:
    """A word for each frame, those of frames that are seen in order."""
    rest = iter(words)
    return tuple(next(rest) if there else UNCLEAR for there in seen)


def _backgrounds(pixels: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Each frame's background by name, and the colour [3] that is really there in all."""
    border = max(1, pixels.shape[1] // 32)
    edge = np.ones(pixels.shape[1:3], bool)
    edge[border:-border, border:-border] = False
    around = pixels[:, edge]
    names = tuple(map(_name_of, np.median(around, axis=1)))
    return names, np.median(around.reshape(-1, 3), axis=0)


def _name_of(back: np.ndarray) -> str:
    """The background that a colour [3] is nearest to."""
    names = list(synthetic.BACKGROUNDS)
    known = np.array(list(synthetic.BACKGROUNDS.values()), np.float32)
    distances = np.linalg.norm(known - back, axis=1)
    nearest = int(distances.argmin())
    return names[nearest] if distances[nearest] < 60 else UNCLEAR


def _color(pixels: np.ndarray, back: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """The object's colour, how much of each pixel it covers, [f, h, w] in 0..1, and where surely.

    Blur mixes an object with the background, so a colour is the one towards which the pixels that
    differ most leave the background, not merely the one that they are nearest to.
    """
    away = pixels - back
    distance = np.linalg.norm(away, axis=-1)
    strong = distance > max(40.0, 0.75 * float(np.percentile(distance, 99.5)))
    if strong.mean() < 0.002:
        return UNCLEAR, distance, strong
    samples = away[strong]
    axis = np.median(samples, axis=0)
    cover = np.clip(away @ axis / (axis @ axis), 0.0, 1.0)
    return _word_of(samples, back), cover, strong


def _word_of(samples: np.ndarray, back: np.ndarray) -> str:
    """The colour towards which pixels, less the background's colour, [n, 3] leave it."""
    errors = {}
    for name, rgb in synthetic.COLORS.items():
        axis = np.array(rgb, np.float32) - back
        share = np.clip(samples @ axis / (axis @ axis), 0.5, 1.1)
        errors[name] = float(np.linalg.norm(samples - share[:, None] * axis, axis=1).mean())
    color = min(errors, key=errors.__getitem__)
    return color if errors[color] < 60 else UNCLEAR


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


def _shape(
    cover: np.ndarray, x: np.ndarray, y: np.ndarray, area: np.ndarray
) -> tuple[str, list[str]]:
    """The shape that, drawn at the same place and area and equally blurred, differs least.

    In all frames, and in each by itself.
    """
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
        each = np.stack([((m @ drawn @ m.T - cover) ** 2).mean((1, 2)) for m in blurs])
        errors[shape] = each[each.mean(axis=1).argmin()]
    whole = min(errors, key=lambda shape: float(errors[shape].mean()))
    nearest = np.stack(list(errors.values())).argmin(axis=0)
    return whole, [synthetic.SHAPES[i] for i in nearest]


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


def _size(time: np.ndarray, radius: np.ndarray, motion: str) -> tuple[str, list[str]]:
    """The size word, and that of each frame.

    Of an object that grows or shrinks the smallest radius counts, to which frames are led back.
    """
    if motion in ("grows", "shrinks"):
        line = np.polyfit(time, radius, 1)
        smallest = float(min(np.polyval(line, (0.0, 1.0))))
        each = radius * smallest / np.maximum(np.polyval(line, time), 1.0)
    else:
        smallest, each = float(np.median(radius)), radius
    return _size_word(smallest), [_size_word(float(one)) for one in each]


def _size_word(radius: float) -> str:
    small, medium, large = (synthetic.RADII[size] for size in synthetic.SIZES)
    if radius < (small[1] + medium[0]) / 2:
        return "small"
    return "medium" if radius < (medium[1] + large[0]) / 2 else "large"


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

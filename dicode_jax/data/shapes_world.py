"""A small captioned world, drawn from a seed: one shape that moves on a plain background.

Captions follow one grammar:

    a [small |large ]COLOUR SHAPE MOTION on a BACKGROUND background

with ``an`` before ``orange``.

A video is a row of clips of two seconds. Motion is a triangle wave that turns exactly at the
keyframes between clips: an object that ``moves left`` goes left in clip 0, back in clip 1, and so
on for as long as the video lasts, and growing and shrinking likewise; an object that ``moves in a
circle`` keeps turning. Two neighbouring keyframes therefore determine the clip between them, and
the first clip obeys the caption. Frame 0 and the last frame of a clip lie on its keyframes, so the
last frame of a clip is the first frame of the next.

The geometry is that of a world of 64 x 64 units, x to the right and y downwards; a frame of any
other size shows the same world. Nothing here imports jax, so that data workers stay light.
"""

import dataclasses
import functools
import hashlib
import itertools
import re

import numpy as np
from jaxtyping import Float, UInt8

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 100, 255),
    "yellow": (250, 220, 40),
    "cyan": (40, 210, 230),
    "magenta": (225, 50, 210),
    "orange": (255, 140, 20),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (0, 0, 0),
    "gray": (110, 110, 110),
    "brown": (100, 62, 32),
    "navy": (18, 24, 84),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = (
    "stays still",
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "grows",
    "shrinks",
    "moves in a circle",
)
# A shape of radius r lies within a square of side 2r. Of an object that grows or shrinks, the
# radius is the smallest one. "medium" is said by saying nothing.
RADII = {"small": (7.0, 8.0), "medium": (9.5, 11.0), "large": (12.5, 15.0)}
SIZES = tuple(RADII)

WORLD_SIZE = 64.0
MARGIN = 1.5  # the least distance between an object and the edge of the frame
SPAN_RANGE = (24.0, 32.0)  # how far a moving object goes in one clip
GROWTH_RANGE = (1.8, 2.0)  # how much larger a growing object is after one clip
ORBIT_RANGE = (11.0, 17.0)  # the radius of a circular path
TURNS_PER_CLIP = 0.8  # of a circular path, always clockwise as seen on the screen

NUM_FRAMES = 16  # per clip
FRAME_SIZE = 64
FPS = 8

_DIRECTIONS = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}
_CAPTION = re.compile(
    r"an? (?:(small|large) )?(\w+) (\w+) (.+) on a (\w+) background",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes:
    """What a caption says: one word of each kind.

    Attributes:
      size: "small", "medium" (not spoken in the caption) or "large".
      color: a key of `COLORS`.
      shape: one of `SHAPES`.
      motion: one of `MOTIONS`.
      background: a key of `BACKGROUNDS`.

    Raises:
      ValueError: a word is not of its kind.
    """

    size: str
    color: str
    shape: str
    motion: str
    background: str

    def __post_init__(self):
        for field, known in _VOCABULARY.items():
            if (word := getattr(self, field)) not in known:
                raise ValueError(f"unknown {field} {word!r}; choose one of: {', '.join(known)}")

    @property
    def caption(self) -> str:
        """The caption that says this."""
        size = "" if self.size == "medium" else f"{self.size} "
        words = f"{size}{self.color} {self.shape} {self.motion} on a {self.background} background"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_VOCABULARY = {
    "size": SIZES,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One drawn world: what the caption says and all it leaves open, in units of the 64 x 64 world.

    Attributes:
      attributes: what the caption says.
      x, y: the object's centre at keyframe 0; the centre of the path when it moves in a circle.
      radius: the object's smallest radius.
      span: distance gone in a clip, for the straight motions.
      growth: largest over smallest radius, for `grows` and `shrinks`.
      orbit: radius of the path, for `moves in a circle`.
      angle: where on that path keyframe 0 lies, in radians, clockwise from the right.
    """

    attributes: Attributes
    x: float
    y: float
    radius: float
    span: float = 0.0
    growth: float = 1.0
    orbit: float = 0.0
    angle: float = 0.0

    @property
    def caption(self) -> str:
        """The caption, which the first clip obeys."""
        return self.attributes.caption


def all_captions(split: str = "all") -> list[str]:
    """Every caption of a split ("train", "test" or "all": 3072 of them), in a fixed order."""
    _check_split(split)
    words = itertools.product(*_VOCABULARY.values())
    every = (Attributes(**dict(zip(_VOCABULARY, w, strict=True))) for w in words)
    return [a.caption for a in every if _in_split(split, a.color, a.shape, a.motion)]


def parse_caption(caption: str) -> Attributes:
    """Reads a caption of the grammar, with either article, since `a orange` was said before.

    Raises:
      ValueError: it does not follow the grammar, or holds an unknown word.
    """
    if not (match := _CAPTION.fullmatch(" ".join(caption.lower().split()))):
        raise ValueError(
            f"{caption!r} does not read "
            "'a [small|large] COLOUR SHAPE MOTION on a BACKGROUND background'"
        )
    size, color, shape, motion, background = match.groups()
    return Attributes(
        size=size or "medium", color=color, shape=shape, motion=motion, background=background
    )


@functools.cache
def is_test(color: str, shape: str, motion: str) -> bool:
    """Whether a combination is held out: a tenth (27 of 256), by a hash that never changes."""
    digest = hashlib.sha256(f"{color} {shape} {motion}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 3


def sample_attributes(rng: np.random.Generator, split: str = "train") -> Attributes:
    """Draws what a caption says, all words equally likely within the split."""
    _check_split(split)
    while True:
        words = {field: known[rng.integers(len(known))] for field, known in _VOCABULARY.items()}
        if _in_split(split, words["color"], words["shape"], words["motion"]):
            return Attributes(**words)


def sample_scene(
    rng: np.random.Generator, split: str = "train", *, attributes: Attributes | None = None
) -> Scene:
    """Draws a scene: its place, speed, size, and unless `attributes` gives them, its words.

    The words come from `split`. The object stays inside the frame at all times.
    """
    attributes = attributes or sample_attributes(rng, split)
    motion = attributes.motion
    radius = rng.uniform(*RADII[attributes.size])
    scene = functools.partial(Scene, attributes=attributes, radius=radius)
    if motion in _DIRECTIONS:
        dx, dy = _DIRECTIONS[motion]
        span = rng.uniform(SPAN_RANGE[0], min(SPAN_RANGE[1], WORLD_SIZE - 2 * (radius + MARGIN)))
        x, y = _place(rng, radius, -span * dx), _place(rng, radius, -span * dy)
        return scene(x=x, y=y, span=span)
    if motion in ("grows", "shrinks"):
        growth = min(rng.uniform(*GROWTH_RANGE), (WORLD_SIZE / 2 - MARGIN) / radius)
        return scene(x=_place(rng, radius * growth), y=_place(rng, radius * growth), growth=growth)
    if motion == "moves in a circle":
        orbit = rng.uniform(ORBIT_RANGE[0], min(ORBIT_RANGE[1], WORLD_SIZE / 2 - MARGIN - radius))
        x, y = _place(rng, radius + orbit), _place(rng, radius + orbit)
        return scene(x=x, y=y, orbit=orbit, angle=rng.uniform(0.0, 2 * np.pi))
    return scene(x=_place(rng, radius), y=_place(rng, radius))


def scene_at(seed: int, index: int, split: str = "train") -> Scene:
    """The scene number `index` of the endless row that `seed` and `split` name."""
    return sample_scene(np.random.default_rng((seed, index)), split)


def render(
    scene: Scene,
    num_clips: int = 1,
    *,
    first_clip: int = 0,
    num_frames: int = NUM_FRAMES,
    frame_size: int = FRAME_SIZE,
) -> UInt8[np.ndarray, "k f h w 3"]:
    """Draws `num_clips` neighbouring clips from `first_clip` on; clip 0 obeys the caption."""
    if num_clips < 1 or num_frames < 2 or first_clip < 0:
        raise ValueError(
            f"want num_clips >= 1, num_frames >= 2 and first_clip >= 0, "
            f"got {num_clips}, {num_frames} and {first_clip}"
        )
    within = np.linspace(0.0, 1.0, num_frames)
    times = first_clip + np.arange(num_clips)[:, None] + within
    return render_at(scene, times, frame_size=frame_size)


def render_keyframes(
    scene: Scene, num_keyframes: int, *, first_keyframe: int = 0, frame_size: int = FRAME_SIZE
) -> UInt8[np.ndarray, "k h w 3"]:
    """Draws keyframes only: `num_keyframes` of them bound one clip less."""
    times = first_keyframe + np.arange(num_keyframes, dtype=np.float64)
    return render_at(scene, times, frame_size=frame_size)


def render_at(
    scene: Scene, times: Float[np.ndarray, "*t"], *, frame_size: int = FRAME_SIZE
) -> UInt8[np.ndarray, "*t h w 3"]:
    """Draws one frame per time, which counts in clips (keyframe i lies at time i).

    Edges are anti-aliased: the coverage of a pixel is taken from its centre's distance to the
    outline.
    """
    times = np.asarray(times, np.float64)
    x, y, radius = _trajectory(scene, times.reshape(-1))
    scale = frame_size / WORLD_SIZE
    centers = (np.arange(frame_size, dtype=np.float32) + 0.5) / scale
    dx = centers[None, None, :] - x.astype(np.float32)[:, None, None]  # [t, 1, w]
    dy = centers[None, :, None] - y.astype(np.float32)[:, None, None]  # [t, h, 1]
    distance = outline_distance(
        scene.attributes.shape, dx, dy, radius.astype(np.float32)[:, None, None]
    )
    distance *= np.float32(-255.0 * scale)
    distance += np.float32(128.0)
    coverage = np.clip(distance, 0, 255, out=distance).astype(np.uint8)
    palette = _palette(scene.attributes.color, scene.attributes.background)
    return palette[coverage].reshape(*times.shape, frame_size, frame_size, 3)


def outline_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius) -> np.ndarray:
    """Distance to a shape's outline, negative inside, at offsets (dx, dy) from its centre.

    All arguments broadcast. Outside a corner it falls short of the true distance, by less than
    anti-aliasing sees.
    """
    return _DISTANCES[shape](dx, dy, radius)


def _trajectory(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y and radius at each of the times [t], in world units."""
    wave = 1.0 - np.abs(np.mod(times, 2.0) - 1.0)  # 0 at even keyframes, 1 at odd ones
    ones = np.ones_like(times)
    motion = scene.attributes.motion
    x, y, radius = scene.x * ones, scene.y * ones, scene.radius * ones
    if motion in _DIRECTIONS:
        dx, dy = _DIRECTIONS[motion]
        x, y = x + dx * scene.span * wave, y + dy * scene.span * wave
    elif motion == "grows":
        radius = radius * (1.0 + (scene.growth - 1.0) * wave)
    elif motion == "shrinks":
        radius = radius * (1.0 + (scene.growth - 1.0) * (1.0 - wave))
    elif motion == "moves in a circle":
        angle = scene.angle + 2 * np.pi * TURNS_PER_CLIP * times
        x, y = x + scene.orbit * np.cos(angle), y + scene.orbit * np.sin(angle)
    return x, y, radius


def _place(rng: np.random.Generator, radius: float, travel: float = 0.0) -> float:
    """Draws a start coordinate from which an object can go -travel and stay inside the frame."""
    low, high = radius + MARGIN, WORLD_SIZE - radius - MARGIN
    return rng.uniform(low + max(travel, 0.0), high + min(travel, 0.0))


def _circle(dx, dy, radius):
    distance = dx * dx + dy * dy
    np.sqrt(distance, out=distance)
    distance -= radius
    return distance


def _square(dx, dy, radius):
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius  # about the area of the circle


def _triangle(dx, dy, radius):
    """Equilateral, one corner up; its bounding box is centred."""
    half_height = np.sqrt(0.75, dtype=np.float32) * radius
    sides = np.sqrt(0.75, dtype=np.float32) * np.abs(dx) - 0.5 * (dy + half_height)
    return np.maximum(sides, dy - half_height)


def _cross(dx, dy, radius):
    """Two upright bars, each 0.36 times as wide as long."""
    ax, ay, arm = np.abs(dx), np.abs(dy), 0.36 * radius
    return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


@functools.cache
def _palette(color: str, background: str) -> np.ndarray:
    """Coverage 0..255 to a colour, uint8 [256, 3]."""
    share = np.arange(256)[:, None] / 255.0
    mixed = (1.0 - share) * np.array(BACKGROUNDS[background]) + share * np.array(COLORS[color])
    return np.round(mixed).astype(np.uint8)


def _check_split(split: str) -> None:
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}; choose one of: train, test, all")


def _in_split(split: str, color: str, shape: str, motion: str) -> bool:
    return split == "all" or is_test(color, shape, motion) == (split == "test")

"""How a long video of LanDiff is cut: windows of the painter, segments of the language model.

The original makes one window (Yin et al., arXiv 2503.04606; of its code only the clean prefix is
published). Here each further window begins with the last latents of the one before, and takes the
semantic frames that it covers, wherever segments end.
Shape letters: b videos, l text tokens, e their width, n semantic tokens.
"""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.generate import stream_segments
from dicode_jax.models.landiff.language_model import LanguageModel
from dicode_jax.nn.rngs import fold
from dicode_jax.typing import Array, Float, Int

SLID = 2**31  # keys of what is written behind the first segments: no token has so high a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Latents that are painted together.

    Attributes:
      start: Number of the first latent in the video, which is that of its semantic frame.
      known: Latents at its beginning that are there already.
      size: All of them.
    """

    start: int
    known: int
    size: int

    @property
    def stop(self) -> int:
        """Number of the first latent behind it."""
        return self.start + self.size


def num_latents(num_clips: int, window: int, prefix: int) -> int:
    """Latents of so many clips: of a window, and of as many as a further one adds each."""
    return window + (num_clips - 1) * (window - prefix)


def windows(num_latents: int, window: int, prefix: int, given: int = 0) -> tuple[Window, ...]:
    """The windows of a video; the last one may be shorter.

    Args:
      num_latents: Of the whole video, an odd number.
      window: Latents that the painter takes at once, an odd number.
      prefix: Of these, those that a further window has from the one before, an odd number.
      given: Latents that are given at the beginning, at most `prefix`.

    Raises:
      ValueError: The numbers are no such, or nothing is left to paint.
    """
    for name, value in (("num_latents", num_latents), ("window", window), ("prefix", prefix)):
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{name} must be odd, as latents are decoded in pairs, got {value}")
    if prefix >= window:
        raise ValueError(f"a prefix of {prefix} latents leaves nothing of a window of {window}")
    if not 0 <= given <= prefix or given >= num_latents:
        raise ValueError(
            f"{given} latents are given; want at most {min(prefix, num_latents - 1)}, so that a "
            "window has some to paint"
        )
    made = [Window(start=0, known=given, size=min(window, num_latents))]
    while made[-1].stop < num_latents:
        start = made[-1].stop - prefix
        made.append(Window(start=start, known=prefix, size=min(window, num_latents - start)))
    return tuple(made)


def written_frames(frames: FrameTokens, num_frames: int, max_segments: int | None) -> int:
    """Semantic frames that the language model has before it at most."""
    return num_frames if max_segments is None else min(num_frames, max_segments * frames.segment)


def write_segments(
    lm: LanguageModel,
    text: Float[Array, "b l e"],
    *,
    num_frames: int,
    max_segments: int | None = None,
    keys: Array,
    given: Int[Array, "b m"] | None = None,
    **options,
) -> Iterator[Int[Array, "b n"]]:
    """The semantic tokens of a video of any length, segment by segment.

    Args:
      num_frames: Semantic frames of the video.
      max_segments: Segments that the model has before it at most; None for all. Behind the first of
        them each is written as the last of so many, the others given.
      given: Semantic tokens of the first frames, as many as one likes but for the last frame; what
        the model does not have before it is passed on.
      keys, options: As of `generate.stream_tokens`, whose errors are these too.
    """
    frames = lm.cfg.frames
    segments, most = frames.segments(num_frames), max_segments or num_frames
    options["num_frames"] = seen = written_frames(frames, num_frames, max_segments)
    known = 0 if given is None else frames.num_frames(given.shape[1])
    size = frames.count(frames.segment)
    there = (
        [] if given is None else [given[:, i : i + size] for i in range(0, given.shape[1], size)]
    )
    first = iter(there[:most])
    if known < seen or known >= num_frames:  # of which the latter is refused
        first = stream_segments(lm, text, keys=keys, given=given, **options)
    kept: list[Array] = []
    for codes in first:
        kept = [*kept, codes][-most:]
        yield codes
    for number, count in enumerate(segments[most:], most):
        past = [*kept[1:], *there[number : number + 1]]
        if known >= (number + 1) * frames.segment:
            codes = there[number]
        else:
            before = jnp.concatenate(past, axis=1) if past else None
            again = fold(keys, SLID + number)
            *_, codes = stream_segments(lm, text, keys=again, given=before, **options)
        kept = [*kept[1:], codes]
        yield codes[:, : frames.count(count)]

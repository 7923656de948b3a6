"""What may be asked of a pipeline: seeds, prompts, keyframes, and the numbers of a call.

The pipelines and the command line check by the same rules. Nothing here is slow to import, so that
the command line can say what is wrong before it loads jax.
"""

import argparse
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from dicode_jax.diffusion.samplers import SAMPLERS
from dicode_jax.distributions import MIN_TEMPERATURE
from dicode_jax.errors import UserError

MAX_SEED = 2**32 - 1  # jax drops the bits above without a word
MAX_CLIPS, MAX_FRAMES = 1800, 256  # of an hour, where all frames are in memory at once
MAX_STREAM = 10**6  # clips that come one after another, as to a file
# Beyond these a number is a slip of the finger.
MAX_STEPS, MAX_GUIDANCE = 1000, 100.0


@dataclasses.dataclass(frozen=True)
class Whole:
    """Whole numbers in `low..high`, Python's or NumPy's; bools are none."""

    low: int
    high: int | None = None
    is_even: bool = False

    def __call__(self, value: Any) -> int:
        """The number as Python's.

        Raises:
          ValueError: It is none of these; the message says what is wanted.
        """
        try:
            number = None if _is_bool(value) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < self.low or (self.high is not None and number > self.high):
            upper = f"of at least {self.low}"
            if self.high is not None:
                upper = f"from {self.low} to {self.high}"
            raise ValueError(f"want a whole number {upper}, got {shown(value)}")
        if self.is_even and number % 2:
            raise ValueError(
                f"want an even number, got {number}: each half of a clip sees one keyframe"
            )
        return number


@dataclasses.dataclass(frozen=True)
class Real:
    """Finite numbers up to `high`, from `low` on or only above it (`is_open`)."""

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False

    def __call__(self, value: Any) -> float:
        """The number as Python's.

        Raises:
          ValueError: It is none of these; the message says what is wanted.
        """
        try:  # text is no number, although float() reads it
            is_number = hasattr(value, "__float__") and not _is_bool(value)
            number = float(value) if is_number else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        above = number > self.low if self.is_open else number >= self.low
        if not (math.isfinite(number) and above and number <= self.high):
            raise ValueError(f"want a {self._described()}, got {shown(value)}")
        return number

    def _described(self) -> str:
        text = "finite number"
        if math.isfinite(self.low):
            text += f" {'above' if self.is_open else 'of at least'} {self.low:g}"
        if math.isfinite(self.high):
            text += f"{' and' if math.isfinite(self.low) else ''} of at most {self.high:g}"
        return text


def number(kind: type, rule: Whole | Real) -> Callable[[str], Any]:
    """A parser of numbers that `rule` lets pass, for argparse."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text  # which the rule refuses as it is
        try:
            return rule(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of several names."""

    names: tuple[str, ...]

    def __call__(self, value: Any) -> str:
        """The name.

        Raises:
          ValueError: It is none of these; the message says which there are.
        """
        if not isinstance(value, str) or value not in self.names:
            raise ValueError(f"want {' or '.join(self.names)}, got {shown(value)}")
        return value


@dataclasses.dataclass(frozen=True)
class Interval:
    """Two finite numbers of `low..high`, the first not above the second."""

    low: float
    high: float

    def __call__(self, value: Any) -> tuple[float, float]:
        """The numbers as Python's.

        Raises:
          ValueError: They are none of these; the message says what is wanted.
        """
        try:
            start, end = map(Real(self.low, self.high), value if _is_list(value) else ())
        except ValueError:
            start, end = math.inf, -math.inf
        if start > end:
            raise ValueError(
                f"want two numbers that ascend within {self.low:g}..{self.high:g}, got "
                f"{shown(value)}"
            )
        return start, end


SIDE = Whole(1, 2**14)  # of a frame, in pixels
OPTIONS: Mapping[str, Whole | Real | OneOf | Interval] = {
    "num_clips": Whole(1, MAX_CLIPS),
    "num_frames": Whole(1, MAX_FRAMES),
    "num_inference_steps": Whole(1, MAX_STEPS),
    "fs": Whole(1, 2**31 - 1),
    "lag": Whole(0, MAX_STEPS),
    "history_noise": Whole(0, MAX_STEPS - 1),
    "guidance_scale": Real(0.0, MAX_GUIDANCE, is_open=True),
    "guidance_rescale": Real(0.0, 1.0),
    "eta": Real(0.0, 1.0),
    "sampler": OneOf(SAMPLERS),
    "guidance_interval": Interval(0.0, 1.0),
    "deep_cache_interval": Whole(1, MAX_STEPS),
    "fps": Real(0.0, 1000.0, is_open=True),
    "diffusion_guidance_scale": Real(0.0, MAX_GUIDANCE),
    "motion_score": Real(0.0, 1000.0),
    "temperature": Real(MIN_TEMPERATURE, 100.0),
    "top_k": Whole(1, 2**24),
    "top_p": Real(0.0, 1.0, is_open=True),
    "ramp": OneOf(("released", "smooth")),
    "carry": OneOf(("latents", "frames")),
}

QUALITIES: Mapping[str, Mapping[str, Any]] = {
    "draft": {
        "sampler": "ddim",
        "num_inference_steps": 10,
        "eta": 0.0,
        "spacing": "uniform_trailing",
    },
    "standard": {},
    "best": {
        "sampler": "ddim",
        "num_inference_steps": 50,
        "eta": 1.0,
        "guidance_interval": (0.0, 1.0),
        "deep_cache_interval": 1,
    },
}
"""Preset -> the fields of `SamplingConfig` that it sets; the others are the model's own.

What each costs and gives is in docs/performance.md. "best" is how the originals sample.
"""


class SamplingOptions(TypedDict, total=False):
    """How a call paints; None, like an option that is left out, is what the preset says.

    Attributes:
      quality: One of `QUALITIES`; options beside it go before what it sets. "standard", the model's
        own settings, where it is left out.
      num_inference_steps: Diffusion steps of a clip.
      guidance_scale: Strength of the condition (deep tokens, prompt, features); 1 for none.
      guidance_rescale: 0 to 1, see `dicode_jax.diffusion.guidance.rescale_guidance`.
      guidance_interval: Shares of the steps, from the noisiest, where guidance begins and ends.
      sampler: One of `dicode_jax.diffusion.samplers.SAMPLERS`.
      eta: 0 for the same path from the same noise, 1 for fresh noise at every step.
      deep_cache_interval: Every so many steps the whole network runs, else its shallow part; 1 for
        off.
      fs: Frame stride, or frames per second, that the network is told.
    """

    quality: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    sampler: str | None
    eta: float | None
    deep_cache_interval: int | None
    fs: int | None


def preset(quality: Any) -> Mapping[str, Any]:
    """What a preset sets; None is "standard".

    Raises:
      UserError: There is none of this name.
    """
    name = "standard" if quality is None else quality
    return QUALITIES[named("quality", OneOf(tuple(QUALITIES)), name)]


def described(quality: str) -> str:
    """A preset in words."""
    settings = (f"{name} {value}" for name, value in QUALITIES[quality].items())
    most = " or the model's own, if fewer" if quality == "draft" else ""
    return ", ".join(settings).replace("steps 10", f"steps 10{most}") or "the model's own settings"


def check(**options: Any) -> dict[str, Any]:
    """The options that are given, numbers as Python's own; those that are None are left out.

    Raises:
      UserError: There is no option of this name, or its value is impossible.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise UserError(f"there is no option {unknown[0]}; there are {', '.join(OPTIONS)}")
    return {name: named(name, OPTIONS[name], value) for name, value in given.items()}


def check_config(config: Any) -> None:
    """Checks what the configs of all pipelines hold: `frame_size`, `fps` and `sampling`.

    Sides of frames have 16384 pixels at most; sampling keeps to what may be asked in a call.

    Raises:
      UserError: A value is impossible.
    """
    size, sampling = config.frame_size, vars(config.sampling)
    for side in size if _is_list(size) else [size]:
        named("frame_size", SIDE, side)
    check(fps=config.fps, **{name: sampling[name] for name in OPTIONS if name in sampling})
    named("table_dtype", OneOf(("float32", "float16")), sampling["table_dtype"])
    if sampling["drop_tokens"] is not None:
        named("drop_tokens", Whole(-1, 2**16), sampling["drop_tokens"])


def check_seeds(seed: Any, count: int) -> list[int]:
    """One seed for each of `count` samples.

    Args:
      seed: A whole number, from which the samples count up; or a sequence with one for each.

    Raises:
      UserError: A seed is no whole number or leaves 0..2**32-1, or there are more or fewer seeds
        than samples.
    """
    whole = Whole(0, MAX_SEED)
    if not _is_list(seed):
        first = named("seed", whole, seed)
        if first + count - 1 > MAX_SEED:
            raise UserError(
                f"seed: sample i of {count} has the seed {first} + i, which must not pass "
                f"{MAX_SEED}; take a smaller seed, or give one for each sample"
            )
        return list(range(first, first + count))
    seeds = list(seed)
    if len(seeds) != count:
        raise UserError(f"seed: {len(seeds)} seeds for {count} sample(s); give one for each")
    return [named("seed", whole, one) for one in seeds]


def check_prompts(prompt: Any) -> list[str]:
    """The prompts, one or several, as a list.

    Raises:
      UserError: There is none, or one is no text.
    """
    if not isinstance(prompt, str) and not _is_list(prompt):
        raise UserError(f"a prompt is text, or a list of texts, got {shown(prompt)}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("the list of prompts is empty; give one at least")
    for one in prompts:
        if not isinstance(one, str):
            raise UserError(f"a prompt is text, or a list of texts, got {shown(one)} among them")
    return prompts


def check_keyframes(keyframes: Any, num_frames: int) -> list[int]:
    """Indices of two keyframes or more; negative ones count from the end, as Python's do.

    Raises:
      UserError: An index is no whole number or lies outside of the video, or there are fewer.
    """
    if not _is_list(keyframes):
        raise UserError(f"keyframes: want a list of frame numbers, got {shown(keyframes)}")
    index = Whole(-num_frames, num_frames - 1)
    indices = [named("keyframes", index, one) for one in keyframes]
    if len(indices) < 2:
        raise UserError(f"keyframes: a clip needs two, got {len(indices)}")
    return indices


def shown(value: Any) -> str:
    """A value in an error of one line."""
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(name: str, rule: Whole | Real | OneOf | Interval, value: Any) -> Any:
    """What `rule` makes of a value.

    Raises:
      UserError: It refuses, with the name in front.
    """
    try:
        return rule(value)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"


def _is_list(value: Any) -> bool:
    """Whether it can be gone through and is no text; an array of no axes cannot."""
    is_one = isinstance(value, str | bytes) or getattr(value, "ndim", 1) == 0
    return isinstance(value, Iterable) and not is_one

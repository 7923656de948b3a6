"""What pipelines check of arrays: those given to them, their weights, and what they painted.

A number that is not finite would pass through every layer and end as a black or white frame.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.guided import make_grid, make_sampler
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_uint8
from dicode_jax.pipelines import options
from dicode_jax.storage import weights
from dicode_jax.typing import Array, Bool, Float, UInt8

UNGUIDED = "guidance_interval: guidance is off; give a guidance_scale above 1, or leave it out"


def as_array(value: Any, wanted: str, dtype: Any = None) -> np.ndarray:
    """What was given as an array.

    Args:
      value: Whatever was given.
      wanted: Says in an error what it should be.
      dtype: Type of the array; None keeps its own.

    Raises:
      UserError: It is none, or holds NaN or infinity.
    """
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{wanted}, got {options.shown(value)}") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{wanted}, got NaN or infinite numbers")
    return array


def as_video(value: Any, wanted: str) -> UInt8[np.ndarray, "f h w 3"]:
    """Frames that were given, at least one.

    Raises:
      UserError: They are not; the message begins with what was `wanted`.
    """
    array = as_array(value, wanted)
    if array.ndim != 4 or not _is_colour(array):
        raise UserError(f"{wanted}, got {array.dtype} {array.shape}")
    return array


def given_frames(image: Any, video: Any) -> UInt8[np.ndarray, "f h w 3"] | None:
    """What a video goes on from: of an image its one frame; None for neither.

    Raises:
      UserError: Both are there, or one is no such thing.
    """
    if image is None and video is None:
        return None
    if image is not None and video is not None:
        raise UserError("give an image or a video to go on from, not both")
    if video is not None:
        return as_video(video, "a video is uint8 [f, h, w, 3]")
    wanted = "an image is uint8 [h, w, 3]"
    array = as_array(image, wanted)
    if array.ndim != 3 or not _is_colour(array):
        raise UserError(f"{wanted}, got {array.dtype} {array.shape}")
    return array[None]


def _is_colour(array: np.ndarray) -> bool:
    return array.shape[-1] == 3 and array.dtype == np.uint8 and array.size > 0


def sampling_of(
    config: Any, schedule: NoiseSchedule, *, quality: str | None = None, **changes: Any
) -> Any:
    """The sampling config with a preset and the options that are not None in place of its own.

    Raises:
      UserError: An option is impossible or would change nothing, or the sampler cannot step the
        schedule that way.
    """
    if unknown := sorted(changes.keys() - (options.OPTIONS.keys() & vars(config).keys())):
        known = ", ".join(["quality", *(name for name in options.OPTIONS if name in vars(config))])
        raise UserError(f"there is no option {unknown[0]} of sampling; there are {known}")
    given, preset = options.check(**changes), dict(options.preset(quality))
    if quality == "draft":  # which is to be the soonest
        steps = min(preset["num_inference_steps"], config.num_inference_steps)
        preset["num_inference_steps"] = steps
    try:
        sampling = dataclasses.replace(config, **{**preset, **given})
        sampler = make_sampler(schedule, sampling)
        sampler.coefficients(make_grid(schedule, sampling))
    except ValueError as error:
        raise UserError(str(error)) from error
    if given.get("eta") and not sampler.is_stochastic:
        raise UserError(
            f"eta: {sampling.sampler} adds no noise, got eta {given['eta']:g}; leave it out, or "
            "take the sampler ddim"
        )
    if "guidance_interval" in given and not sampling.is_guided:
        raise UserError(UNGUIDED)
    return sampling


def check_weights(name: str, module: nnx.Module) -> None:
    """Reads all arrays of a part once, see `weights.not_finite`.

    Raises:
      UserError: One holds NaN or infinity.
    """
    if (bad := weights.not_finite(weights.named_arrays(module))) is not None:
        raise UserError(
            f"the weights of {name} hold NaN or infinite numbers ({bad}): the file is damaged, its "
            "training diverged, or param_dtype is too narrow for them"
        )


def finite_tokens(tokens: Float[np.ndarray, "*b n z"], part: str) -> np.ndarray:
    """The tokens that a part gave.

    Raises:
      UserError: One of them is NaN or infinite.
    """
    if not np.isfinite(tokens).all():
        raise UserError(
            f"the {part} gave NaN or infinite numbers as deep tokens; look at its weights and at "
            "dtype, whose range float16 is the smallest of"
        )
    return tokens


def quantize(
    pixels: Float[Array, "b f y x 3"],
) -> tuple[UInt8[Array, "b f y x 3"], Bool[Array, " b"]]:
    """Pixels in [-1, 1] to 0..255, and which of the videos are finite."""
    return to_uint8(pixels), jnp.isfinite(pixels).all(axis=(1, 2, 3, 4))


def check_painted(is_finite: Any, sample: int, parts: str, sampling: Any) -> None:
    """Refuses a clip of which some number is not finite.

    Args:
      is_finite: Whether all are.
      sample: Number of the sample that it is of.
      parts: Whose weights to look at.
      sampling: Options to look at.

    Raises:
      UserError: One is not; it says what to look at.
    """
    if not is_finite:
        raise UserError(
            f"sample {sample} came out as NaN or infinite numbers, which are no picture: look at "
            f"the weights of {parts}, at guidance_scale {sampling.guidance_scale:g} and at dtype, "
            "whose range float16 is the smallest of"
        )

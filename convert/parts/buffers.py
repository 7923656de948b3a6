"""Noise schedules: as originals configure them, and the buffers that checkpoints carry of them."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.engine.rules import defaulted, to_numpy
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS, NoiseSchedule

MAX_TIMESTEPS = 100_000  # of a schedule; the originals have a thousand
BUFFERS = (*PERSISTENT_BUFFERS, "scale_arr")


# Original option -> (our field, the original's default).
SCHEDULE = {
    "timesteps": ("num_timesteps", 1000),
    "beta_schedule": ("beta_schedule", "linear"),
    "linear_start": ("linear_start", 1e-4),
    "linear_end": ("linear_end", 2e-2),
    "rescale_betas_zero_snr": ("zero_terminal_snr", False),
    "parameterization": ("parameterization", "eps"),
    "base_scale": ("base_scale", 0.7),
    "turning_step": ("turning_step", 400),
    "v_posterior": ("v_posterior", 0.0),
}


def schedule_from_original(options: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of the original's arguments, with the original's defaults."""
    fields = defaulted(options, SCHEDULE)
    for name in ("num_timesteps", "turning_step"):  # tables are as long
        if not 0 <= fields[name] <= MAX_TIMESTEPS:
            raise ValueError(f"{name} must be at most {MAX_TIMESTEPS}, got {fields[name]!r}")
    if not options.get("use_dynamic_rescale"):
        fields["base_scale"] = None
    return NoiseSchedule(**fields)


def compare(source: Mapping[str, Any], schedule: NoiseSchedule) -> list[str]:
    """One line when the buffers of a checkpoint are not the schedule's, none when they are.

    The line names the first buffer that differs and a schedule that fits, where there is one. What
    is absent is not compared; buffers in half precision are compared as such.
    """
    stored = {name: source[name] for name in BUFFERS if name in source}
    values = {name: to_numpy(tensor) for name, tensor in stored.items()}
    wrong = [name for name in values if not _fits(values[name], name, schedule)]
    if not wrong:
        return []
    candidates = (
        NoiseSchedule(zero_terminal_snr=snr, parameterization=kind, base_scale=scale)
        for snr, kind, scale in itertools.product((False, True), ("eps", "v"), (None, 0.7, 0.3))
    )
    found = (c for c in candidates if all(_fits(values[name], name, c) for name in values))
    fitting = next(found, None)
    hint = "they fit no known schedule"
    if fitting is not None:
        hint = (
            f"they fit zero_terminal_snr={fitting.zero_terminal_snr}, "
            f"parameterization={fitting.parameterization}, base_scale={fitting.base_scale}"
        )
    return [f"{wrong[0]}: the noise schedule in the checkpoint is another one; {hint}"]


def _fits(got: np.ndarray, name: str, schedule: NoiseSchedule) -> bool:
    if name == "scale_arr":
        if schedule.base_scale is None or got.ndim != 1:
            return False
        want = np.asarray(schedule.scale_array)
        got = got[: len(want)]  # the original stores a longer constant part than any step needs
    else:
        want = np.asarray(schedule.table(name))
    bits = {"float16": 10, "bfloat16": 7}.get(got.dtype.name, 17)
    if got.shape != want.shape:
        return False
    tolerance = 2.0**-bits
    got, want = got.astype(np.float64), want.astype(np.float64)
    return bool(np.allclose(got, want, rtol=tolerance, atol=tolerance * 1e-3))

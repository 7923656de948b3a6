"""Which timesteps a sampler visits.

A time grid is an int array ``[steps + 1]`` (or ``[steps + 1, f]``, ``[steps + 1, b, f]`` for noise
levels that differ per frame) in sampling order: step i goes from ``grid[i]`` to ``grid[i + 1]``.
The published samplers end at timestep 0, whose alphas_cumprod is the first of the table and not 1;
the value -1 stands for the clean sample, alphas_cumprod = 1.

Spacings of DiCoDe and DynamiCrafter. Two faults of theirs are not repeated: a trailing table never
holds -1 as a visited step, and a uniform one that would visit a step outside the schedule is
refused with a message.
"""

import numpy as np

SPACINGS = ("uniform", "uniform_upstream", "uniform_trailing", "quad")


def ddim_timesteps(spacing: str, num_steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Visited timesteps in ascending order.

    Args:
        spacing: "uniform" (DiCoDe: a linspace, so always ``num_steps`` entries),
            "uniform_upstream" (DynamiCrafter: an integer stride, so sometimes more entries than
            asked for, 31 for 30), "uniform_trailing" (ends at the last training step; 999), or
            "quad" (dense near 0; repeats small steps when there are many).
        num_steps: requested number of steps, at least 1.
        num_timesteps: length of the training schedule.

    Returns:
        int64 ``[num_steps]``, each in 0..num_timesteps-1.

    Raises:
        ValueError: unknown spacing, or a number of steps for which the spacing leaves the schedule.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown timestep spacing {spacing!r}; use one of {SPACINGS}")
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"the number of sampling steps must be in 1..{num_timesteps}, got {num_steps}"
        )
    stride = num_timesteps // num_steps
    if spacing == "uniform":
        steps = np.linspace(0, num_timesteps - stride, num_steps).astype(np.int64) + 1
    elif spacing == "uniform_upstream":
        steps = np.arange(0, num_timesteps, stride, dtype=np.int64) + 1
    elif spacing == "uniform_trailing":
        descending = np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))
        steps = descending[:num_steps][::-1].astype(np.int64) - 1
    else:
        root = np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps)
        steps = (root**2).astype(np.int64) + 1
    if steps.max() >= num_timesteps:
        raise ValueError(
            f"spacing {spacing!r} with {num_steps} steps would visit timestep {steps.max()}, but "
            f"the schedule ends at {num_timesteps - 1}; use another number of steps (at most "
            f"{num_timesteps // 2} for 'uniform') or spacing 'uniform_trailing'"
        )
    return steps


def ddim_time_grid(spacing: str, num_steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Time grid of a DDIM run: the steps of `ddim_timesteps` from the noisiest, then 0.

    Returns:
        int32 ``[steps + 1]``.
    """
    steps = ddim_timesteps(spacing, num_steps, num_timesteps)
    return np.concatenate([steps[::-1], [0]]).astype(np.int32)

"""Classifier-free guidance and its rescale.

Guidance: Ho and Salimans, arXiv 2207.12598. Rescale: Lin et al., arXiv 2305.08891, equations 15-16.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dicode_jax.typing import Array, Float, typechecked


@typechecked
def guide(
    cond: Float[Array, "*shape"],
    uncond: Float[Array, "*shape"],
    guidance_scale: float | int | Array,
) -> Float[Array, "*shape"]:
    """``uncond + guidance_scale (cond - uncond)``; any common shape."""
    return uncond + guidance_scale * (cond - uncond)


def cosine_ramp(steps: Sequence[float], num_steps: int, exponent: int = 5) -> np.ndarray:
    """Of CogVideoX's dynamic guidance, ``1 + scale * ramp``: from 0 at step 0 to 1 at the last.

    Its code hands over the number of steps less the timestep, a large negative number: the ramp
    then jumps between 0 and 1. There the last digits count, hence the host and its float64.

    Args:
        steps: where to evaluate it.
        num_steps: where the ramp ends.
        exponent: how late it rises; a whole number.

    Returns:
        float64, one for each of ``steps``.
    """
    angles = [math.pi * (float(step) / num_steps) ** exponent for step in steps]
    return np.array([(1 - math.cos(angle)) / 2 for angle in angles])


@typechecked
def rescale_guidance(
    guided: Float[Array, " b *rest"],
    cond: Float[Array, " b *rest"],
    guidance_rescale: float | int | Array,
) -> Float[Array, " b *rest"]:
    """Pull the spread of a guided prediction towards that of the conditional one.

    The standard deviation is unbiased and taken over all axes but the first together, per sample.

    Args:
        guided, cond: ``[b, ...]``.
        guidance_rescale: 0 leaves ``guided`` as it is, 1 gives it the conditional spread. A sample
            without any spread stays as it is.

    Returns:
        ``[b, ...]``.
    """
    axes = tuple(range(1, guided.ndim))
    cond_std = jnp.std(cond, axis=axes, keepdims=True, ddof=1)
    guided_std = jnp.std(guided, axis=axes, keepdims=True, ddof=1)
    rescaled = guided * jnp.where(guided_std > 0, cond_std / guided_std, 1.0)
    return guidance_rescale * rescaled + (1.0 - guidance_rescale) * guided

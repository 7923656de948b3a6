"""DiCoDe's programs that make clips of deep tokens; see `painting.Programs`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.guided import by_sample
from dicode_jax.models.dicode.decoder import (
    clip_conditions,
    clip_steps,
    decode_latents,
    first_latents,
)
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines import checks, painting


def row(first, second, seed: int, clip: int) -> dict[str, Any]:
    """What a clip is painted from: tokens `[n, z]` of both keyframes, a seed and a number."""
    return {"first": first, "second": second, "seed": np.uint32(seed), "clip": np.int32(clip)}


def _keys(rows):
    return fold(sample_keys(rows["seed"]), 1 + rows["clip"])


@painting.program
def _prepare(decoder, rows, sampling):
    tokens = jnp.stack([rows["first"], rows["second"]], axis=1)
    conditions, keys = clip_conditions(decoder, tokens, sampling), _keys(rows)
    steps = clip_steps(decoder, conditions, keys, sampling)
    carry = steps.begin(first_latents(decoder, keys, sampling))
    given = {"seed": rows["seed"], "clip": rows["clip"], "conditions": conditions}
    return given, by_sample(carry)


@painting.program
def _denoise(decoder, rows, sampling, start, stop):
    given = rows["given"]
    steps = clip_steps(decoder, given["conditions"], _keys(given), sampling)
    carry = steps.advance(by_sample(rows["carry"]), start, stop)
    return by_sample(carry), painting.ticks(rows, stop)


@painting.program
def _decode(decoder, latents):
    # A frame at a time: a clip's would take more memory than its latents' whole way here.
    return checks.quantize(decode_latents(decoder, latents, per_frame=True))


PIXELS = painting.Programs(_prepare, _denoise, _decode)
LATENTS = painting.Programs(_prepare, _denoise, painting.latents)

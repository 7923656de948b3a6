# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compare samplers
#
# The same clip, painted in several ways from the same deep tokens and the same noise: how far
# each is from a long run, and how long it takes. It is one clip of the small model, so the
# figures say how to look, not which sampler is best; `scripts/score_samplers.py` compares many
# clips, with intervals.

# %% [markdown]
# `DICODE_FAST=1` in the environment leaves two ways of few steps, for testing.

# %%
import os
import time

import numpy as np

import dicode_jax
from dicode_jax.evaluation.quality import psnr
from dicode_jax.media.videos import Video

FAST = os.environ.get("DICODE_FAST") == "1"

# %% [markdown]
# The language model writes the tokens once. All ways paint from them.

# %%
pipe = dicode_jax.load()
PROMPT = "a red circle moves right on a black background"
(tokens,) = pipe(PROMPT, seed=0, output_type="tokens")
tokens.shape

# %% [markdown]
# Each way is a few options of a call; what all have in common becomes the model's own. `eta=0`
# adds no fresh noise, so that all go where the same noise leads, and trailing steps begin with
# noise alone, however few they are. DDIM with 100 steps is what the others are held to. Another
# sampler or number of steps is another program, which is compiled once.

# %%
import dataclasses

sampling = dataclasses.replace(pipe.config.sampling, eta=0.0, spacing="uniform_trailing")
pipe.config = dataclasses.replace(pipe.config, sampling=sampling)

REFERENCE = {"sampler": "ddim", "num_inference_steps": 100}
WAYS = {
    "ddim, 50 steps": {"sampler": "ddim", "num_inference_steps": 50},
    "ddim, 10 steps": {"sampler": "ddim", "num_inference_steps": 10},
    "dpm++, 10 steps": {"sampler": "dpm++", "num_inference_steps": 10},
    "unipc, 10 steps": {"sampler": "unipc", "num_inference_steps": 10},
    "unipc, 5 steps": {"sampler": "unipc", "num_inference_steps": 5},
}
if FAST:
    REFERENCE["num_inference_steps"] = 4
    WAYS = {"dpm++, 2 steps": {"sampler": "dpm++", "num_inference_steps": 2}}

# %% [markdown]
# The second of two calls is timed, for which nothing is compiled any more. PSNR is in dB: the
# higher, the nearer to the reference.

# %%
reference = pipe.decode(tokens, seed=0, **REFERENCE)
frames = {}
for name, options in WAYS.items():
    pipe.decode(tokens, seed=0, **options)
    start = time.perf_counter()
    frames[name] = pipe.decode(tokens, seed=0, **options)
    seconds = time.perf_counter() - start
    print(f"{name:<16} {seconds:6.2f} s   {psnr(reference[None], frames[name][None]):5.1f} dB")

# %% [markdown]
# Side by side: the reference on the left, then the ways in their order.

# %%
row = np.concatenate([reference, *frames.values()], axis=2)
Video(frames=row, fps=pipe.config.fps)

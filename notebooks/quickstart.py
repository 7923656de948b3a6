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
# # Quickstart
#
# A prompt to a video, with the small model that lies in the package. It knows one thing, a world
# of moving shapes on plain backgrounds, and paints 64 x 64 pixels: it shows how everything is
# called, not what full-size weights can do. Two CPU cores are enough.

# %% [markdown]
# With `DICODE_FAST=1` in the environment the notebook runs in a minute, with so few steps that
# the videos are blurred. That is for testing.

# %%
import os

FAST = os.environ.get("DICODE_FAST") == "1"
STEPS = 2 if FAST else 50

# %% [markdown]
# `load` takes the types that suit the device: float32 on a CPU, bfloat16 on a GPU that computes
# in it, float16 on an older one such as a T4. What came of it stands behind each part.

# %%
import dicode_jax

pipe = dicode_jax.load()  # the packaged model; or a folder, or owner/name on the Hub
pipe

# %% [markdown]
# **Type a prompt.** The first call compiles its programs, which takes the longest; a bar says so.
# Two clips are four seconds. A video shows itself where it is the last line of a cell.

# %%
video = pipe(
    "a red circle moves right on a black background",
    num_clips=2,
    seed=0,
    num_inference_steps=STEPS,
)
video

# %% [markdown]
# Several prompts make a batch, whose programs are others. Video i has the seed `seed + i`, and is
# what it would be alone with that seed.

# %%
pipe(
    [
        "a green square grows on a navy background",
        "a small blue cross moves up on a gray background",
    ],
    num_clips=2,
    seed=0,
    num_inference_steps=STEPS,
)

# %% [markdown]
# **Start from a picture.** It has to be one that the model could have painted, so here is the
# last frame of the first video. The picture becomes deep tokens, 16 vectors, and is painted anew
# from them.

# %%
from PIL import Image

picture = Image.fromarray(video.frames[-1])
pipe(
    "a red circle moves left on a black background",
    image=picture,
    num_clips=2,
    num_inference_steps=STEPS,
)

# %% [markdown]
# **Go on from a video.** Its frames come first in what is returned.

# %%
longer = pipe(
    "a red circle moves left on a black background",
    video=video,
    num_clips=2,
    num_inference_steps=STEPS,
)
len(video.frames), len(longer.frames)

# %% [markdown]
# **There and back.** A video is sixteen deep tokens for each keyframe, two seconds apart, and the
# decoder paints what lies between two neighbours.

# %%
tokens = pipe.encode(video[0], keyframes=[0, 16, 31])
again = pipe.decode(tokens, seed=0, num_inference_steps=STEPS)
tokens.shape, again.shape

# %% [markdown]
# **Save it**, as mp4, gif or webp; a png is the contact sheet. The file keeps what it was made
# from, and `dicode info circle.mp4` shows that.

# %%
video.save("circle.mp4")
video.save("circle.png")
Image.open("circle.png")

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
# # Train on your clips
#
# A small system that learns a few videos by heart: the surest test of a set-up, and the shortest.
# It runs from a checkout of the repository. Three videos of two seconds took an hour on half of
# one CPU core (`docs/training.md`); with hundreds of videos the same commands need a GPU and
# longer runs.

# %% [markdown]
# **Your videos** are a folder of short ones with a caption beside each: `car.mp4` and `car.txt`.
# `DICODE_VIDEOS` names it. `DICODE_FAST=1` makes every training one step long, which teaches
# nothing and shows that everything runs.

# %%
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(os.environ.get("DICODE_CHECKOUT", ".")).resolve()
if not (ROOT / "train").is_dir() and (ROOT.parent / "train").is_dir():
    ROOT = ROOT.parent  # Jupyter was started in notebooks/
VIDEOS = os.environ.get("DICODE_VIDEOS", "")
FAST = os.environ.get("DICODE_FAST") == "1"

# %% [markdown]
# Where no folder is named, three clips are drawn, so that there is something to learn.

# %%
import numpy as np

from dicode_jax.data import shapes_world
from dicode_jax.media.videos import Video

if not VIDEOS:
    VIDEOS = "videos"
    pathlib.Path(VIDEOS).mkdir(exist_ok=True)
    for i in range(3):
        scene = shapes_world.scene_at(0, i)
        frames = np.concatenate(shapes_world.render(scene, 2))
        Video(frames=frames, fps=shapes_world.FPS).save(f"{VIDEOS}/{i}.mp4")
        pathlib.Path(VIDEOS, f"{i}.txt").write_text(scene.caption)
captions = sorted(path.read_text().strip() for path in pathlib.Path(VIDEOS).glob("*.txt"))
captions


# %% [markdown]
# Trainings are commands, and so is everything about data and models.


# %%
def run(command):
    """Runs `python -m COMMAND`; what it prints is shown as it comes."""
    words = [sys.executable, "-m", *shlex.split(command)]
    folders = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        words,
        env=os.environ | {"PYTHONPATH": folders},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise RuntimeError(f"{command}: exit status {process.returncode}")


run(f"dicode_jax.cli data inspect {VIDEOS}")

# %% [markdown]
# **Four trainings**, each of which reads what those before it left in `runs/clips`. The first
# learns how a frame becomes a small picture of latents, and back.

# %%
SHORT = "--num-steps 1 --batch-size 2" if FAST else ""
CONFIGS = ROOT / "configs"

run(
    f"train.autoencoder --config {CONFIGS}/clips_autoencoder.py"
    f" --workdir runs/clips/autoencoder --data.path {VIDEOS} {SHORT}"
)

# %% [markdown]
# The second learns the deep tokens of a keyframe.

# %%
run(
    f"train.tokenizer --config {CONFIGS}/clips_representation.py"
    f" --workdir runs/clips/representation --data.path {VIDEOS} {SHORT}"
)

# %% [markdown]
# The third learns to paint a clip from the tokens of its two keyframes.

# %%
run(
    f"train.tokenizer --config {CONFIGS}/clips_tokenizer.py"
    f" --workdir runs/clips/tokenizer --data.path {VIDEOS} {SHORT}"
)

# %% [markdown]
# The fourth is the language model: a caption to tokens.

# %%
run(f"train.ar --config {CONFIGS}/clips_ar.py --workdir runs/clips/ar --data.path {VIDEOS} {SHORT}")

# %% [markdown]
# A run keeps its numbers, its checkpoints and the pictures that it painted on the way. The same
# command goes on where one was stopped.

# %%
run("dicode_jax.cli metrics runs/clips/ar --last 5")

# %% [markdown]
# **A model** is one folder.

# %%
run("dicode_jax.cli export runs/clips/ar --out models/clips")

# %% [markdown]
# One of the captions that it has learnt. After the full settings the video comes back; after one
# step of each training it is noise.

# %%
import dicode_jax

pipe = dicode_jax.load("models/clips")
pipe(captions[0], seed=0, num_inference_steps=2 if FAST else None)

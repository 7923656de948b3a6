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
# # Bring official weights
#
# No full-size weights come with this package. They are downloaded from their authors and
# converted once. This notebook converts DiCoDe's, in the layout that its authors' README names:
#
# ```
# models/
#   open_clip_pytorch_model.bin      OpenCLIP ViT-H-14
#   pytorch_model.bin                tokenizer and clip decoder
#   gpt2_large.bin                   language model
#   gpt2-large/                      GPT-2's tokenizer files and config.json
# ```
#
# It runs from a checkout of the repository. Files of torch need the extra `convert` (`pip install
# -e ".[convert]"`), safetensors nothing besides.

# %% [markdown]
# `DICODE_MODELS` names that folder. Where it is not set, the notebook takes **a stand-in**: files
# of the same layout, with the original's own key names and random weights, a few numbers wide.
# The repository has such a checkpoint among its tests.

# %%
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(os.environ.get("DICODE_CHECKOUT", ".")).resolve()
if not (ROOT / "convert").is_dir() and (ROOT.parent / "convert").is_dir():
    ROOT = ROOT.parent  # Jupyter was started in notebooks/
MODELS = os.environ.get("DICODE_MODELS", "")
IS_OFFICIAL = bool(MODELS)
print(f"converting {MODELS}" if IS_OFFICIAL else "converting a small stand-in of random weights")

# %% [markdown]
# The stand-in is laid out as a download would be. Its vocabulary is made here: the 256 bytes.

# %%
import json
import shutil

from tokenizers.pre_tokenizers import ByteLevel

if not IS_OFFICIAL:
    MODELS = "models/stand_in"
    text = pathlib.Path(MODELS, "gpt2-large")
    text.mkdir(parents=True, exist_ok=True)
    small = ROOT / "tests/golden/dicode/system"
    for name in ("pytorch_model", "gpt2_large"):
        shutil.copy(small / "weights.safetensors", f"{MODELS}/{name}.safetensors")
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    (text / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (text / "merges.txt").write_text("#version: 0.2\n")
    system = json.loads((small / "config.json").read_text())["system"]
    pathlib.Path(MODELS, "config.yaml").write_text(json.dumps({"model": {"params": system}}))
    body = system["gpt2"]
    (text / "config.json").write_text(json.dumps(body | {"vocab_size": 257, "model_type": "gpt2"}))
sorted(str(path) for path in pathlib.Path(MODELS).rglob("*.*"))

# %% [markdown]
# All conversions are one command, `python -m convert NAME SOURCE --out DIR`. Sizes are found from
# keys and shapes; every key is used or skipped for a reason, and every parameter is filled. What
# does not fit is an error of one line, and nothing is written then. The stand-in is so narrow that
# its shapes no longer tell the numbers of heads: it brings the original's configuration, `--yaml`.


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


how = "--dtype bfloat16" if IS_OFFICIAL else f"--yaml {MODELS}/config.yaml"
run(f"convert dicode {MODELS} --out converted/dicode --overwrite {how}")

# %% [markdown]
# The folder says what it holds and where it came from.

# %%
run("dicode_jax.cli info converted/dicode")

# %% [markdown]
# It loads like any model. Random weights paint noise: that is what the stand-in gives.

# %%
import dicode_jax

pipe = dicode_jax.load("converted/dicode")
steps = None if IS_OFFICIAL else 2
pipe("A time-lapse of clouds moving across a blue sky.", seed=0, num_inference_steps=steps)

# %% [markdown]
# **And back.** `convert to_torch` writes the original's key names again. What it wrote is what
# was read, bit for bit, which is checked here for the stand-in's float32.

# %%
import numpy as np
from safetensors.numpy import load_file

run("convert to_torch converted/dicode --out back.safetensors")
if not IS_OFFICIAL:
    back, source = load_file("back.safetensors"), load_file(f"{MODELS}/gpt2_large.safetensors")
    same = [np.array_equal(back[key], source[key].astype(back[key].dtype)) for key in back]
    print(f"{sum(same)} of {len(same)} tensors are as they were")

# %% [markdown]
# The other families have commands of their own; `docs/conversion.md` says which files each reads,
# and under which terms the weights are.
#
# ```sh
# python -m convert dynamicrafter Doubiiu/DynamiCrafter --out converted/dynamicrafter
# python -m convert ar_diffusion --vae vae/checkpoint-500000 --dit dit/checkpoint-100000 \
#     --out converted/ar_diffusion
# python -m convert landiff LanDiff --flan-t5 flan-t5-xxl --theia theia-base-patch16-224-cddsv \
#     --out converted/landiff
# python -m convert divot Divot_detokenizer_stage1.bin --out converted/divot
# ```

"""Tiny Hugging Face folders, written by hand."""

import json

import numpy as np
from safetensors.numpy import save_file


def write_folder(folder, config, tensors, *, num_shards=1):
    """`config.json` and safetensors: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {}
    for i, keys in enumerate(np.array_split(sorted(tensors), num_shards)):
        name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name)
        places |= dict.fromkeys(keys.tolist(), name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def draw(shapes, seed=0):
    """Random float32 arrays of given shapes."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.normal(scale=0.1, size=shape).astype(np.float32) for key, shape in shapes.items()
    }

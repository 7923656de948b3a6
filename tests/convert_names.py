"""Tiny checkpoints under original names, made by running conversion tables backwards."""

import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from convert.engine.rules import original_names, piece_of
from dicode_jax.storage import weights

MANIFESTS = pathlib.Path(__file__).parent / "manifests"


def state_dict(module, rules, prefix=""):
    """The arrays of a module under original names and in original layouts."""
    pieces = {}
    for path, array in weights.named_arrays(module).items():
        name, rule = next(original_names(rules, path))
        piece, _ = piece_of(rule, path)
        own = pieces.setdefault(prefix + name, (getattr(rule, "axis", 0), {}))[1]
        own[piece] = np.array(rule.layout.inverse(np.asarray(array)), order="C")
    return {
        name: own[0] if len(own) == 1 else np.concatenate([own[i] for i in sorted(own)], axis)
        for name, (axis, own) in pieces.items()
    }


def read_manifest(name):
    """A manifest as a dictionary."""
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def shapes_only(tensors):
    """Original key -> something with a shape and a dtype and no values."""
    shape = lambda v: tuple(v["shape"] if isinstance(v, dict) else v)  # noqa: E731
    return {key: jax.ShapeDtypeStruct(shape(v), jnp.float32) for key, v in tensors.items()}


def open_clip_parts(text_prefix, image_prefix):
    """Keys of the two partial copies of OpenCLIP ViT-H/14 in a checkpoint."""
    whole = read_manifest("openclip_vit_h_14")
    text = {text_prefix + k: v for k, v in whole.items() if not k.startswith("visual.")}
    image = {image_prefix + k: v for k, v in whole.items() if not k.startswith("transformer.")}
    return text | image

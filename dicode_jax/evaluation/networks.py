"""The networks whose features distances of sets of videos are on.

FVD and FID are names of distances on the published I3D and Inception-v3 alone. A narrower network,
or one with other classes, gives distances that are called otherwise.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation.distribution import Features
from dicode_jax.models.i3d import I3D, I3DConfig
from dicode_jax.models.inception import Inception, InceptionConfig
from dicode_jax.models.shapes_classifier import ShapesClassifier, ShapesClassifierConfig
from dicode_jax.storage import packaged, weights

Folder = str | os.PathLike
PACKAGED = "shapes_features"  # a classifier's folder among the package's assets

_UNBIASED = "0 on the mean for two sets of one distribution, so that values may be negative"
NOTES = {
    "FVD": "Fréchet video distance (Unterthiner et al., 2018) on the logits of I3D; of 16 frames "
    "without antialiasing, as StyleGAN-V has it (Skorokhodov et al., 2022), of whom it takes "
    "2048 videos to be compared with",
    "KVD": f"unbiased kernel distance on the same features; {_UNBIASED}",
    "FID": "Fréchet distance (Heusel et al., 2017) on Inception-v3's features of every frame",
    "KID": f"unbiased kernel distance (Bińkowski et al., 2018) on the same; {_UNBIASED}",
    "FD-shapes": "Fréchet distance on features of a small classifier of the shapes world; no FVD",
    "KVD-shapes": f"unbiased kernel distance on the same features; {_UNBIASED}",
    "FD-i3d": "Fréchet distance on the logits of a network that is not the published I3D; no FVD",
    "FD-inception": "the same of a network that is not the published Inception-v3; no FID",
}


def i3d(folder: Folder) -> Features:
    """I3D that `convert i3d` wrote.

    Raises:
      UserError: The folder holds none.
    """
    cfg, digest, run = _loaded(folder, I3D, I3DConfig, lambda model, clips: model(clips))
    return Features(
        name="i3d",
        labels=("FVD", "KVD") if cfg == I3DConfig() else None,
        digest=digest,
        num_frames=16,
        frame_size=224,
        fps=None,
        antialias=False,
        at_once=4,
        run=run,
    )


def inception(folder: Folder) -> Features:
    """Inception-v3 that `convert inception` wrote.

    Raises:
      UserError: The folder holds none.
    """

    def look(model, clips):
        return model(clips.reshape(-1, *clips.shape[2:]))

    cfg, digest, run = _loaded(folder, Inception, InceptionConfig, look)
    return Features(
        name="inception",
        labels=("FID", "KID") if cfg == InceptionConfig() else None,
        digest=digest,
        num_frames=16,
        frame_size=299,
        fps=None,
        antialias=False,
        of_frames=True,
        at_once=1,
        run=run,
    )


def shapes(folder: Folder | None = None) -> Features:
    """A classifier of the shapes world that `scripts/train_shapes_features.py` trained.

    Args:
      folder: None for the packaged one.

    Raises:
      UserError: The folder holds none.
    """
    if folder is None:
        if (folder := packaged.parts().get(PACKAGED)) is None:
            raise UserError("the package has no classifier of the shapes world; name one")
        packaged.check(PACKAGED)
    cfg, digest, run = _loaded(
        folder, ShapesClassifier, ShapesClassifierConfig, lambda model, clips: model.features(clips)
    )
    return Features(
        name="shapes",
        digest=digest,
        num_frames=cfg.num_frames,
        frame_size=cfg.frame_size,
        fps=shapes_world.FPS * cfg.num_frames / shapes_world.NUM_FRAMES,
        run=run,
    )


def _loaded(
    folder: Folder, kind: Any, config: type, look: Callable[[Any, jax.Array], jax.Array]
) -> tuple[Any, str, Callable[[np.ndarray], np.ndarray]]:
    """The configuration of a network, a digest of its weights, and its program.

    Args:
      look: Of the network and clips in [-1, 1].
    """
    folder = pathlib.Path(folder)
    model, cfg = weights.load_module(folder, kind, config)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, clips):
        return look(nnx.merge(graph, state), clips.astype(jnp.float32) / 127.5 - 1)

    with open(folder / weights.WEIGHTS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return cfg, digest, lambda clips: np.asarray(run(state, clips))

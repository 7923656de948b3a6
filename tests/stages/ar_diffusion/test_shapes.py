"""The small denoiser's classes: captions of the shapes world, by the words they are made of."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.data import shapes_world
from dicode_jax.models.ar_diffusion.dit import Denoiser
from dicode_jax.nn.rngs import blank
from dicode_jax.stages.ar_diffusion.examples import classes_of
from dicode_jax.stages.registry import build_stage

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "ar_diffusion" / "shapes_dit.py"


def test_a_caption_gets_the_contexts_of_its_words_whether_or_not_it_was_trained_on():
    config = config_lib.load_config_file(CONFIG)
    stage = build_stage(config)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(blank(stage.create))))
    assert size == 4_099_472
    assert stage.is_trained(("context",), None)
    small = dataclasses.replace(config.model.dit, embed_dim=4, num_layers=1, num_heads=1)
    model = Denoiser(dataclasses.replace(config.model, dit=small), rngs=nnx.Rngs(0))
    words = (
        *shapes_world.SIZES,
        *shapes_world.COLORS,
        *shapes_world.SHAPES,
        *shapes_world.MOTIONS,
        *shapes_world.BACKGROUNDS,
    )
    assert model.context.shape == (len(words), 1, config.model.dit.context_dim)
    named = jnp.broadcast_to(jnp.arange(len(words))[:, None, None], model.context.shape)
    model.context[...] = named.astype(jnp.float32)  # each word's own number
    classes = classes_of(config)
    for split in ("train", "test"):
        for i in range(4):
            said = shapes_world.scene_at(0, i, split).attributes
            label = classes("", (said.caption,))
            found = model.contexts(jnp.array([label]))[0, :, 0]
            assert [words[int(j)] for j in np.asarray(found)] == [
                said.size, said.color, said.shape, said.motion, said.background
            ]  # fmt: skip

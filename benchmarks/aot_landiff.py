"""LanDiff's programs for `aot_gpu`, each a function and the shapes it is called with."""

import dataclasses
from collections.abc import Callable
from typing import Any

CAPTION = 64  # text tokens of a prompt
LATENTS = (60, 90)  # of frames of 480 x 720


def write(cfg: Any, rows: int, num_frames: int, types: dict) -> tuple[Callable, tuple]:
    """Writes the tokens of `num_frames` semantic frames behind captions, guided."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dicode_jax.models.landiff.generate import generate
    from dicode_jax.models.landiff.language_model import LanguageModel
    from dicode_jax.nn.layer_stack import without_scan
    from dicode_jax.nn.rngs import blank

    cfg = dataclasses.replace(cfg, body=without_scan(cfg.body))  # as `storage.weights` loads it
    graph, state = nnx.split(blank(LanguageModel, cfg, **types))
    text = jax.ShapeDtypeStruct((rows, CAPTION, cfg.text_dim), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def run(state, text, keys):
        return generate(nnx.merge(graph, state), text, num_frames=num_frames, keys=keys)

    return run, (state, text, keys)


def step(cfg: Any, rows: int, types: dict) -> tuple[Callable, tuple]:
    """A step of base and control for windows, with and without their text."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dicode_jax.models.landiff.dit import Denoiser
    from dicode_jax.nn.rngs import blank

    dit = cfg.dit
    graph, state = nnx.split(blank(Denoiser, cfg, **types))
    window = (dit.num_frames, dit.height, dit.width, dit.channels)
    x = jax.ShapeDtypeStruct((2 * rows, *window), jnp.float32)
    context = jax.ShapeDtypeStruct((2 * rows, dit.text_len, dit.text_dim), jnp.float32)

    def run(state, x, context, semantic):
        times = jnp.full((len(x),), 500, jnp.int32)
        return nnx.merge(graph, state)(x, times, context, semantic)

    return run, (state, x, context, jax.ShapeDtypeStruct((1, *window), jnp.float32))


def chunk(cfg: Any, rows: int, types: dict) -> tuple[Callable, tuple]:
    """Eight frames of two latents of the release's size, behind others of which caches are left."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D
    from dicode_jax.nn.rngs import blank

    vae = blank(AutoencoderCausal3D, cfg, **types)
    vae.encoder = None
    graph, state = nnx.split(vae)
    latents = [
        jax.ShapeDtypeStruct((rows, n, *LATENTS, cfg.z_channels), jnp.float32) for n in (3, 2)
    ]

    def run(state, z, cache):
        return nnx.merge(graph, state).decode_chunk(z, cache)

    _, cache = jax.eval_shape(lambda state, z: run(state, z, None), state, latents[0])
    return run, (state, latents[1], cache)

"""LanDiff's compiled programs: one for each of its parts, of weights that come and go.

Each takes a graph and a state of `nnx.split`, so that another copy of the same weights compiles
nothing. Shape letters: b videos, f frames, h w their pixels, c channels, l text tokens, e their
width, n semantic tokens, g semantic frames, y x the grid of features, t latents, z their channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.media.transforms import to_float, to_uint8
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, Cache
from dicode_jax.models.landiff.dit import Denoiser
from dicode_jax.models.landiff.features import STRIDE, vit_features
from dicode_jax.models.landiff.sampling import WindowSampling, sample_window
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer
from dicode_jax.models.t5 import T5Encoder
from dicode_jax.models.vit import ViT
from dicode_jax.typing import Array, Bool, Float, Int, UInt8

program = functools.partial(jax.jit, static_argnames="graph")


@program
def embed_text(
    graph, state, ids: Int[Array, "b l"], valid: Bool[Array, "b l"] | None
) -> Float[Array, "b l e"]:
    """Encoded text; padding takes part where `valid` is None."""
    t5: T5Encoder = nnx.merge(graph, state)
    return t5(t5.embed_tokens(ids), valid)


@program
def features(graph, state, video: UInt8[Array, "b f h w 3"]) -> Float[Array, "b g y x c"]:
    """What the semantic tokenizer reads of a video of 4g - 3 frames, float32.

    A CLIP image tower gives its tokens behind the last block, each brought to mean 0 and variance
    1, without the class token.
    """
    module, frames = nnx.merge(graph, state), to_float(video)
    if isinstance(module, ViT):
        return vit_features(module, frames).astype(jnp.float32)
    side = module.cfg.image_size // module.cfg.patch_size
    x = module(rearrange(frames[:, ::STRIDE], "b f h w c -> (b f) h w c"))[:, 1:]
    x = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=1e-5)
    return rearrange(x, "(b g) (y x) c -> b g y x c", b=len(video), y=side)


@program
def encode_features(graph, state, found: Float[Array, "b g y x c"]) -> Int[Array, "b n"]:
    """Semantic tokens of up to a segment."""
    tokenizer: SemanticTokenizer = nnx.merge(graph, state)
    return tokenizer.encode(found)


@functools.partial(jax.jit, static_argnames=("graphs",))
def semantic_latents(graphs, states, codes: Int[Array, "b n"]) -> Float[Array, "b t h w z"]:
    """What steers the denoiser, of up to a segment of semantic tokens."""
    tokenizer, denoiser = (nnx.merge(*pair) for pair in zip(graphs, states, strict=True))
    made: Denoiser = denoiser
    return made.semantic_latents(tokenizer.decode(codes))


@program
def paint(
    graph,
    state,
    context: Float[Array, "b l e"],
    semantic: Float[Array, "b t h w z"],
    prefix: Float[Array, "b p h w z"] | None,
    keys: Any,
    cfg: WindowSampling,
) -> Float[Array, "b t h w z"]:
    """The scaled latents of a window."""
    denoiser: Denoiser = nnx.merge(graph, state)
    return sample_window(denoiser, context, semantic, cfg, keys=keys, prefix=prefix)[0]


@program
def encode_video(graph, state, video: Float[Array, "b f h w 3"]) -> Float[Array, "b t y x z"]:
    """Scaled latents of frames in [-1, 1]: the means."""
    vae: AutoencoderCausal3D = nnx.merge(graph, state)
    return vae.encode_latents(video).astype(jnp.float32)


@program
def decode_latents(
    graph, state, latents: Float[Array, "b t y x z"], cache: Cache | None
) -> tuple[Float[Array, "b f h w 3"], UInt8[Array, "b f h w 3"], Bool[Array, ""], Cache]:
    """Frames of the latents behind `cache`, as they are and as they are shown.

    Returns:
      The frames in [-1, 1], the same in [0, 255], whether all are finite, and the next cache.
    """
    vae: AutoencoderCausal3D = nnx.merge(graph, state)
    frames, cache = vae.decode_more(latents, cache)
    frames = frames.astype(jnp.float32)
    return jnp.clip(frames, -1.0, 1.0), to_uint8(frames), jnp.isfinite(frames).all(), cache

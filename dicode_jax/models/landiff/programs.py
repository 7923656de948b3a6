"""LanDiff's compiled programs: one for each of its parts, of weights that come and go.

Each takes a graph and a state of `nnx.split`, so that another copy of the same weights compiles
nothing. Shape letters: b videos, f frames, h w their pixels, c channels, l text tokens, e their
width, n semantic tokens, g semantic frames, y x the grid of features, t latents, z their channels.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from dicode_jax.diffusion.guided import starting_noise
from dicode_jax.diffusion.samplers.base import Carry, Steps
from dicode_jax.media.transforms import to_float, to_uint8
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, Cache
from dicode_jax.models.landiff.dit import Denoiser
from dicode_jax.models.landiff.features import features_of
from dicode_jax.models.landiff.sampling import WindowSampling, window_steps
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer
from dicode_jax.models.t5 import T5Encoder
from dicode_jax.runtime import kept_programs
from dicode_jax.typing import Array, Bool, Float, Int, UInt8

program = functools.partial(kept_programs.jit, static_argnames=("graph",))


@program
def embed_text(
    graph, state, ids: Int[Array, "b l"], valid: Bool[Array, "b l"] | None
) -> Float[Array, "b l e"]:
    """Encoded text; padding takes part where `valid` is None."""
    t5: T5Encoder = nnx.merge(graph, state)
    return t5(t5.embed_tokens(ids), valid)


@program
def features(graph, state, video: UInt8[Array, "b f h w 3"]) -> Float[Array, "b g y x c"]:
    """What the semantic tokenizer reads of a video of 4g - 3 frames, float32."""
    return features_of(nnx.merge(graph, state), to_float(video))


@program
def encode_features(
    graph, state, found: Float[Array, "b g y x c"]
) -> tuple[Int[Array, "b n"], Bool[Array, ""]]:
    """Semantic tokens of up to a segment, and whether they were made of finite numbers."""
    tokenizer: SemanticTokenizer = nnx.merge(graph, state)
    tokens = tokenizer.tokens(found)
    return tokenizer.quantizer.encode(tokens), jnp.isfinite(tokens).all()


@functools.partial(kept_programs.jit, static_argnames=("graphs",))
def semantic_latents(
    graphs, states, codes: Int[Array, "b n"], past: Float[Array, "b p y x c"] | None
) -> tuple[Float[Array, "b t h w z"], Float[Array, "b p y x c"] | None]:
    """What steers the denoiser, of up to a segment of semantic tokens, and the next `past`.

    Args:
      past: Features of the last frames of the segment before; None for the first one.
    """
    tokenizer, denoiser = (nnx.merge(*pair) for pair in zip(graphs, states, strict=True))
    made: Denoiser = denoiser
    features, behind = tokenizer.decode(codes), None
    if num_past := made.cfg.upsampler.num_past:
        behind = made.semantic.with_past(features, past)[:, -num_past:]
    return made.semantic_latents(features, past), behind


class WindowInputs(NamedTuple):
    """What all steps of a window are given.

    Attributes:
      context: Encoded text, `[b, l, e]`.
      semantic: What steers, `[b, t, h, w, z]`.
      prefix: Latents that are known, `[b, p, h, w, z]`; None for none.
      keys: One for each video, `[b]`.
      cfg: Settings.
    """

    context: Array
    semantic: Array
    prefix: Array | None
    keys: Any
    cfg: WindowSampling


def _steps(graph, state, given: WindowInputs) -> Steps:
    denoiser: Denoiser = nnx.merge(graph, state)
    return window_steps(
        denoiser,
        given.context,
        given.semantic,
        given.cfg,
        given.semantic.shape,
        keys=given.keys,
        prefix=given.prefix,
    )


@program
def begin_window(graph, state, given: WindowInputs) -> Carry:
    """What goes into the first step."""
    return _steps(graph, state, given).begin(starting_noise(given.keys, given.semantic.shape[1:]))


@program
def advance_window(
    graph, state, given: WindowInputs, carry: Carry, start: Int[Array, ""], stop: Int[Array, ""]
) -> tuple[Carry, Int[Array, ""]]:
    """Takes the steps from `start` to the one before `stop`; its other result says that it has."""
    return _steps(graph, state, given).advance(carry, start, stop), stop + 0


@program
def finish_window(graph, state, given: WindowInputs, carry: Carry) -> Float[Array, "b t h w z"]:
    """The scaled latents behind the last step."""
    return _steps(graph, state, given).finish(carry)


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

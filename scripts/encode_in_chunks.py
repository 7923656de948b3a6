"""Compares latents encoded in chunks with those of the whole.

    python scripts/encode_in_chunks.py [--vae FOLDER] [--num-frames 49] [--size 64]

Encodes a video of the synthetic world with a causal autoencoder in both ways and prints, for each
frame of latents, the difference over the spread of all of them. Without --vae the autoencoder has
the levels of CogVideoX-2b's, a quarter of its width, one block a level, and weights as training
begins; then what it decodes is no picture.
"""

import argparse
import functools
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.evaluation.quality import psnr
from dicode_jax.media.transforms import to_float, to_uint8
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.storage import weights
from dicode_jax.training.evaluate import jit_local

DRAWN = AutoencoderCausal3DConfig(channels=32, encoder_blocks=1, decoder_blocks=1)


def draw(num_frames: int, size: int, seed: int = 0) -> np.ndarray:
    """Frames uint8 [f, size, size, 3] of a scene that training never saw, at 8 a second."""
    scene = shapes_world.sample_scene(np.random.default_rng(seed), "test")
    clips = shapes_world.render(scene, -(-num_frames // 16), frame_size=size, num_frames=16)
    return clips.reshape(-1, *clips.shape[2:])[:num_frames]


def compare(model: AutoencoderCausal3D, video: np.ndarray) -> tuple[np.ndarray, float]:
    """Differences [t] of both ways over the spread of latents, and what PSNR their frames have."""
    x, found = to_float(jnp.asarray(video))[None], []
    show = jit_local(lambda model, z: to_uint8(model.decode(z)))
    for in_chunks in (False, True):
        encode = functools.partial(AutoencoderCausal3D.encode, in_chunks=in_chunks)
        latents = jit_local(lambda model, x, encode=encode: encode(model, x).mode())(model, x)
        found.append((np.asarray(latents, np.float64)[0], np.asarray(show(model, latents))[0]))
    (whole, frames), (chunked, other) = found
    error = np.sqrt(np.square(chunked - whole).mean(axis=(1, 2, 3)))
    return error / whole.std(), psnr(frames, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", metavar="FOLDER", help="a trained or converted autoencoder")
    parser.add_argument("--num-frames", type=int, default=49, help="8 m + 1, 49 by default")
    parser.add_argument("--size", type=int, default=64, help="of the square frames, 64 by default")
    args = parser.parse_args()
    if args.vae is None:
        model = AutoencoderCausal3D(DRAWN, rngs=nnx.Rngs(0))
    else:
        model, _ = weights.load_module(args.vae, AutoencoderCausal3D, AutoencoderCausal3DConfig)
    differences, of_frames = compare(model, draw(args.num_frames, args.size))
    print("latents:", " ".join(f"{x:.2%}" for x in differences))
    print(f"of all: {np.sqrt(np.square(differences).mean()):.2%}; frames: {of_frames:.1f} dB")


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")

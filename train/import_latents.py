"""Makes a cache of latents of the `.npy` files that AR-Diffusion's release encodes clips into.

python -m train.import_latents latents/ --vae models/ar_diffusion/vae --out cache

A file holds one clip, float32 [f, c, 1, l]; the fourth part of its name between underscores is the
class, by name or number, and becomes the caption.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from dicode_jax.data import encoded_cache
from dicode_jax.data.encoded_cache import EncodedCache, Example, Spec, shard_path
from dicode_jax.errors import UserError, print_any_name
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.stages import parts
from dicode_jax.stages.ar_diffusion.examples import LATENTS
from dicode_jax.storage import weights
from dicode_jax.training.workdir import hold
from train import encode

SHARD_SIZE = 4096  # clips


def import_latents(folder: pathlib.Path, vae: pathlib.Path, out: pathlib.Path) -> EncodedCache:
    """Makes the cache, or finishes it.

    Args:
      folder: With the files, or with folders of them.
      vae: The frame VAE that made them, which a training compares with its own.
      out: Folder of the cache.

    Raises:
      UserError: A file is no clip of latents of this VAE, or `out` holds something else.
    """
    sizes = parts.stored_config(vae, FrameVAEConfig)
    paths = sorted(folder.rglob("*.npy"))
    if not paths:
        raise UserError(f"there are no .npy files in {folder}")
    schema = {LATENTS: Spec("float32", (None, sizes.num_tokens, sizes.token_dim))}
    about = {
        "encoder": weights.hash_module(vae),
        "settings": {"run": "import", "data": {"path": str(folder)}, "files": len(paths)},
    }
    count = -(-len(paths) // SHARD_SIZE)
    shards = {
        shard_path(out, i, count): paths[i * SHARD_SIZE : (i + 1) * SHARD_SIZE]
        for i in range(count)
    }
    encode.check(out, about)
    with hold(out):
        encode.claim(out, about)
        data = {shard: {"files": _fingerprint(held)} for shard, held in shards.items()}
        if encoded_cache.stale(data):
            raise UserError(f"files in {folder} have changed since {out} was begun: another --out")
        for shard, held in shards.items():
            if encoded_cache.read_index(shard) is None:
                examples = _examples(folder, held, schema[LATENTS].shape)
                encoded_cache.write_shard(shard, examples, schema, data[shard])
        encoded_cache.write_manifest(out, count, schema)
    return EncodedCache(out)


def _examples(
    folder: pathlib.Path, paths: Sequence[pathlib.Path], shape: tuple[int | None, ...]
) -> Iterator[Example]:
    for path in paths:
        latents = read_latents(path, *map(int, shape[1:]))
        fields = path.stem.split("_")
        yield Example(
            name=str(path.relative_to(folder)),
            captions=tuple(fields[3:4]),
            source=str(path),
            arrays={LATENTS: latents},
        )


def read_latents(path: pathlib.Path, num_tokens: int, channels: int) -> np.ndarray:
    """The latents of a file, float32 [f, l, c].

    Raises:
      UserError: It holds something else, or numbers that are not finite.
    """
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable .npy file: {error}") from error
    if stored.ndim != 4 or stored.shape[1:] != (channels, 1, num_tokens) or not len(stored):
        raise UserError(
            f"{path} is of shape {stored.shape}, the VAE's latents are [f, {channels}, 1, "
            f"{num_tokens}]"
        )
    if stored.dtype.kind != "f":
        raise UserError(f"{path} holds {stored.dtype}, latents are float32")
    latents = np.moveaxis(np.asarray(stored, np.float32)[:, :, 0], 1, 2)
    if not np.isfinite(latents).all():
        raise UserError(f"{path} holds numbers that are not finite: move it away")
    return latents


def _fingerprint(paths: Sequence[pathlib.Path]) -> str:
    about = [(os.fspath(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0, or 2 after a mistake of the user."""
    print_any_name()
    parser = argparse.ArgumentParser(
        prog="python -m train.import_latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=pathlib.Path, metavar="FOLDER", help="of .npy files")
    for name, what in (("vae", "that made them"), ("out", "folder of the cache")):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True, help=what)
    args = parser.parse_args(argv)
    try:
        cache = import_latents(args.source, args.vae, args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    frames = int(cache.lengths(LATENTS).sum())
    print(f"train.import_latents: {len(cache)} clips, {frames} frames, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

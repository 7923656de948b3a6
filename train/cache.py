"""Examples that a frozen model encodes once, kept beside a run and trained on again and again."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dicode_jax.data import encoded_cache
from dicode_jax.data.encoded_cache import EncodedCache, Example, Spec, shard_path
from dicode_jax.data.records import ClipSource
from dicode_jax.data.sources.identity import fingerprint
from dicode_jax.data.stream import BatchStream, Examples, stream_examples
from dicode_jax.errors import UserError
from dicode_jax.storage import weights
from dicode_jax.training.stage import Stage
from train import data

FOLDER = "encoded"  # in that of the run
SHARD_BATCHES = 16
HOW_FIELDS = ("num_workers", "prefetch", "max_broken")  # of the data: they change no example

Encode = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


def cached_batches(
    workdir: pathlib.Path,
    stage: Stage,
    examples: Examples,
    encode: Encode,
    *,
    source: ClipSource,
    count: int,
    together: int,
    encoder: Sequence[pathlib.Path],
    settings: Mapping[str, Any],
) -> BatchStream:
    """Batches of the first `count` examples, which process 0 encodes where need be.

    What was encoded before is encoded anew if records, encoder or settings have changed since, and
    a line says which.

    Args:
      workdir: Folder of the run, which all processes see.
      stage: Its batches say what is kept of an example.
      examples: Those before encoding, of the records of `source`.
      encode: Turns a batch of them into one of the stage.
      together: How many are encoded at a time.
      encoder: Folders of the modules that encode.
      settings: What decides on an example besides data, frame size and seed.
    """
    folder, config = workdir / FOLDER, stage.config
    if jax.process_index() == 0:
        shapes = stage.batch_shapes(1)
        schema = {name: Spec(str(x.dtype), tuple(x.shape[1:])) for name, x in shapes.items()}
        of_data = dataclasses.asdict(config.data).items()
        hashes = "".join(map(weights.hash_module, encoder))
        about = {
            "encoder": hashlib.sha256(hashes.encode()).hexdigest(),
            "settings": {
                "run": stage.name,
                "examples": count,
                "records": len(examples),
                "frame_size": config.frame_size,
                "seed": config.seed,
                "schema": schema,
                "data": {name: x for name, x in of_data if name not in HOW_FIELDS},
                **settings,
            },
        }
        _claim(folder, about)
        stream = stream_examples(
            examples,
            config.data,
            batch_size=min(together, count),
            seed=config.seed,
            process_index=0,
            process_count=1,
        )
        _encode_missing(folder, stream, encode, source, schema, count)
        stream.close()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(folder))
    cache = EncodedCache(folder)
    return BatchStream(
        lambda i, _: cache[i].arrays,
        len(cache),
        names=cache.names,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        **data.share(config),
    )


def _claim(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Makes the folder that of these examples; what it held of others is removed."""
    changes = encoded_cache.changes(folder, about)
    is_taken = changes is None and folder.is_dir() and any(folder.iterdir())
    if is_taken or any(line.startswith("settings.run ") for line in changes or ()):
        raise UserError(f"{folder} is where this run keeps what it encodes; move what is there")
    if changes:
        print(f"{folder} is made anew: {'; '.join(changes)}", flush=True)
        (folder / encoded_cache.MANIFEST).unlink(missing_ok=True)
        for path in folder.glob("encoded-?????-of-?????.*"):
            path.unlink()
    encoded_cache.write_plan(folder, about)


def _encode_missing(
    folder: pathlib.Path,
    stream: BatchStream,
    encode: Encode,
    source: ClipSource,
    schema: encoded_cache.Schema,
    count: int,
) -> None:
    """Encodes the shards that are not there, or whose records have changed; then the manifest."""
    size = stream.batch_size * SHARD_BATCHES
    starts, order, shards = range(0, count, size), stream.indices(count), {}
    for i, start in enumerate(starts):
        part = fingerprint(source, np.unique(order[start : start + size]))
        if not {"text_ids", "classes"} & schema.keys():
            del part["captions"]
        shards[shard_path(folder, i, len(starts))] = part
    stale = encoded_cache.stale(shards)
    if stale:
        what = " and ".join(sorted(set().union(*stale.values())))
        print(
            f"{folder}: {what} have changed; {len(stale)} of {len(shards)} parts are made anew",
            flush=True,
        )
    for path in stale:
        path.with_suffix(".json").unlink()
    todo = [i for i, path in enumerate(shards) if encoded_cache.read_index(path) is None]
    if not todo and encoded_cache.is_cache(folder):
        return
    (folder / encoded_cache.MANIFEST).unlink(missing_ok=True)
    sizes = [min(size, count - start) for start in starts]
    with tqdm(total=sum(sizes[i] for i in todo), desc="encoding", unit="example") as bar:
        for i in todo:
            path = shard_path(folder, i, len(starts))
            examples = _examples(stream, encode, i * SHARD_BATCHES, sizes[i], bar)
            encoded_cache.write_shard(path, examples, schema, shards[path])
    encoded_cache.write_manifest(folder, len(starts), schema)


def _examples(
    stream: BatchStream, encode: Encode, first_batch: int, count: int, bar: tqdm
) -> Iterator[Example]:
    if stream.state()["next_batch"] != first_batch:
        stream.restore({"next_batch": first_batch, "broken": {}})
    for start in range(0, count, stream.batch_size):
        batch = next(stream)
        names = batch.pop("ids")[: count - start]
        arrays = {name: np.asarray(x) for name, x in encode(batch).items()}
        for i, name in enumerate(names):
            yield Example(name=str(name), arrays={n: x[i] for n, x in arrays.items()})
        bar.update(len(names))

"""Runs a frozen encoder over a data set once, into a cache that a training reads.

A language model reads deep tokens of keyframes, AR-Diffusion's denoiser latents of all frames,
LanDiff's both read codes and latents of whole videos:

python -m train.encode --config configs/gpt2_small.py --tokenizer runs/tokenizer/model \
    --data.path videos/ --out cache
python -m train.ar --config configs/gpt2_small.py --data.path cache --workdir runs/ar \
    --text-tokenizer models/gpt2_small_body
python -m train.encode --config configs/ar_diffusion/sky_dit.py --vae runs/vae/model \
    --data.path videos/ --out cache
python -m train.encode --config configs/landiff/shapes_encode.py --tokenizer runs/tokenizer/model \
    --vae runs/vae/model --limit 4000 --out cache

A shard is a fixed run of the data set. With several processes, process p of P encodes the shards
p, p + P, ... on its own devices; they share nothing but the folder, in which process 0 writes the
manifest as soon as all shards are there. A stopped run loses the shards that it was at.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from dicode_jax.data import encoded_cache
from dicode_jax.data.encoded_cache import Broken, EncodedCache, Example, Spec, shard_path
from dicode_jax.data.examples import VideosToEncode
from dicode_jax.data.records import ClipSource, Subset, some, told
from dicode_jax.data.sources import open as sources
from dicode_jax.data.sources.identity import fingerprint
from dicode_jax.data.stream import BatchStream
from dicode_jax.errors import UserError
from dicode_jax.runtime import compile_cache, distributed
from dicode_jax.runtime.sharding import ShardingConfig, batch_sharding, make_mesh, replicated
from dicode_jax.training.evaluate import jit_model
from dicode_jax.training.workdir import hold
from train import command, loop
from train.encoders import KINDS, Encoder, find_encoder
from train.landiff_encoder import VideoEncoder
from train.sources import find_sources

VIDEOS_AHEAD = 16  # that are decoded while the encoder works
MIN_READS = 100  # before which a share of broken videos says little
POLL_SECONDS = 1.0

# Settings of the data that decide what is read; the others only decide how.
DATA_FIELDS = (
    *("path", "kind", "root", "video_column", "caption_column", "clip_start", "resize", "crop"),
    *("antialias", "validation"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What the command line says besides the config.

    Attributes:
      out: Folder of the cache.
      split: Which part of the data set; None for all of it, and for the train split of the
        synthetic world, whose held-out captions must not be learned.
      limit: Encode the first videos only.
      shard_size: Videos per shard.
      retry_broken: Encode shards with broken videos again.
    """

    out: pathlib.Path
    split: Literal["all", "train", "validation"] | None = None
    limit: int | None = None
    shard_size: int = 256
    retry_broken: bool = False

    def __post_init__(self):
        for name in ("limit", "shard_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def encode(config: Any, options: EncodeOptions) -> dict[str, Any]:
    """Makes the cache, or finishes it; returns the manifest.

    Raises:
      UserError: Too many videos are broken, the folder holds another cache or cannot be written,
        or data or encoder cannot be opened.
    """
    if config.data.kind == "cache":  # of a config that is meant for training on what is made here
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, kind="auto"))
    encoder = find_encoder(find_sources(config))
    config = encoder.config
    source, split = open_videos(config, options)
    num_shards = -(-len(source) // options.shard_size)
    about = {
        "encoder": encoder.digest,
        "settings": settings_of(encoder, options, source, split),
    }
    schema = {**encoder.schema, "times": Spec("float64", (None,))}
    check(options.out, about)
    shards = [shard_path(options.out, i, num_shards) for i in range(num_shards)]
    with hold(options.out):
        claim(options.out, about)
        if options.retry_broken:
            forget_broken(options.out, shards)
        refuse_changed(options, source, shards)
        if not encoded_cache.is_cache(options.out):
            encode_shards(encoder, options, source, shards, schema)
            finish(options.out, shards, schema, config.data.max_broken)
    return EncodedCache(options.out).manifest


def open_videos(config: Any, options: EncodeOptions) -> tuple[ClipSource, str]:
    """The videos that belong into the cache, and the split that they are."""
    is_world = sources.kind_of(config.data) == "shapes"
    split = options.split or ("train" if is_world else "all")
    if is_world and options.limit is None:
        raise UserError("the synthetic world never ends: say how many videos with --limit")
    source = sources.open_source(config.data, split=split, seed=config.seed)
    for line in told(source.left_out):
        print(f"left out: {line}", flush=True)
    if options.limit is not None and options.limit < len(source):
        source = Subset(source, np.arange(options.limit))
    if not len(source):
        raise UserError(f"the {split} split of {config.data.path} is empty")
    return source, split


def settings_of(
    encoder: Encoder | VideoEncoder, options: EncodeOptions, source: ClipSource, split: str
) -> dict[str, Any]:
    """All that decides what the shards hold, besides the encoder's weights."""
    config = encoder.config
    return {
        "data": {name: getattr(config.data, name) for name in DATA_FIELDS},
        "split": split,
        "videos": len(source),
        "frame_size": config.frame_size,
        **encoder.settings,
        "dtype": config.dtype,
        "seed": config.seed,
        "shard_size": options.shard_size,
    }


def claim(out: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Notes what goes into the folder, which is held, or checks that it is the same as before."""
    if jax.process_index() == 0 and not (check(out, about) and encoded_cache.is_cache(out)):
        encoded_cache.write_plan(out, about)  # also in place of one that the last release wrote
    while not check(out, about):
        time.sleep(POLL_SECONDS)


def check(out: pathlib.Path, about: Mapping[str, Any]) -> bool:
    """Whether the folder holds this cache, begun or finished; nothing is written.

    Raises:
      UserError: It holds another one, or something else.
    """
    changes = encoded_cache.changes(out, about)
    if changes is None:
        is_first = jax.process_index() == 0 and out.is_dir()
        if is_first and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no cache; take another --out")
    if changes:
        raise UserError(f"{out} holds another cache ({'; '.join(changes)}); take another --out")
    return changes is not None


def forget_broken(out: pathlib.Path, shards: Sequence[pathlib.Path]) -> None:
    """Takes away the shards that lack broken videos."""
    if jax.process_count() > 1:
        raise UserError("--retry-broken is for one process; start this without the others")
    if encoded_cache.is_cache(out):
        encoded_cache.read_manifest(out)  # raises when it is somebody else's file of that name
        (out / encoded_cache.MANIFEST).unlink()
    for shard in shards:
        index = encoded_cache.read_index(shard)
        if index is not None and index["broken"]:
            shard.with_suffix(".json").unlink()


def own(shards: Sequence[pathlib.Path]) -> range:
    """Which shards are this process's."""
    return range(jax.process_index(), len(shards), jax.process_count())


def indices_of(options: EncodeOptions, source: ClipSource, shard: int) -> np.ndarray:
    """The videos of a shard."""
    start = shard * options.shard_size
    return np.arange(start, min(start + options.shard_size, len(source)))


def refuse_changed(
    options: EncodeOptions, source: ClipSource, shards: Sequence[pathlib.Path]
) -> None:
    """Refuses a folder with finished shards whose videos or captions have changed since."""
    done = [i for i in own(shards) if encoded_cache.read_index(shards[i]) is not None]
    now = {shards[i]: fingerprint(source, indices_of(options, source, i)) for i in done}
    stale = encoded_cache.stale(now)
    if not stale:
        return
    what, names = sorted(set().union(*stale.values())), [path.name for path in stale]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    cure = f"delete {encoded_cache.MANIFEST}, {', '.join(names[:3])}{more}"
    if all(encoded_cache.read_index(path)["broken"] for path in stale):
        cure = "add --retry-broken"
    raise UserError(
        f"{' and '.join(what)} have changed since {len(names)} of the shards in {options.out} were "
        f"encoded: take another --out, or {cure} to encode these anew"
    )


class Tally:
    """What this process has read so far, also in runs before: how much, and what was broken."""

    def __init__(self, max_broken: float):
        self.max_broken, self.num_read, self.broken = max_broken, 0, {}

    def add(self, num_read: int, broken: Mapping[str, str]) -> None:
        """Counts a shard.

        Raises:
          UserError: More than the allowed share is broken.
        """
        self.num_read += num_read
        self.broken |= broken
        if self.num_read >= MIN_READS:
            self.check()

    def check(self) -> None:
        """Compares with the allowed share, however little was read."""
        if len(self.broken) > self.max_broken * self.num_read:
            raise UserError(
                f"{len(self.broken)} of {self.num_read} videos are broken, more than max_broken="
                f"{self.max_broken:g} allows: {some(list(self.broken))}; mend these files and "
                "add --retry-broken, or raise --data.max_broken"
            )


def encode_shards(
    encoder: Encoder | VideoEncoder,
    options: EncodeOptions,
    source: ClipSource,
    shards: Sequence[pathlib.Path],
    schema: encoded_cache.Schema,
) -> None:
    """Encodes this process's shards that are not there yet."""
    config = encoder.config
    tally, todo = Tally(config.data.max_broken), []
    for i in own(shards):
        index = encoded_cache.read_index(shards[i])
        if index is None:
            todo.append(i)
        else:
            tally.add(len(index["names"]) + len(index["broken"]), index["broken"])
    if not todo:
        return
    ranges = [indices_of(options, source, i) for i in todo]
    stream = open_stream(encoder, source, np.concatenate(ranges))
    if isinstance(encoder, VideoEncoder):
        make = functools.partial(with_own_arrays, encode=encoder.load())
    else:
        frames = {"batch_size": config.batch_size, "name": encoder.array}
        make = functools.partial(with_arrays, encode=make_encoder(encoder), **frames)
    bar = tqdm(
        total=tally.num_read + sum(map(len, ranges)),
        initial=tally.num_read,
        desc="encoding",
        unit="video",
        file=sys.stderr,
    )
    seen = Counter(frames=0, broken=0)
    try:
        for i, indices in zip(todo, ranges, strict=True):
            data = fingerprint(source, indices)
            read = (next_video(stream) for _ in indices)
            videos = show(make(read), bar, seen)
            encoded_cache.write_shard(shards[i], videos, schema, data)
            tally.add(len(indices), encoded_cache.read_index(shards[i])["broken"])
    finally:
        stream.close()
        bar.close()


def open_stream(
    encoder: Encoder | VideoEncoder, source: ClipSource, indices: np.ndarray
) -> BatchStream:
    """The videos at these indices, one by one in this order."""
    config = encoder.config
    read = VideosToEncode(source=source, indices=indices, read=encoder.read, seed=config.seed)
    return BatchStream(
        read,
        len(indices),
        names=[""] * len(indices),
        batch_size=1,
        shuffle=False,
        num_workers=config.data.num_workers,
        prefetch=VIDEOS_AHEAD,
        process_index=0,
        process_count=1,
    )


def next_video(stream: BatchStream) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | Broken:
    """Information, frames uint8 [k, h, w, 3] and times of the next video."""
    example = next(stream)
    info = json.loads(str(example["info"][0]))
    if "broken" in info:
        return Broken(info["name"], info["broken"])
    return info, example["frames"][0], example["times"][0]


def make_encoder(encoder: Encoder) -> Callable[[np.ndarray], np.ndarray]:
    """Frames uint8 [b, h, w, 3] to what is kept of them, on this process's devices."""
    mesh = make_mesh(ShardingConfig(), jax.local_devices())
    graph, state = nnx.split(encoder.load())
    module = nnx.merge(graph, jax.device_put(state, replicated(mesh)))
    compiled, ways = jit_model(encoder.encode), mesh.size

    def run(frames: np.ndarray) -> np.ndarray:
        padded = np.pad(frames, ((0, -len(frames) % ways), (0, 0), (0, 0), (0, 0)))
        made = compiled(module, jax.device_put(padded, batch_sharding(mesh)))
        return np.asarray(made)[: len(frames)]

    return run


def with_arrays(
    videos: Iterable[tuple | Broken],
    encode: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    name: str,
) -> Iterator[Example | Broken]:
    """Gives videos what is made of their frames, in order; frames of several go through at once.

    Every call has `batch_size` frames; the last ones are filled up with zeros.
    """
    waiting: deque = deque()
    frames, made = [], []

    def finished() -> Iterator[Example | Broken]:
        while waiting:
            if isinstance(waiting[0], Broken):
                yield waiting.popleft()
                continue
            info, times = waiting[0]
            if len(made) < len(times):
                return
            waiting.popleft()
            yield Example(
                name=info["name"],
                captions=tuple(info["captions"]),
                source=info["source"],
                arrays={name: np.stack(made[: len(times)]), "times": times},
            )
            del made[: len(times)]

    for video in videos:
        if isinstance(video, Broken):
            waiting.append(video)
        else:
            info, own_frames, times = video
            waiting.append((info, times))
            frames.extend(own_frames)
        while len(frames) >= batch_size:
            made.extend(encode(np.stack(frames[:batch_size])))
            del frames[:batch_size]
        yield from finished()
    if frames:
        rest = np.stack(frames)
        fill = np.zeros((batch_size - len(rest), *rest.shape[1:]), rest.dtype)
        made.extend(encode(np.concatenate([rest, fill]))[: len(rest)])
    yield from finished()


def with_own_arrays(
    videos: Iterable[tuple | Broken],
    encode: Callable[[np.ndarray, Sequence[str]], Mapping[str, np.ndarray]],
) -> Iterator[Example | Broken]:
    """Gives videos what is made of all their frames and captions, one after the other."""
    for video in videos:
        if isinstance(video, Broken):
            yield video
            continue
        info, frames, times = video
        captions = tuple(info["captions"])
        yield Example(
            name=info["name"],
            captions=captions,
            source=info["source"],
            arrays={**encode(frames, captions), "times": times},
        )


def show(videos: Iterable[Example | Broken], bar: tqdm, seen: Counter) -> Iterator:
    """Passes videos on, counts frames and what is broken, and tells the bar."""
    for video in videos:
        if isinstance(video, Broken):
            seen["broken"] += 1
            bar.write(f"left out: {video.reason}", file=sys.stderr)
        else:
            seen["frames"] += len(video.arrays["times"])
        bar.update()
        bar.set_postfix(seen, refresh=False)
        yield video


def finish(
    out: pathlib.Path,
    shards: Sequence[pathlib.Path],
    schema: encoded_cache.Schema,
    max_broken: float,
) -> None:
    """Writes the manifest when all processes are done, or waits until process 0 has done so."""
    if jax.process_index() != 0:
        while not encoded_cache.is_cache(out):
            time.sleep(POLL_SECONDS)
        return
    tally = Tally(max_broken)
    for shard in shards:
        while (index := encoded_cache.read_index(shard)) is None:
            time.sleep(POLL_SECONDS)  # another process is at it; jax ends this one if that dies
        tally.add(len(index["names"]) + len(index["broken"]), index["broken"])
    tally.check()
    encoded_cache.write_manifest(out, len(shards), schema)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `python -m train.encode --config FILE --out DIR [--field value ...]`.

    Returns:
      The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    out = None
    try:
        own = lambda _: EncodeOptions(out=tyro.MISSING)  # noqa: E731
        about = __doc__.splitlines()[0]
        said = command.parse(argv, KINDS, own, prog="train.encode", about=about)
        config, options, out = said.config, said.options, said.options.out
        distributed.initialize(**dataclasses.asdict(said.processes))
        compile_cache.use()
        since = time.perf_counter()
        manifest = encode(config, options)
    except UserError as error:
        return loop.leave(2, f"error: {error}")
    except KeyboardInterrupt:
        return loop.leave(130, f"stopped; the same command goes on in {out}")
    if jax.process_index() == 0:
        frames = "keyframes" if "tokens" in manifest["schema"] else "frames"
        print(
            f"train.encode: {manifest['count']} videos, {manifest['lengths']['times']} {frames}, "
            f"{manifest['broken']} broken, in {out} after {time.perf_counter() - since:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

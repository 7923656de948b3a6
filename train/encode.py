"""Runs a tokenizer over a data set once, into a token cache that the language model reads.

python -m train.encode --config configs/gpt2_small.py --tokenizer runs/tokenizer/model \
    --data.path videos/ --out cache
python -m train.ar --config configs/gpt2_small.py --data.path cache --workdir runs/ar \
    --text-tokenizer models/gpt2_small_body

A shard is a fixed run of the data set. With several processes, process p of P encodes the shards
p, p + P, ... on its own devices; they share nothing but the folder, in which process 0 writes the
manifest as soon as all shards are there. A stopped run loses the shards that it was at.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from dicode_jax import config as config_lib
from dicode_jax.data import token_cache
from dicode_jax.data.records import ClipSource, Subset
from dicode_jax.data.sources import open as sources
from dicode_jax.data.stream import BatchStream
from dicode_jax.data.token_cache import BrokenVideo, CachedVideo, shard_path
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.runtime import distributed
from dicode_jax.runtime.sharding import ShardingConfig, batch_sharding, make_mesh, replicated
from dicode_jax.stages import parts
from dicode_jax.stages.dicode import language_model
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.dicode.examples import VideosToEncode
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.storage import weights
from dicode_jax.storage.files import atomic_path, unfinished
from dicode_jax.training.evaluate import jit_model
from dicode_jax.training.workdir import hold
from train import loop

PLAN = "encode.json"
VIDEOS_AHEAD = 16  # that are decoded while the tokenizer works
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
    split: str | None = None
    limit: int | None = None
    shard_size: int = 256
    retry_broken: bool = False


def encode(config: ARTrainConfig, options: EncodeOptions) -> dict[str, Any]:
    """Makes the cache, or finishes it; returns the manifest.

    Raises:
      UserError: Too many videos are broken, the folder holds another cache or cannot be written,
        or data or tokenizer cannot be opened.
    """
    if config.data.kind == "cache":  # of a config that is meant for training on what is made here
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, kind="auto"))
    config = settle(config)
    source, split = open_videos(config, options)
    tokenizer = language_model.tokenizer_config(config)
    num_shards = -(-len(source) // options.shard_size)
    about = {
        "tokenizer": weights.hash_module(pathlib.Path(config.tokenizer) / "tokenizer"),
        "num_tokens": tokenizer.num_tokens,
        "token_dim": tokenizer.token_dim,
        "settings": settings_of(config, options, source, split),
    }
    check(options.out, about)
    shards = [shard_path(options.out, i, num_shards) for i in range(num_shards)]
    with hold(options.out):
        claim(options.out, about)
        if options.retry_broken:
            forget_broken(options.out, shards)
        if not token_cache.is_cache(options.out):
            encode_shards(config, options, source, shards)
            finish(options.out, shards, about, config.data.max_broken)
    return token_cache.TokenCache(options.out).manifest


def open_videos(config: ARTrainConfig, options: EncodeOptions) -> tuple[ClipSource, str]:
    """The videos that belong into the cache, and the split that they are."""
    is_world = sources.kind_of(config.data) == "shapes"
    split = options.split or ("train" if is_world else "all")
    if is_world and options.limit is None:
        raise UserError("the synthetic world never ends: say how many videos with --limit")
    source = sources.open_source(config.data, split=split, seed=config.seed)
    for line in source.left_out:
        print(f"left out: {line}", flush=True)
    if options.limit is not None and options.limit < len(source):
        source = Subset(source, np.arange(options.limit))
    if not len(source):
        raise UserError(f"the {split} split of {config.data.path} is empty")
    return source, split


def settings_of(
    config: ARTrainConfig, options: EncodeOptions, source: ClipSource, split: str
) -> dict[str, Any]:
    """All that decides what the shards hold, besides the tokenizer."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(source.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return {
        "data": {name: getattr(config.data, name) for name in DATA_FIELDS},
        "split": split,
        "videos": len(source),
        "names_sha256": names.hexdigest(),
        "frame_size": config.frame_size,
        "num_keyframes": config.num_keyframes,
        "dtype": config.dtype,
        "seed": config.seed,
        "shard_size": options.shard_size,
    }


def claim(out: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Notes what goes into the folder, which is held, or checks that it is the same as before."""
    path = out / PLAN
    if jax.process_index() == 0 and not check(out, about):
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")
    while not path.is_file():
        time.sleep(POLL_SECONDS)
    check(out, about)


def check(out: pathlib.Path, about: Mapping[str, Any]) -> bool:
    """Whether the folder holds this cache, begun or finished; nothing is written.

    Raises:
      UserError: It holds another one, or something else.
    """
    path = out / PLAN
    if not os.path.lexists(path):
        is_first = jax.process_index() == 0 and out.is_dir()
        if is_first and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no token cache; take another --out")
        return False
    try:
        plan = json.loads(path.read_text())
        earlier, now = (_flat(plan), _flat(about))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not of a token cache; take another --out") from error

    def short(value: Any) -> Any:
        return value[:12] if isinstance(value, str) and len(value) == 64 else value  # a hash

    changed = [
        f"{name} {short(earlier.get(name))} -> {short(now.get(name))}"
        for name in sorted({*earlier, *now})
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(f"{out} holds another cache ({'; '.join(changed)}); take another --out")
    return True


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    settings = plan["settings"]
    apart = {"settings": None, "data": None}
    return {"antialias": True, **plan, **settings, **settings["data"], **apart}


def forget_broken(out: pathlib.Path, shards: Sequence[pathlib.Path]) -> None:
    """Takes away the shards that lack broken videos."""
    if jax.process_count() > 1:
        raise UserError("--retry-broken is for one process; start this without the others")
    if token_cache.is_cache(out):
        token_cache.read_manifest(out)  # raises when it is somebody else's file of that name
        (out / token_cache.MANIFEST).unlink()
    for shard in shards:
        index = token_cache.read_index(shard)
        if index is not None and index["broken"]:
            shard.with_suffix(".json").unlink()


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
            names = list(self.broken)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{len(names)} of {self.num_read} videos are broken, more than max_broken="
                f"{self.max_broken:g} allows: {', '.join(names[:3])}{more}; mend these files and "
                "add --retry-broken, or raise --data.max_broken"
            )


def encode_shards(
    config: ARTrainConfig,
    options: EncodeOptions,
    source: ClipSource,
    shards: Sequence[pathlib.Path],
) -> None:
    """Encodes this process's shards that are not there yet."""
    tally, todo = Tally(config.data.max_broken), []
    for i in range(jax.process_index(), len(shards), jax.process_count()):
        index = token_cache.read_index(shards[i])
        if index is None:
            todo.append(i)
        else:
            tally.add(len(index["names"]) + len(index["broken"]), index["broken"])
    if not todo:
        return
    everything = np.arange(len(source))
    ranges = [everything[i * options.shard_size :][: options.shard_size] for i in todo]
    stream = open_stream(config, source, np.concatenate(ranges))
    tokens_of = make_encoder(config)
    bar = tqdm(
        total=tally.num_read + sum(map(len, ranges)),
        initial=tally.num_read,
        desc="encoding",
        unit="video",
        file=sys.stderr,
    )
    seen = Counter(keyframes=0, broken=0)
    try:
        for i, indices in zip(todo, ranges, strict=True):
            for left_by_a_kill in unfinished(shards[i]):
                left_by_a_kill.unlink()
            read = (next_video(stream) for _ in indices)
            videos = show(with_tokens(read, tokens_of, config.batch_size), bar, seen)
            token_cache.write_shard(shards[i], videos)
            tally.add(len(indices), token_cache.read_index(shards[i])["broken"])
    finally:
        stream.close()
        bar.close()


def open_stream(config: ARTrainConfig, source: ClipSource, indices: np.ndarray) -> BatchStream:
    """The videos at these indices, one by one in this order."""
    read = VideosToEncode(
        source=source,
        indices=indices,
        data=config.data,
        frame_size=config.frame_size,
        num_keyframes=config.num_keyframes,
        seed=config.seed,
    )
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


def next_video(stream: BatchStream) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | BrokenVideo:
    """Information, keyframes uint8 [k, h, w, 3] and times of the next video."""
    example = next(stream)
    info = json.loads(str(example["info"][0]))
    if "broken" in info:
        return BrokenVideo(info["name"], info["broken"])
    return info, example["keyframes"][0], example["times"][0]


def make_encoder(config: ARTrainConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Keyframes uint8 [b, h, w, 3] to deep tokens bfloat16 [b, n, z], on this process's devices."""
    mesh = make_mesh(ShardingConfig(), jax.local_devices())
    tokenizer, _ = weights.load_module(
        pathlib.Path(config.tokenizer) / "tokenizer",
        DeepTokenizer,
        DeepTokenizerConfig,
        dtype=parts.compute_dtype(config),
        on_host=True,
    )
    graph, state = nnx.split(tokenizer)
    tokenizer = nnx.merge(graph, jax.device_put(state, replicated(mesh)))

    def encode(tokenizer, frames):
        return language_model.encode(tokenizer, frames[:, None])[:, 0].astype(jnp.bfloat16)

    compiled, ways = jit_model(encode), mesh.size

    def run(frames: np.ndarray) -> np.ndarray:
        padded = np.pad(frames, ((0, -len(frames) % ways), (0, 0), (0, 0), (0, 0)))
        tokens = compiled(tokenizer, jax.device_put(padded, batch_sharding(mesh)))
        return np.asarray(tokens)[: len(frames)]

    return run


def with_tokens(
    videos: Iterable[tuple | BrokenVideo],
    encode: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> Iterator[CachedVideo | BrokenVideo]:
    """Gives videos their tokens, in order; keyframes of several go through the tokenizer at once.

    Every call has `batch_size` keyframes; the last ones are filled up with zeros.
    """
    waiting: deque = deque()
    frames, tokens = [], []

    def finished() -> Iterator[CachedVideo | BrokenVideo]:
        while waiting:
            if isinstance(waiting[0], BrokenVideo):
                yield waiting.popleft()
                continue
            info, times = waiting[0]
            if len(tokens) < len(times):
                return
            waiting.popleft()
            yield CachedVideo(
                name=info["name"],
                captions=tuple(info["captions"]),
                source=info["source"],
                tokens=np.stack(tokens[: len(times)]),
                times=times,
            )
            del tokens[: len(times)]

    for video in videos:
        if isinstance(video, BrokenVideo):
            waiting.append(video)
        else:
            info, keyframes, times = video
            waiting.append((info, times))
            frames.extend(keyframes)
        while len(frames) >= batch_size:
            tokens.extend(encode(np.stack(frames[:batch_size])))
            del frames[:batch_size]
        yield from finished()
    if frames:
        rest = np.stack(frames)
        fill = np.zeros((batch_size - len(rest), *rest.shape[1:]), rest.dtype)
        tokens.extend(encode(np.concatenate([rest, fill]))[: len(rest)])
    yield from finished()


def show(videos: Iterable[CachedVideo | BrokenVideo], bar: tqdm, seen: Counter) -> Iterator:
    """Passes videos on, counts keyframes and what is broken, and tells the bar."""
    for video in videos:
        if isinstance(video, BrokenVideo):
            seen["broken"] += 1
            bar.write(f"left out: {video.reason}", file=sys.stderr)
        else:
            seen["keyframes"] += len(video.tokens)
        bar.update()
        bar.set_postfix(seen, refresh=False)
        yield video


def finish(
    out: pathlib.Path, shards: Sequence[pathlib.Path], about: Mapping[str, Any], max_broken: float
) -> None:
    """Writes the manifest when all processes are done, or waits until process 0 has done so."""
    if jax.process_index() != 0:
        while not token_cache.is_cache(out):
            time.sleep(POLL_SECONDS)
        return
    tally = Tally(max_broken)
    for shard in shards:
        while (index := token_cache.read_index(shard)) is None:
            time.sleep(POLL_SECONDS)  # another process is at it; jax ends this one if that dies
        tally.add(len(index["names"]) + len(index["broken"]), index["broken"])
    tally.check()
    token_cache.write_manifest(out, len(shards), about)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `python -m train.encode --config FILE --out DIR [--field value ...]`.

    Returns:
      The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    args, overrides = _parser().parse_known_args(argv)
    try:
        distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        config = config_lib.load_config_file(args.config)
        if not isinstance(config, ARTrainConfig):
            raise UserError(
                f"{args.config} configures {type(config).__name__}; train.encode wants that of a "
                "language model (ARTrainConfig)"
            )
        overrides = ["--help"] if args.help_config else overrides
        config = config_lib.parse_overrides(config, overrides, prog="python -m train.encode")
        names = {field.name for field in dataclasses.fields(EncodeOptions)}
        options = EncodeOptions(**{k: v for k, v in vars(args).items() if k in names})
        loop.use_compilation_cache()
        since = time.perf_counter()
        manifest = encode(config, options)
    except UserError as error:
        return loop.leave(2, f"error: {error}")
    except KeyboardInterrupt:
        return loop.leave(130, f"stopped; the same command goes on in {args.out}")
    if jax.process_index() == 0:
        print(
            f"train.encode: {manifest['videos']} videos, {manifest['keyframes']} keyframes, "
            f"{manifest['broken']} broken, in {args.out} after {time.perf_counter() - since:.0f} s"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.encode",
        description=__doc__.splitlines()[0],
        epilog="Fields of the config can be overridden: --data.path, --tokenizer, --frame-size, "
        "--num-keyframes (most per video), --batch-size (keyframes per call of each process), "
        "--data.num-workers. `--config FILE --help-config` lists them all.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, help="config of a language model, such as configs/shapes_ar.py")
    add("--out", required=True, type=pathlib.Path, help="folder of the cache")
    add("--limit", type=loop.positive, metavar="N", help="encode the first N videos only")
    add("--shard-size", type=loop.positive, default=256, metavar="N", help="videos per shard")
    add(
        "--split",
        choices=("all", "train", "validation"),
        help="default: all; of the synthetic world train, so that its captions stay held out",
    )
    add("--retry-broken", action="store_true", help="encode shards with broken videos again")
    add("--help-config", action="store_true", help="list the fields of the config")
    distributed.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())

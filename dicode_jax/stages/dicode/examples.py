"""Examples for the language model: a caption as ids, and a video as keyframes or deep tokens.

They come from videos, whose keyframes the step encodes, or from a token cache, which was encoded
before. A cache also gives packed rows of several videos (`packing`).

Letters: l text ids, k keyframes, n deep tokens of a keyframe, z their width.
"""

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np

from dicode_jax import config as config_lib
from dicode_jax.data.clips import read_keyframes
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.records import ClipSource, Record, in_validation, name_hash
from dicode_jax.data.rows import plan_rows
from dicode_jax.data.sources.open import kind_of, open_source
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.stages.dicode.packing import pack_row, video_length
from dicode_jax.storage import weights
from dicode_jax.text.gpt import TextTokenizer

if TYPE_CHECKING:
    from dicode_jax.stages.dicode.configs import ARTrainConfig

Split = Literal["train", "validation", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    """Turns the captions of a video into ids of a fixed length.

    Attributes:
      tokenizer: Text to ids.
      length: Ids per video, `l`.
      dropout: Share of the videos that get the empty prompt.
      choose: Any of several captions, by chance; False takes the first.
    """

    tokenizer: TextTokenizer
    length: int
    dropout: float = 0.0
    choose: bool = True

    def __call__(self, name: str, captions: tuple[str, ...], rng: np.random.Generator):
        """Text ids int32 [l]; a video without captions has the empty prompt.

        Raises:
          UserError: The vocabulary cannot spell the caption; the video is named.
        """
        drop, pick = rng.uniform(size=2)  # always two, so that what is drawn next stays the same
        caption = captions[int(pick * len(captions)) if self.choose else 0] if captions else ""
        try:
            encoded = self.tokenizer.encode("" if drop < self.dropout else caption, self.length)
        except UserError as error:
            raise UserError(f"the caption of {name}: {error}") from error
        if encoded.truncated:  # always in the same words, so that it is said once
            warnings.warn(
                f"captions of more than {self.length} tokens are cut there (text_length)",
                stacklevel=2,
            )
        return encoded.ids[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoExamples:
    """Examples whose keyframes are read from videos."""

    source: ClipSource
    captions: Captions
    data: DataConfig
    frame_size: int
    num_keyframes: int

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Name of an example."""
        return self.source.name(index)

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`text_ids` int32 [l], `keyframes` uint8 [k, h, w, 3] and `frame_mask` bool [k]."""
        record = self.source.record(index)
        text_ids = self.captions(record.name, record.captions, rng)
        frames = read_keyframes(record, self.data, self.frame_size, rng, self.num_keyframes)
        return {
            "text_ids": text_ids,
            "keyframes": frames["keyframes"],
            "frame_mask": frames["frame_mask"],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyframeReader:
    """Keyframes on their way into a token cache."""

    data: DataConfig
    frame_size: int
    num_keyframes: int

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`frames` uint8 [k, h, w, 3] without padding, and `times` float64 [k]."""
        read = read_keyframes(record, self.data, self.frame_size, rng, self.num_keyframes)
        mask = read["frame_mask"]
        return {"frames": read["keyframes"][mask], "times": read["times"][mask].astype(np.float64)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedExamples:
    """Examples of a token cache, those at `indices`.

    A video with more keyframes than `num_keyframes` gives as many in a row, from a place that
    `clip_start` says as it does for videos.
    """

    cache: EncodedCache
    indices: np.ndarray
    captions: Captions
    clip_start: str
    num_keyframes: int

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Name of an example."""
        return self.cache.names[int(self.indices[index])]

    def read(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Text ids int32 [l] and tokens bfloat16 [at most `num_keyframes`, n, z]."""
        video = self.cache[int(self.indices[index])]
        text_ids = self.captions(video.name, video.captions, rng)
        tokens = video.arrays["tokens"]
        spare = max(len(tokens) - self.num_keyframes, 0)
        place = {"start": 0, "center": spare // 2}.get(self.clip_start)
        place = int(rng.integers(spare + 1)) if place is None else place
        return text_ids, tokens[place : place + self.num_keyframes]

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`text_ids` int32 [l], `tokens` bfloat16 [k, n, z] and `frame_mask` bool [k]."""
        text_ids, tokens = self.read(index, rng)
        padded = np.zeros((self.num_keyframes, *tokens.shape[1:]), tokens.dtype)
        padded[: len(tokens)] = tokens
        mask = np.arange(self.num_keyframes) < len(tokens)
        return {"text_ids": text_ids, "tokens": padded, "frame_mask": mask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedExamples:
    """Rows of several cached videos; which go together is settled once."""

    videos: CachedExamples
    row_length: int
    max_frames: int
    num_tokens: int
    image_id: int
    seed: int

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def _rows(self) -> list[np.ndarray]:
        held = self.videos.cache.lengths("tokens")[self.videos.indices]
        lengths = video_length(
            np.minimum(held, self.videos.num_keyframes),
            text_length=self.videos.captions.length,
            num_tokens=self.num_tokens,
        )
        return plan_rows(lengths, self.row_length, seed=self.seed)

    def name(self, index: int) -> str:
        """Names of all videos of a row."""
        return " + ".join(map(self.videos.name, self._rows[index]))

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A row as `packing.pack_row` describes it."""
        texts, tokens = zip(*(self.videos.read(i, rng) for i in self._rows[index]), strict=True)
        return pack_row(
            texts,
            tokens,
            row_length=self.row_length,
            max_frames=self.max_frames,
            image_id=self.image_id,
            pad_id=self.videos.captions.tokenizer.pad_id,
        )


Examples = VideoExamples | CachedExamples | PackedExamples


def open_examples(
    config: "ARTrainConfig", tokenizer: TextTokenizer, *, split: Split = "train"
) -> Examples:
    """The examples that a config describes.

    The train split drops captions and chooses among several; the others take the first one always.

    Args:
      config: Data, lengths, `caption_dropout` and `packed`; with a `tokenizer`, a cache must be of
        it.
      tokenizer: Of the text.
      split: As in `data.sources.open_source`; a cache is split by the names of its videos, also
        one of the synthetic world.

    Raises:
      UserError: The data cannot be opened, do not fit the model, or cannot be packed.
    """
    if config.num_keyframes > config.model.max_keyframes:
        raise UserError(
            f"num_keyframes is {config.num_keyframes}, the model knows "
            f"{config.model.max_keyframes} (model.max_keyframes)"
        )
    train = split == "train"
    captions = Captions(
        tokenizer=tokenizer,
        length=config.text_length,
        dropout=config.caption_dropout if train else 0.0,
        choose=train,
    )
    if kind_of(config.data) != "cache":
        if config.packed:
            raise UserError(
                "packed rows need to know how long the videos are: encode them first "
                "(python -m train.encode) and give the cache as --data.path"
            )
        return VideoExamples(
            source=open_source(config.data, split=split, seed=config.seed),
            captions=captions,
            data=config.data,
            frame_size=config.frame_size,
            num_keyframes=config.num_keyframes,
        )
    cache = _open_cache(config)
    # A scene does what its caption says from its first keyframe on.
    is_world = cache.setting("data.path") == "shapes"
    videos = CachedExamples(
        cache=cache,
        indices=_split_indices(cache, config.data.validation, split),
        captions=captions,
        clip_start="start" if is_world else config.data.clip_start,
        num_keyframes=config.num_keyframes,
    )
    if not config.packed:
        return videos
    return PackedExamples(
        videos=videos,
        row_length=config.packed_length,
        max_frames=config.packed_keyframes,
        num_tokens=config.model.num_tokens,
        image_id=config.model.image_token_id,
        seed=config.seed,
    )


def _open_cache(config: "ARTrainConfig") -> EncodedCache:
    cache = EncodedCache.shared(config.data.path)
    wanted = (config.model.num_tokens, config.model.token_dim)
    spec = cache.schema.get("tokens")
    if spec is None or spec.shape[1:] != wanted:
        held = (
            f"{spec.shape[1]} tokens of width {spec.shape[2]} per keyframe" if spec else "no tokens"
        )
        raise UserError(
            f"the cache {cache.folder} holds {held}, the model reads {wanted[0]} of width "
            f"{wanted[1]}"
        )
    if config.tokenizer is None:
        return cache
    folder = config.tokenizer_folder / "tokenizer"
    now, then = weights.hash_module(folder), str(cache.manifest.get("encoder"))
    if now != then:
        raise UserError(
            f"the cache {cache.folder} was made with another tokenizer than {folder} now holds "
            f"({then[:12]}, not {now[:12]}): encode the data again (train.encode --out NEW), or "
            "name the tokenizer that it was made with"
        )
    resize = config_lib.from_json(DeepTokenizerConfig, folder / weights.CONFIG_FILE).resize
    held = cache.setting("data.resize")
    if resize not in (None, held):
        raise UserError(
            f"the cache {cache.folder} is of frames read by {held!r}, the tokenizer in "
            f"{config.tokenizer} reads by {resize!r}; run train.encode again"
        )
    return cache


def _split_indices(cache: EncodedCache, share: float, split: Split) -> np.ndarray:
    everything = np.arange(len(cache))
    if split == "all" or (split == "train" and share == 0):
        return everything
    held_out = in_validation(np.array([name_hash(n) for n in cache.names], np.uint64), share)
    chosen = everything[held_out if split == "validation" else ~held_out]
    if split == "train" and not len(chosen):
        raise UserError(f"all of the cache {cache.folder} is held out; lower data.validation")
    return chosen

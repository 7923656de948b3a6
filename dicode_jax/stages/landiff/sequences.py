"""Rows of sequences that LanDiff's language model learns: one to a row, or several packed.

A sequence is that of `models.landiff.language_model`: BOS, two numbers, the text without padding,
and the frames between their marks. Alone in a row it stands as `LanguageModel.lay_out` makes it;
packed, it sees itself alone and counts its positions from its own start.

Letters: t positions of a row, s sequences of a row, l text tokens, e width of a text feature.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dicode_jax.data.encoded_cache import EncodedCache, Example
from dicode_jax.data.rows import plan_rows
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.language_model import (
    CODE,
    NO_TOKEN,
    NUM_PREFIX,
    LanguageModelConfig,
)
from dicode_jax.stages.landiff.cached import open_cache, span_motion, split_videos
from dicode_jax.stages.landiff.generation_config import LMTrainConfig
from dicode_jax.text.t5 import T5Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """One sequence.

    Attributes:
      text: Ids int32 [l], or features [l, e].
      codes: Semantic tokens [n], of whole segments but for the last.
      num_frames: Semantic frames.
      motion_score: How much moves.
      given: Frames that are seen and not learned.
    """

    text: np.ndarray
    codes: np.ndarray
    num_frames: int
    motion_score: float
    given: int = 0


def lay_row(
    cfg: LanguageModelConfig,
    sequences: Sequence[Learned],
    *,
    row_length: int,
    row_samples: int,
    text_length: int,
) -> dict[str, np.ndarray]:
    """Lays sequences out one behind the other.

    Returns:
      `tokens` int32 [t], `NO_TOKEN` where none stands; `features` int32 [t]: -1, or which of the
      row's 2 s numbers and, behind them, s l text tokens stands there; `positions` int32 [t] inside
      a sequence; `segment_ids` int32 [t], the number of the sequence from 1 on; `is_learned` bool
      [t]; `numbers` float32 [s, 2], frames and motion score; `text` [s, l] or [s, l, e];
      `text_valid` bool [s, l].

    Raises:
      ValueError: The sequences need more room.
    """
    first = sequences[0].text
    row = {
        "tokens": np.full(row_length, NO_TOKEN, np.int32),
        "features": np.full(row_length, -1, np.int32),
        "positions": np.zeros(row_length, np.int32),
        "segment_ids": np.zeros(row_length, np.int32),
        "is_learned": np.zeros(row_length, bool),
        "numbers": np.zeros((row_samples, 2), np.float32),
        "text": np.zeros((row_samples, text_length, *first.shape[1:]), first.dtype),
        "text_valid": np.ones((row_samples, text_length), bool),  # of what is not there too
    }
    start = 0
    for i, sequence in enumerate(sequences):
        length, begin = len(sequence.text), NUM_PREFIX + len(sequence.text)
        tokens = np.append(cfg.layout(sequence.num_frames), cfg.mark("eos"))
        end = start + begin + len(tokens)
        if end > row_length or i >= row_samples or length > text_length:
            raise ValueError(
                f"{i + 1} sequences need {end} positions, the last one {length} text tokens; the "
                f"row has {row_length}, for {row_samples} sequences of {text_length} text tokens"
            )
        tokens[tokens == CODE] = sequence.codes
        here = slice(start, end)
        given = len(cfg.layout(sequence.given)) if sequence.given else 0
        row["tokens"][start], row["tokens"][start + begin : end] = cfg.mark("bos"), tokens
        row["is_learned"][start + begin + given : end] = True
        row["features"][start + 1 : start + NUM_PREFIX] = 2 * i + np.arange(2)
        text_at = 2 * row_samples + i * text_length + np.arange(length)
        row["features"][start + NUM_PREFIX : start + begin] = text_at
        row["positions"][here] = np.arange(end - start)
        row["segment_ids"][here] = i + 1
        row["numbers"][i] = sequence.num_frames, sequence.motion_score
        row["text"][i, :length] = sequence.text
        row["text_valid"][i] = np.arange(text_length) < length
        start = end
    return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Examples of the language model, from the videos of a cache.

    Attributes:
      config: Settled: sizes, shares and how rows are made.
      words: Makes ids of captions; None reads `lm_text`.
      videos: Numbers of the videos.
      is_train: Cuts, begins late and chooses among captions by chance; the whole beginning and the
        first caption otherwise.
    """

    config: LMTrainConfig
    cache: EncodedCache
    words: T5Tokenizer | None
    videos: np.ndarray
    is_train: bool

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def _rows(self) -> Sequence[Any]:
        if self.config.row_samples == 1:
            return [[i] for i in range(len(self.videos))]
        cfg, most = self.config.model.frames, self.config.num_frames
        codes = self.cache.lengths("codes")[self.videos]
        text = np.full(len(codes), self.config.text_length)
        if self.words is None:
            text = np.minimum(self.cache.lengths("lm_text")[self.videos], text)
        frames = [min(cfg.num_frames(int(n)), most) for n in codes]
        behind = [cfg.count(f) + 2 * f + 1 for f in frames]
        lengths = NUM_PREFIX + text + np.asarray(behind, int)
        options: dict[str, Any] = {"seed": self.config.seed, "most": self.config.row_samples}
        return plan_rows(lengths, self.config.positions, **options)

    def name(self, index: int) -> str:
        """Names of all videos of a row."""
        return " + ".join(self.cache.names[int(self.videos[i])] for i in self._rows[index])

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A row as `lay_row` describes it."""
        config = self.config
        return lay_row(
            config.model,
            [self.read(int(i), rng) for i in self._rows[index]],
            row_length=config.positions,
            row_samples=config.row_samples,
            text_length=config.text_length,
        )

    def read(self, index: int, rng: np.random.Generator) -> Learned:
        """A sequence of a video: from its start, or from the start of a later segment.

        Raises:
          UserError: The codebook is larger than the model's, or a caption cannot be spelled.
        """
        config, cfg = self.config, self.config.model
        late, cut, place, choice = rng.uniform(size=4)  # always four
        video = self.cache[int(self.videos[index])]
        codes, segment = video.arrays["codes"].astype(np.int32), cfg.frames.segment
        if codes.size and (codes.min() < 0 or codes.max() >= cfg.codebook_size):
            raise UserError(
                f"{video.name} has codes of a larger codebook than the model's of "
                f"{cfg.codebook_size}: encode the videos with the tokenizer that it is for"
            )
        held, most = cfg.frames.num_frames(len(codes)), config.num_frames
        frames, first, spare = min(held, most), 0, (held - most) // segment
        is_late = self.is_train and late < config.late_share and spare > 0
        if is_late:
            first = segment * (1 + int(place * spare))
        elif self.is_train and cut < config.cut_share:
            frames = 1 + int(place * frames)
        start = cfg.frames.count(first) if first else 0
        return Learned(
            text=self._text(video, choice if self.is_train else 0.0),
            codes=codes[start : start + cfg.frames.count(frames)],
            num_frames=frames,
            motion_score=config.motion_scale
            * span_motion(video.arrays["motion"], first, first + frames),
            given=segment if is_late else 0,
        )

    def _text(self, video: Example, choice: float) -> np.ndarray:
        length = self.config.text_length
        if self.words is None:
            text = video.arrays["lm_text"]
            if len(text) <= length:
                return text
            self._say_cut()
            return np.concatenate([text[: length - 1], text[-1:]])  # with the end of text
        captions = video.captions or ("",)
        caption = captions[int(choice * len(captions))]
        try:
            ids = self.words(caption, length)
            left_out = len(ids) == length and self.words.left_out(caption, length)[0]
        except UserError as error:
            raise UserError(f"the caption of {video.name}: {error}") from error
        if left_out:
            self._say_cut()
        return ids

    def _say_cut(self):
        """Always in the same words, so that it is said once."""
        length = self.config.text_length
        warnings.warn(f"captions of more than {length} ids are cut there", stacklevel=3)


def open_rows(
    config: LMTrainConfig, words: T5Tokenizer | None, split: Literal["train", "validation"]
) -> Rows:
    """The rows of a split of the cache that a config names.

    Raises:
      UserError: It is no cache of this model's codes, or has no video for the training.
    """
    needs = ("codes", "motion", *(("lm_text",) if words is None else ()))
    cache = open_cache(config.data, needs, tokenizer=config.semantic_tokenizer)
    videos = split_videos(cache, config.data.validation, split)
    if split == "train" and not len(videos):
        raise UserError(f"all of the cache {cache.folder} is held out; lower data.validation")
    return Rows(config=config, cache=cache, words=words, videos=videos, is_train=split == "train")


def batch_shapes(config: LMTrainConfig) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Shapes and types of a row."""
    t, s, length = config.positions, config.row_samples, config.text_length
    text = ((s, length), "int32")
    if config.text is None:
        text = ((s, length, config.model.text_dim), "bfloat16")
    return {
        **dict.fromkeys(("tokens", "features", "positions", "segment_ids"), ((t,), "int32")),
        "is_learned": ((t,), "bool"),
        "numbers": ((s, 2), "float32"),
        "text": text,
        "text_valid": ((s, length), "bool"),
    }

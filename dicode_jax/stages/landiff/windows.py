"""Windows that LanDiff's denoiser learns: latents, the codes of their semantic frames, and text.

A window of a later part of a video begins with a latent that stands for four frames, as latents
that a stream carries on do; the first of a video stands for one.

Letters: f latents of a window, h w c their rows, columns and channels, m segments that it touches,
n tokens of a segment, l text tokens.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dicode_jax.data.encoded_cache import EncodedCache, Example
from dicode_jax.errors import UserError
from dicode_jax.stages.landiff.cached import open_cache, split_videos
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig
from dicode_jax.text.t5 import T5Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Examples of the denoiser, from the videos of a cache.

    Attributes:
      config: Settled.
      words: Makes ids of captions; None reads `dit_text`.
      places: Number of a window's video and its first latent, `[n, 2]`.
      is_train: Chooses among captions by chance; False takes the first.
    """

    config: DiffusionTrainConfig
    cache: EncodedCache
    words: T5Tokenizer | None
    places: np.ndarray
    is_train: bool

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """Name of the video, and the window's first latent."""
        video, start = map(int, self.places[index])
        return f"{self.cache.names[video]} from latent {start}"

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`latents` bfloat16 [f, h, w, c], `codes` int32 [m, n] of the segments that the window and
        what it sees before it touch, `offset` int32 of its first frame in them, `text` int32 [l] or
        bfloat16 [l, e].

        Raises:
          UserError: Codes are of a larger codebook, or a caption cannot be spelled.
        """
        video, start = map(int, self.places[index])
        example, cfg = self.cache[video], self.config.semantic
        frames, segment = self.config.model.dit.num_frames, cfg.frames.segment
        past = self.config.model.upsampler.num_past
        held, first = example.arrays["codes"].astype(np.int32), max(start - past, 0) // segment
        if held.size and (held.min() < 0 or held.max() >= cfg.codebook_size):
            raise UserError(
                f"{example.name} has codes of a larger codebook than the tokenizer's of "
                f"{cfg.codebook_size}: encode the videos with the tokenizer that is named"
            )
        whole = cfg.frames.count(segment)
        codes = np.zeros(self.config.segments * whole, np.int32)  # no frame sees a later one
        known = held[first * whole :][: len(codes)]
        codes[: len(known)] = known
        return {
            "latents": example.arrays["latents"][start : start + frames],
            "codes": codes.reshape(self.config.segments, whole),
            "offset": np.asarray(start - first * segment, np.int32),
            "text": self._text(example, float(rng.uniform()) if self.is_train else 0.0),
        }

    def _text(self, example: Example, choice: float) -> np.ndarray:
        length = self.config.model.dit.text_len
        if self.words is None:
            text = example.arrays["dit_text"]
            if len(text) != length:
                raise UserError(
                    f"{example.name} has a text of {len(text)} vectors, padding included; the "
                    f"model reads {length} (model.dit.text_len)"
                )
            return text
        captions = example.captions or ("",)
        try:
            ids = self.words(captions[int(choice * len(captions))], length)
        except UserError as error:
            raise UserError(f"the caption of {example.name}: {error}") from error
        return np.pad(ids, (0, length - len(ids)), constant_values=self.words.pad_id)


def open_windows(
    config: DiffusionTrainConfig,
    words: T5Tokenizer | None,
    split: Literal["train", "validation"],
) -> Windows:
    """The windows of a split of the cache that a config names.

    Raises:
      UserError: It is no cache of these latents and codes, or holds no window for the training.
    """
    dit, needs = config.model.dit, ("codes", "latents", *(("dit_text",) if words is None else ()))
    cache = open_cache(config.data, needs, tokenizer=config.semantic_tokenizer, vae=config.vae)
    wanted = (dit.height, dit.width, dit.channels)
    if (held := cache.schema["latents"].shape[1:]) != wanted:
        raise UserError(f"the cache {cache.folder} holds latents {held}, the model's are {wanted}")
    lengths, step = cache.lengths("latents"), config.window_step
    places = [
        (v, start)
        for v in split_videos(cache, config.data.validation, split)
        for start in range(0, lengths[v] - dit.num_frames + 1, step or lengths[v])
    ]
    if split == "train" and not places:
        raise UserError(
            f"the cache {cache.folder} holds no window of {dit.num_frames} latents, or only "
            "held-out ones: encode longer videos, or more"
        )
    return Windows(
        config=config,
        cache=cache,
        words=words,
        places=np.array(places, np.int64).reshape(-1, 2),
        is_train=split == "train",
    )


def batch_shapes(config: DiffusionTrainConfig, b: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch."""
    dit, frames = config.model.dit, config.semantic.frames
    text = ((dit.text_len,), jnp.int32)
    if config.text is None:
        text = ((dit.text_len, dit.text_dim), jnp.bfloat16)
    arrays = {
        "latents": ((dit.num_frames, dit.height, dit.width, dit.channels), jnp.bfloat16),
        "codes": ((config.segments, frames.count(frames.segment)), jnp.int32),
        "offset": ((), jnp.int32),
        "text": text,
    }
    return {name: jax.ShapeDtypeStruct((b, *shape), of) for name, (shape, of) in arrays.items()}

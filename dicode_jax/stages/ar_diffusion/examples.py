"""Examples of the denoiser: the latents of a clip, and the number of its class.

They come from a cache of latents, or from videos that are encoded on the way.
"""

import dataclasses
import functools
import os
import re
from typing import Literal

import numpy as np

from dicode_jax.data.clips import read_clip
from dicode_jax.data.config import DataConfig
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.data.records import BrokenRecord, Record, in_validation, name_hash
from dicode_jax.errors import UserError, printable
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
from dicode_jax.storage import weights

LATENTS = "latents"  # as a cache calls them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """Tells the class of a video.

    Attributes:
      count: How many there are; with none, all videos are of class 0.
      names: Their names, in order, or none.
      told_by: The caption, or the folder that the video lies in.
    """

    count: int
    names: tuple[str, ...] = ()
    told_by: Literal["caption", "folder"] = "caption"

    def __call__(self, name: str, captions: tuple[str, ...]) -> np.ndarray:
        """A number, int32 of no axes.

        Raises:
          BrokenRecord: The video does not tell its class.
        """
        if not self.count:
            return np.zeros((), np.int32)
        label = captions[0] if captions else ""
        if self.told_by == "folder":
            label = os.path.basename(os.path.dirname(name))
        label = " ".join(label.casefold().split())
        found = [i for i, pattern in enumerate(self._patterns) if pattern.search(label)]
        exact = [i for i in found if self.names[i].casefold() == label]
        if not found and label.isdecimal() and len(label) < 10 and int(label) < self.count:
            found = [int(label)]
        if len(exact or found) != 1:
            what = "several classes" if found else "none of the classes"
            raise BrokenRecord(
                f"{name}: its {self.told_by} {printable(label, 60)!r} names {what} of the model"
            )
        return np.asarray((exact or found)[0], np.int32)

    @functools.cached_property
    def _patterns(self) -> list[re.Pattern]:
        return [re.compile(rf"(?<!\w){re.escape(name.casefold())}(?!\w)") for name in self.names]


def classes_of(config: DiTTrainConfig) -> Classes:
    """The classes of a config."""
    return Classes(
        count=config.model.num_classes, names=config.class_names, told_by=config.class_of
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassedClips:
    """Reads clips before they are encoded."""

    data: DataConfig
    frame_size: int
    classes: Classes

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`video` uint8 [f, h, w, 3] and `classes` int32."""
        label = self.classes(record.name, record.captions)
        video = read_clip(record, self.data, self.frame_size, rng)["video"]
        return {"video": video, "classes": label}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentClips:
    """Clips of a cache of latents.

    Attributes:
      cache: The videos.
      clips: Number of a clip's video and its first frame, `[n, 2]`.
      num_frames: Of a clip.
      classes: Tells the class of a video.
      late_share: Share of the clips that begin later than `clips` says, anywhere.
      num_known: First frames of such a clip that are known; None where a batch says nothing of it.
    """

    cache: EncodedCache
    clips: np.ndarray
    num_frames: int
    classes: Classes
    late_share: float = 0.0
    num_known: int | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        """Name of the video, and the clip's first frame, behind which a late one begins."""
        video, start = map(int, self.clips[index])
        return f"{self.cache.names[video]} from {start}"

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`latents` float32 [f, l, c], `classes` int32 and, with `num_known`, `known` int32."""
        video, start = map(int, self.clips[index])
        example = self.cache[video]
        label, held = self.classes(example.name, example.captions), example.arrays[LATENTS]
        last = len(held) - self.num_frames
        is_late = self.late_share > 0 and last > start and rng.uniform() < self.late_share
        if is_late:
            start = int(rng.integers(start + 1, last + 1))
        read = {"latents": held[start : start + self.num_frames], "classes": label}
        if self.num_known is not None:
            read["known"] = np.asarray(self.num_known if is_late else 0, np.int32)
        return read


def open_latents(config: DiTTrainConfig, split: Literal["train", "validation"]) -> LatentClips:
    """The clips of a cache, all that start a multiple of `clip_step` after the first frame.

    With `late_share` one of each video, at its first frame, or in training later by that chance.

    Raises:
      UserError: The cache holds no latents of this model, those of another VAE, or no clip, or no
        late one where there are to be some.
    """
    cache = EncodedCache.shared(config.data.path)
    dit, spec = config.model.dit, cache.schema.get(LATENTS)
    if spec is None or spec.shape[1:] != (dit.num_tokens, dit.channels):
        held = "no latents"
        if spec is not None and len(spec.shape) == 3:
            held = f"{spec.shape[1]} tokens of {spec.shape[2]} numbers for a frame"
        raise UserError(
            f"the cache {cache.folder} holds {held}, the model makes {dit.num_tokens} of "
            f"{dit.channels}"
        )
    if config.vae is not None:
        now, then = weights.hash_module(config.vae), str(cache.manifest.get("encoder"))
        if now != then:
            raise UserError(
                f"the cache {cache.folder} was made with another VAE than {config.vae} now holds "
                f"({printable(then[:12])}, not {now[:12]}): encode the data again (train.encode "
                "--out NEW), or name the VAE that it was made with"
            )
    videos, share = np.arange(len(cache)), config.data.validation
    if share or split == "validation":
        held_out = in_validation(np.array([name_hash(n) for n in cache.names], np.uint64), share)
        videos = videos[held_out if split == "validation" else ~held_out]
    fixed = spec.shape[0]
    lengths = cache.lengths(LATENTS) if fixed is None else np.full(len(cache), fixed)
    f = config.data.num_frames
    step = lengths.max() if config.late_share else config.clip_step
    clips = [(v, s) for v in videos for s in range(0, lengths[v] - f + 1, step)]
    if split == "train" and not clips:
        what = f"no video of {f} frames" if share == 0 or len(videos) else "only held-out videos"
        raise UserError(f"the cache {cache.folder} has {what}: encode longer ones, or more")
    is_late = bool(config.late_share) and split == "train"
    if is_late and max(lengths[v] for v, _ in clips) == f:
        raise UserError(
            f"the videos of the cache {cache.folder} have {f} frames, which is one clip: "
            "late_share wants longer ones"
        )
    return LatentClips(
        cache=cache,
        clips=np.array(clips, np.int64).reshape(-1, 2),
        num_frames=f,
        classes=classes_of(config),
        late_share=config.late_share if is_late else 0.0,
        num_known=config.num_known if config.late_share else None,
    )

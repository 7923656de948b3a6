"""How well videos show their prompts, by CLIP: similarities of frames and texts.

CLIPSIM (Wu et al., GODIVA, arXiv 2104.14806) is the cosine of the embeddings of a frame and of the
prompt, mean over frames. Numbers of different CLIPs, of which there are many, cannot be compared.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image

from dicode_jax.errors import UserError
from dicode_jax.evaluation.intervals import Interval, interval
from dicode_jax.evaluation.report import Plot
from dicode_jax.media.transforms import CLIP_MEAN, CLIP_STD
from dicode_jax.models.clip import CLIP, CLIPConfig
from dicode_jax.storage import weights
from dicode_jax.text.clip import TOKENIZER_FILE, ClipTokenizer, installed_vocabulary

AT_ONCE = 16  # frames in one call of a tower
NOTES = {
    "CLIPSIM": "cosine of CLIP's embeddings of a frame and of the prompt (Wu et al., 2021), mean "
    "over frames; the interval is of the videos",
    "CLIP score": "100 times the same, and 0 for frames below 0, as torchmetrics has it (Hessel et "
    "al., 2021, take 2.5 times)",
    "CLIPSIM of another prompt": "the same of each video with the next other prompt: what videos "
    "that show something else would have",
    "prompts told apart": "share of videos that are nearer to their prompt than to that other one",
    "frame consistency": "cosine of the embeddings of neighbouring frames, mean of a video",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Towers:
    """Both towers of a CLIP.

    Attributes:
      digest: Of the weights.
      images: Frames [f, h, w, 3] -> embeddings [f, e] of length 1.
      texts: Prompts -> embeddings [b, e] of length 1.
    """

    digest: str
    images: Callable[[UInt8[np.ndarray, "f h w 3"]], Float[np.ndarray, "f e"]]
    texts: Callable[[Sequence[str]], Float[np.ndarray, "b e"]]


def load(folder: str | os.PathLike) -> Towers:
    """CLIP that `convert open_clip` wrote, with its vocabulary.

    The vocabulary is `text/tokenizer.json` or `tokenizer.json` of the folder, or that of an
    installed `open_clip_torch`.

    Raises:
      UserError: The folder holds no CLIP with both towers, or there is no vocabulary.
    """
    folder = pathlib.Path(folder)
    model, cfg = weights.load_module(folder, CLIP, CLIPConfig)
    size, ids = cfg.text.vocab_size, _vocabulary(folder, cfg.text.vocab_size)
    tokenizer = ClipTokenizer.from_file(ids, size)
    graph, state = nnx.split(model)
    look = jax.jit(lambda state, x: nnx.merge(graph, state).encode_image(x))
    read = jax.jit(lambda state, x: nnx.merge(graph, state).encode_text(x))

    def images(frames: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(frames), AT_ONCE):
            part = preprocessed(frames[start : start + AT_ONCE], cfg.vision.image_size)
            full = np.concatenate([part, np.repeat(part[-1:], AT_ONCE - len(part), 0)])
            found.append(np.asarray(look(state, full), np.float64)[: len(part)])
        return np.concatenate(found)

    def texts(prompts: Sequence[str]) -> np.ndarray:
        rows = [read(state, tokenizer([prompt], cfg.text.max_seq_len)) for prompt in prompts]
        return np.concatenate([np.asarray(row, np.float64) for row in rows])

    with open(folder / weights.WEIGHTS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return Towers(digest=digest, images=images, texts=texts)


def _vocabulary(folder: pathlib.Path, size: int) -> pathlib.Path:
    places = [folder / "text" / TOKENIZER_FILE, folder / TOKENIZER_FILE]
    if (found := installed_vocabulary(size)) is not None:
        places.append(found)
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"{folder} has no vocabulary, and CLIP reads no prompt without: put its {TOKENIZER_FILE} "
        "into it, or install open_clip_torch"
    )


def preprocessed(
    frames: UInt8[np.ndarray, "f h w 3"], size: int
) -> Float[np.ndarray, "f size size 3"]:
    """What OpenCLIP's image tower takes: middle squares, bicubic with antialiasing, normalised."""
    h, w = frames.shape[1:3]
    side = min(h, w)
    left, top = (w - side) / 2, (h - side) / 2
    box = (left, top, left + side, top + side)
    resized = [
        Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box)
        for frame in frames
    ]
    pixels = np.stack([np.asarray(image, np.float32) for image in resized]) / 255
    return (pixels - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)


def others(prompts: Sequence[str]) -> list[int | None]:
    """For each prompt the number of the next one that is another; None where all are the same."""
    count, next_other = len(prompts), None
    found: list[int | None] = [None] * count
    for i in reversed(range(2 * count)):  # twice round, so that the last ones see the first
        if prompts[i % count] != prompts[(i + 1) % count]:
            next_other = (i + 1) % count
        if i < count:
            found[i] = next_other
    return found


def measured(
    frames: Float[np.ndarray, "f e"],
    text: Float[np.ndarray, " e"],
    other: Float[np.ndarray, " e"] | None,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Cosines of a video's frames, by embeddings of length 1: with its prompt, another, the next.

    Args:
      other: Of another prompt, if there is one.
    """
    found = {"clipsim": frames @ text, "consistency": (frames[1:] * frames[:-1]).sum(axis=1)}
    return found if other is None else found | {"other": frames @ other}


def summary(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Interval]:
    """Means over videos of rows of `measured`, with their intervals."""
    found = {
        "CLIPSIM": interval(float(row["clipsim"].mean()) for row in rows),
        "CLIP score": interval(float(100 * np.maximum(row["clipsim"], 0).mean()) for row in rows),
    }
    if all("other" in row for row in rows):
        found["CLIPSIM of another prompt"] = interval(float(r["other"].mean()) for r in rows)
        found["prompts told apart"] = interval(
            bool(row["clipsim"].mean() > row["other"].mean()) for row in rows
        )
    if all(len(row["consistency"]) for row in rows):
        found["frame consistency"] = interval(float(r["consistency"].mean()) for r in rows)
    return found


def plots(rows: Sequence[Mapping[str, np.ndarray]]) -> list[Plot]:
    """Similarity by the place of a frame in its video, as far as all videos go."""
    length = min(len(row["clipsim"]) for row in rows)
    named = {"with its prompt": "clipsim", "with another prompt": "other"}
    lines = {
        label: [interval(float(row[name][i]) for row in rows) for i in range(length)]
        for label, name in named.items()
        if all(name in row for row in rows)
    }
    return [
        Plot(
            name="clipsim_by_place",
            title="CLIPSIM by the place of a frame in its video",
            x_label="frame",
            y_label="cosine",
            x=list(range(length)),
            lines=lines,
        )
    ]

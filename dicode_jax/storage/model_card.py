"""What a model folder holds, read from file headers alone, and the model card made from it.

The header of converted weights says where they come from (`weights.read_metadata`): `origin` (keys
of `LICENCES`, with commas between), `converter` (command and version) and `sources` (JSON: file
name -> SHA-256).
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, printable
from dicode_jax.storage import weights
from dicode_jax.storage.files import atomic_path

__all__ = ["LICENCES", "Part", "inspect", "licence_notes", "render", "write"]

CARD_FILE = "README.md"

LICENCES = {
    "dicode": "DiCoDe: the authors' repository states no licence; ask them before sharing these",
    "dynamicrafter": "DynamiCrafter: code Apache-2.0; the weights as their own model card says",
    "open_clip": "OpenCLIP ViT-H/14 of LAION: MIT",
    "i3d": "I3D: code Apache-2.0 (kinetics-i3d and its port); the weights as their own page says",
    "inception": "Inception-v3 of TensorFlow: Apache-2.0, and so is pytorch-fid's port",
    "gpt2": "GPT-2: MIT, with a clause on crediting its output",
    "llama": "Llama 3.2: Community License; what is shared must say 'Built with Llama'",
    "ar_diffusion": "AR-Diffusion: as the authors' repository says; ask them before sharing these",
    "landiff": "LanDiff: as the authors' repository says; ask them before sharing these",
    "cogvideox": "CogVideoX-2b: Apache-2.0, as its authors' repository says",
    "t5": "T5 v1.1 and flan-T5: Apache-2.0",
    "theia": "Theia: as its own model card says; ask its authors before sharing these",
    "divot": "Divot: Apache-2.0 'for academic purpose only', third-party components apart",
}
"""Origin of weights -> what is known of their licence."""

MAX_ORIGINS = 20
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One module of a model folder.

    Attributes:
      name: Of its sub-folder.
      num_parameters: Numbers it holds.
      dtypes: Storage types, the most frequent first.
      num_bytes: Size of the numbers in the file.
      metadata: See the module's text, as lines; empty for weights that were trained here.
    """

    name: str
    num_parameters: int
    dtypes: tuple[str, ...]
    num_bytes: int
    metadata: Mapping[str, str]

    @property
    def origins(self) -> tuple[str, ...]:
        """Where the weights come from, keys of `LICENCES`; empty when they were trained here."""
        named = filter(None, self.metadata.get("origin", "").split(","))
        return tuple(printable(name, 60) for name in itertools.islice(named, MAX_ORIGINS))

    @property
    def sources(self) -> dict[str, str]:
        """File that was converted -> its SHA-256; names and digests are lines."""
        found = weights.read_sources(self.metadata)
        return {printable(file, 200): printable(digest, 100) for file, digest in found.items()}


def inspect(folder: str | os.PathLike) -> list[Part]:
    """The parts of a model folder, in the order of their names; one for a folder of one module.

    Raises:
      UserError: There is none, or a file is broken.
    """
    folder = pathlib.Path(folder)
    found = sorted(folder.glob(f"*/{weights.WEIGHTS_FILE}"))
    if (folder / weights.WEIGHTS_FILE).is_file():
        found.append(folder / weights.WEIGHTS_FILE)
    if not found:
        raise UserError(f"{folder} is not a model: it holds no weights")
    return [_inspect(path) for path in found]


def _inspect(path: pathlib.Path) -> Part:
    arrays, header = weights.read_header(path)
    counts: dict[str, int] = {}
    for kind, shape in arrays.values():
        counts[kind] = counts.get(kind, 0) + math.prod(shape)
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)
    return Part(
        name=printable(path.parent.name, 100),
        num_parameters=sum(counts.values()),
        dtypes=tuple(_TYPES.get(kind, kind.lower()) for kind in ordered),
        num_bytes=path.stat().st_size,
        metadata={
            printable(key, 100): value if key == "sources" else printable(value, 200)
            for key, value in header.items()
            if key != "format"
        },
    )


def licence_notes(parts: list[Part]) -> list[str]:
    """One line for each origin among the parts, none for what was trained here."""
    origins = {origin for part in parts for origin in part.origins}
    return [LICENCES.get(o, f"{o!r}: licence not recorded") for o in sorted(origins)]


def write(
    folder: str | os.PathLike, *, name: str | None = None, overwrite: bool = False
) -> pathlib.Path:
    """Writes the card of a model folder to its README.md; one that is there is kept.

    Args:
      name: What the model is called where it is shared, `owner/name`.
      overwrite: Replace a card that is there.
    """
    path = pathlib.Path(folder) / CARD_FILE
    if overwrite or not path.exists():
        card = render(folder, name=name)
        with atomic_path(path) as temporary:
            temporary.write_text(card, encoding="utf-8")
    return path


def render(folder: str | os.PathLike, *, name: str | None = None) -> str:
    """The card of a model folder as Markdown: what it is, parts, sources, licences, how to use.

    Raises:
      UserError: The folder holds no weights, or a file is broken.
    """
    from huggingface_hub import ModelCardData

    folder = pathlib.Path(folder)
    name = printable(name or folder.resolve().name, 200)
    parts = inspect(folder)
    notes = licence_notes(parts)
    what, tag, usage = _USES.get(_kind(folder) or "", _DICODE)
    total = sum(part.num_parameters for part in parts)
    header = ModelCardData(
        library_name="dicode_jax",
        pipeline_tag=tag,
        license="other" if notes else "apache-2.0",
        tags=["jax", "flax", "video-generation"],
    )
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# {_plain(name)}",
        "",
        f"{what} {total:,} parameters.",
        "",
        "## Use",
        "",
        "```python",
        *usage.format(name=json.dumps(name, ensure_ascii=False)).strip().splitlines(),
        "```",
        "",
        "## Parts",
        "",
        "| Part | Parameters | Stored as |",
        "|---|---:|---|",
        *(f"| {_plain(p.name)} | {p.num_parameters:,} | {', '.join(p.dtypes)} |" for p in parts),
        "",
        "## Sources and licences",
        "",
    ]
    lines += [f"- {_plain(note)}" for note in notes] or [
        "The weights were trained with dicode_jax."
    ]
    sources = _sources(parts)
    if sources:
        lines += ["", "| File | SHA-256 |", "|---|---|"]
        plain = {_plain(file): re.sub(r"\W", "?", digest) for file, digest in sources.items()}
        lines += [f"| {file} | `{digest}` |" for file, digest in plain.items()]
    return "\n".join(lines) + "\n"


def _plain(line: str) -> str:
    """A line that Markdown shows as it is: no link, no HTML, no further cell of a table."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", line)


def _kind(folder: pathlib.Path) -> str | None:
    """What the config says; a folder of parts, which are no pipeline yet, has none."""
    path = folder / weights.CONFIG_FILE
    return config_lib.read_json(path)[0] if path.is_file() else None


def _sources(parts: list[Part]) -> dict[str, str]:
    """All files that were converted; parts may share them."""
    return {file: digest for part in parts for file, digest in sorted(part.sources.items())}


_DICODE = (
    "Text to video through compressed deep tokens (DiCoDe, arXiv 2412.04446), in JAX and Flax NNX.",
    "text-to-video",
    """
import dicode_jax

pipe = dicode_jax.load({name})
pipe("a dog runs on the beach", num_clips=2, seed=0).save("dog.mp4")
""",
)
_DYNAMICRAFTER = (
    "Image to video with latent diffusion (DynamiCrafter, arXiv 2310.12190), in JAX and Flax NNX.",
    "image-to-video",
    """
import dicode_jax

pipe = dicode_jax.load({name})
pipe("waves roll in", image="beach.jpg", seed=0).save("waves.mp4")
""",
)
_DIVOT = (
    "De-tokenizer of Divot (arXiv 2412.04432): features to clips, in JAX and Flax NNX.",
    "other",
    """
import dicode_jax

decoder = dicode_jax.load({name})
video = decoder(features, null_features=null_features, seed=0)  # features: of Divot's tokenizer
""",
)
_LANDIFF = (
    "Text to video through semantic tokens (LanDiff, arXiv 2503.04606), in JAX and Flax NNX.",
    "text-to-video",
    """
import dicode_jax

pipe = dicode_jax.load({name}, dtype="auto")
video = pipe("a dog runs on the beach", num_clips=2, seed=0)  # uint8 [1, frames, h, w, 3]
""",
)
_USES = {
    "dicode": _DICODE,
    "dynamicrafter": _DYNAMICRAFTER,
    "divot": _DIVOT,
    "landiff": _LANDIFF,
}

"""The release of LanDiff, to a folder that `LanDiffPipeline` loads: what writes and what paints.

    python -m convert landiff LanDiff --flan-t5 flan-t5-xxl --out models/landiff [--theia DIR]

SOURCE is the release's folder as it is. flan-T5 XXL, the language model's text encoder, and Theia
are not in it: both are published by their own names. Theia is needed to begin from a video, and
for nothing else. A release without its painter gives the language side alone, and a note.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.engine import command
from convert.engine.plan import below
from convert.engine.rules import to_numpy
from convert.engine.sources import Source, open_source
from convert.engine.yaml import reading, typed
from convert.landiff import dit, language_model, semantic_tokenizer, theia, vae
from convert.parts import hugging_face, t5
from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines.landiff_config import LanDiffConfig
from dicode_jax.storage.files import atomic_path, read_small
from dicode_jax.text.t5 import T5Tokenizer

ORIGIN = "landiff"
LANGUAGE_MODEL, TOKENIZER = "llm", "tokenizer"  # folders of the release
DIFFUSION, BASE = "diffusion", "CogVideoX-2b-sat"
PAINTER_TEXT = f"{BASE}/t5-v1_1-xxl"
TRANSFORMER, AUTOENCODER = f"{BASE}/transformer", f"{BASE}/vae/3d-vae.pt"
PAINTER = (DIFFUSION, TRANSFORMER, AUTOENCODER)  # what paints, besides its text encoder
PAINTER_PARTS = (*PAINTER, PAINTER_TEXT)
DEEPSPEED = "mp_rank_00_model_states.pt"
VOCABULARY = "spiece.model"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words of a T5, kept as they are published."""

    content: bytes

    def save(self, folder: pathlib.Path) -> None:
        """Writes the file into a folder."""
        with atomic_path(folder / VOCABULARY) as temporary:
            temporary.write_bytes(self.content)


def iteration(folder: pathlib.Path) -> pathlib.Path:
    """The checkpoint of DeepSpeed that `latest` in a folder names.

    Raises:
      UserError: It names none.
    """
    name = read_small(folder / "latest", 200).decode("utf-8", "replace").strip()
    if pathlib.PurePath(name).name != name or name in ("", ".."):
        raise UserError(f"{folder / 'latest'} names no folder beside it: {printable(name, 60)!r}")
    return folder / name / DEEPSPEED


def choose_tokenizer(
    alone: Mapping[str, Any], diffusion: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str | None]:
    """The tokenizer that the release paints with, and a line if it is not the one that lies alone.

    Args:
      alone: The tokenizer's own file.
      diffusion: The file of the diffusion model, which may hold a copy.
    """
    at = next((key.find(semantic_tokenizer.COPY) for key in diffusion if _is_copied(key)), None)
    if at is None:
        return alone, None
    key = next(filter(_is_copied, diffusion))
    copy = below(diffusion, key[: at + len(semantic_tokenizer.COPY)])
    other = [k for k in copy if k not in alone or not _same(copy[k], alone[k])]
    if not other:
        return copy, None
    return copy, (
        f"the diffusion model's copy of the tokenizer differs from {TOKENIZER}/ in {len(other)} of "
        f"{len(copy)} tensors ({sorted(other)[0]}); it is taken, as the release paints with it"
    )


def _is_copied(key: str) -> bool:
    return semantic_tokenizer.COPY in key


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors are equal in the narrower of their types."""
    if tuple(one.shape) != tuple(other.shape):
        return False
    left, right = to_numpy(one), to_numpy(other)
    narrow = min(left.dtype, right.dtype, key=lambda kind: kind.itemsize)
    return np.array_equal(left.astype(narrow), right.astype(narrow))


def plan_text(
    folder: pathlib.Path, words: pathlib.Path | None = None
) -> tuple[Source, command.Part, Vocabulary]:
    """A T5 in a folder of Hugging Face, and its vocabulary, which may lie in another.

    Raises:
      UserError: Something is missing, damaged or of another model.
    """
    original = hugging_face.read_config(folder)
    with reading(f"{folder / 'config.json'} is not a config of T5"):
        cfg = typed(t5.config_from_original(original))
    source, words = open_source(folder), words or folder
    if not (words / VOCABULARY).is_file():
        raise UserError(f"no {VOCABULARY} in {words}: it holds the words of the text encoder")
    T5Tokenizer.from_file(words / VOCABULARY).check_fit(cfg.vocab_size, str(folder))
    made = command.Part(t5.KIND.plan(source, cfg), cfg, "t5")
    return source, made, Vocabulary(read_small(words / VOCABULARY, 1 << 24))


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the folders that the options name.

    Raises:
      UserError: One is missing, damaged or of another model, or OUT is in the way.
    """
    if args.flan_t5 is None:
        raise UserError("flan-T5 XXL is not in the release: name its folder by --flan-t5")
    command.check_folder(args.out, overwrite=args.overwrite, sources=command.sources(args))
    root = pathlib.Path(args.source)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; want the release of LanDiff as it is")
    parts, assumed, notes, text = {}, {}, [], {}
    sources: list[Source] = []

    def add(name: str, kind, tensors, finder, origin: str) -> None:
        told = finder(tensors)
        assumed[name] = told.assumed
        parts[name] = command.Part(kind.plan(tensors, told.config), told.config, origin)

    sources.append(source := open_source(root / LANGUAGE_MODEL))
    add("language_model", language_model.KIND, source, language_model.find_config, ORIGIN)

    sources.append(alone := open_source(root / TOKENIZER))
    diffusion: Mapping[str, Any] = {}
    if (root / DIFFUSION).is_dir():
        sources.append(diffusion := open_source(iteration(root / DIFFUSION)))
    tokenizer, note = choose_tokenizer(alone, diffusion)
    notes += [note] if note else []
    kind, finder = semantic_tokenizer.KIND, semantic_tokenizer.find_config
    add("semantic_tokenizer", kind, tokenizer, finder, ORIGIN)

    settings = None
    if missing := [name for name in PAINTER_PARTS if not (root / name).exists()]:
        if not set(PAINTER) <= set(missing):
            raise UserError(
                f"{root} has not all that paints: {', '.join(missing)} is missing; get it, or take "
                "the others away to convert the language side alone"
            )
        notes.append(f"the painter is not in SOURCE: want {', '.join(missing)}")
    else:
        sources.append(main := open_source(iteration(root / TRANSFORMER)))
        add("denoiser", dit.KIND, dit.join(main, diffusion), dit.find_config, ORIGIN)
        sources.append(source := open_source(root / AUTOENCODER))
        add("vae", vae.KIND, source, vae.find_config, ORIGIN)
        settings = LanDiffConfig()  # without it the folder is parts, and no pipeline

    folders = {"text_encoder": pathlib.Path(args.flan_t5)}
    if PAINTER_TEXT not in missing:
        folders["painter_text"] = root / PAINTER_TEXT
    for name, folder in folders.items():
        source, parts[name], text[name] = plan_text(folder)
        sources.append(source)
    if args.theia is not None:
        sources.append(source := open_source(args.theia))
        add("features", theia.KIND, source, theia.find_config, "theia")
    else:
        notes.append("without --theia there is no beginning from a video: Theia is not in SOURCE")
    lines = [line for part in parts.values() for line in part.plan.problems]
    lines += [x for p in folders for x in t5.KIND.check(parts[p].plan.source, parts[p].config)]
    return command.Conversion(
        origin=ORIGIN,
        sources=sources,
        reads=command.sources(args),
        parts=parts,
        settings=settings,
        text=text,
        report={
            "assumed": assumed,
            "notes": notes,
            "parts": {name: part.plan.report() for name, part in parts.items()},
        },
        problems=lines,
        summary="\n".join([f"wrote {args.out}: {', '.join(parts)} of LanDiff", *notes]),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = command.parser(
        "convert.landiff",
        __doc__,
        source="the folder of the release",
        reads=("flan_t5", "theia"),
        dtype="bfloat16",
    )
    options.add_argument("--flan-t5", metavar="DIR", help="flan-T5 XXL of Hugging Face")
    options.add_argument("--theia", metavar="DIR", help="theia-base-patch16-224-cddsv")
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

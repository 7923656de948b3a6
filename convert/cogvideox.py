"""CogVideoX-2b as diffusers publishes it, to what the training of LanDiff's control branch reads.

    python -m convert cogvideox CogVideoX-2b --out models/cogvideox [--text-encoder]

SOURCE is the folder with `transformer`, `vae` and `scheduler`, or its name on the Hub. OUT holds
the transformer and, where SOURCE has one, the autoencoder: `python -m train.landiff_diffusion
--base OUT --vae OUT`. With --text-encoder it holds the T5 encoder and its words too, for
`python -m train.encode --dit-text OUT`. CogVideoX-5b and 1.5 are other models and are refused.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from convert.engine import command
from convert.engine.sources import Source, open_source
from convert.engine.yaml import reading, typed
from convert.landiff import cogvideox
from convert.landiff.command import VOCABULARY, plan_text
from convert.parts import hugging_face, t5
from dicode_jax.errors import UserError
from dicode_jax.storage.files import read_object

ORIGIN = "cogvideox"
_ENDS = ("json", "safetensors")
SCHEDULER = "scheduler/scheduler_config.json"
FILES = (SCHEDULER, *(f"{part}/*.{end}" for part in ("transformer", "vae") for end in _ENDS))
TEXT_FILES = (*(f"text_encoder/*.{end}" for end in _ENDS), f"tokenizer/{VOCABULARY}")


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the folder of a pipeline of diffusers.

    Raises:
      UserError: Something is missing, damaged or of another model, or OUT is in the way.
    """
    reads = command.check_out(args, *FILES, *(TEXT_FILES if args.text_encoder else ()))
    root = pathlib.Path(args.source)
    if not (root / "transformer").is_dir():
        raise UserError(f"{root} holds no transformer/: want CogVideoX-2b as diffusers keeps it")
    parts, notes, text, sources = {}, [], {}, []

    source, cfg = _open(root / "transformer", cogvideox.read_transformer)
    if cfg.num_layers > len(source):
        raise UserError(f"config.json names {cfg.num_layers} layers, for {len(source)} tensors")
    sources.append(source)
    plan = cogvideox.TRANSFORMER.plan(cogvideox.join(source, cfg), cfg)
    parts["transformer"] = command.Part(plan, cfg, ORIGIN)

    if (root / SCHEDULER).is_file():
        with reading(f"{root / SCHEDULER} has other noise than CogVideoX-2b"):
            cogvideox.check_schedule(read_object(root / SCHEDULER, "a configuration"))
    else:
        notes.append(f"SOURCE holds no {SCHEDULER}: its noise is taken to be that of the release")
    if (root / "vae").is_dir():
        source, cfg = _open(root / "vae", cogvideox.read_vae)
        sources.append(source)
        parts["vae"] = command.Part(cogvideox.VAE.plan(source, cfg), cfg, ORIGIN)
    else:
        notes.append("SOURCE holds no vae/: --vae wants another one")
    lines = [line for part in parts.values() for line in part.plan.problems]
    if args.text_encoder:
        source, part, words = plan_text(root / "text_encoder", root / "tokenizer")
        sources.append(source)
        parts["painter_text"], text["painter_text"] = part, words
        lines += part.plan.problems + list(t5.KIND.check(part.plan.source, part.config))
    return command.Conversion(
        origin=ORIGIN,
        sources=sources,
        reads=reads,
        parts=parts,
        text=text,
        report={
            "notes": notes,
            "left_out": {key: why for source in sources for key, why in source.left_out.items()},
            "parts": {name: part.plan.report() for name, part in parts.items()},
        },
        problems=lines,
        summary="\n".join([f"wrote {args.out}: {', '.join(parts)} of CogVideoX-2b", *notes]),
    )


def _open(folder: pathlib.Path, read: Callable[[dict[str, Any]], Any]) -> tuple[Source, Any]:
    """The weights of a folder, and the configuration beside them."""
    original = hugging_face.read_config(folder)
    with reading(f"{folder / 'config.json'} is not of CogVideoX-2b"):
        cfg = typed(read(original))
    return open_source(folder), cfg


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    what = "the folder that diffusers loads, or owner/name on the Hub"
    options = command.parser("convert.cogvideox", __doc__, source=what)
    options.add_argument(
        "--text-encoder", action="store_true", help="convert T5 and its words as well"
    )
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

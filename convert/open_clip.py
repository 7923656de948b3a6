"""A checkpoint of OpenCLIP, whole, to both CLIP towers.

    python -m convert open_clip open_clip_pytorch_model.bin --out converted/clip [--config JSON]

Sizes are found from the weights, and what they do not tell from `open_clip_config.json` beside
them, or as `convert.parts.clip` says. The vocabulary is that of an installed `open_clip_torch`, or
of `--vocab`.
"""

import argparse
import sys
from collections.abc import Sequence

from convert.engine import command, found
from convert.engine.sources import open_source
from convert.engine.yaml import reading, typed
from convert.parts import clip
from dicode_jax import config as config_lib
from dicode_jax.models.clip import CLIPConfig
from dicode_jax.storage import hub
from dicode_jax.storage.files import read_object
from dicode_jax.text.clip import TOKENIZER_FILE, ClipTokenizer, installed_vocabulary

CONFIG_FILE = "open_clip_config.json"  # as it lies beside the weights on the Hub


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in one file; see the module's text.

    Raises:
      UserError: The file or the config is missing, damaged or of another model, or OUT is in the
        way.
    """
    reads = command.check_out(args, CONFIG_FILE, either=clip.FILES)
    source = open_source(args.source)
    if args.config is None and (args.source / CONFIG_FILE).is_file():
        args.config = args.source / CONFIG_FILE
    given = None if args.config is None else _read_config(args.config)
    told = clip.find_config(source, given)
    done = clip.TOWERS.plan(source, told.config)
    lines = []
    if given is not None:
        lines = found.differences(args.config, told.config, given, told.assumed)
    report = done.report() | {
        "config": config_lib.to_dict(told.config),
        "assumed": told.assumed if given is None else {},
        "left_out": source.left_out,
    }
    size = told.config.text.vocab_size
    vocab = args.vocab and hub.find_folder(args.vocab, (TOKENIZER_FILE,))
    vocab = vocab or installed_vocabulary(size)
    text, note = {}, ""
    if vocab is None:
        note = "\nwithout a vocabulary (--vocab FILE, or open_clip_torch) it reads no prompts"
    elif not done.problems and not lines:
        text["text"] = ClipTokenizer.from_file(vocab, size)
    return command.Conversion(
        origin="open_clip",
        sources=[source],
        reads=reads,
        parts={"": command.Part(done, told.config, "open_clip")},
        report=report,
        problems=done.problems + lines,
        text=text,
        summary=f"{args.out}: CLIP, {report['parameters']:,} parameters{note}",
    )


def _read_config(path: str) -> CLIPConfig:
    """A configuration of OpenCLIP: the model's alone, or a Hub file with it as `model_cfg`."""
    with reading(f"{path} is no configuration of OpenCLIP"):
        content = read_object(path, "a configuration")
        return typed(clip.config_from_original(content.get("model_cfg", content)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    what = ".bin, .pt or .safetensors of OpenCLIP, its folder, or owner/name on the Hub"
    options = command.parser("convert.open_clip", __doc__, source=what, reads=("config", "vocab"))
    options.add_argument("--config", metavar="JSON", help="OpenCLIP's config, checked against it")
    options.add_argument(
        "--vocab",
        metavar="FILE",
        help="CLIP's vocabulary: a tokenizer.json or OpenCLIP's bpe_simple_vocab_16e6.txt.gz "
        "(default: that of an installed open_clip_torch)",
    )
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

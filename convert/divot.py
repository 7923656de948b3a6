"""Divot's de-tokenizer to a clip decoder (UNet, autoencoder and resampler).

    python -m convert.divot --ckpt Divot_detokenizer_stage1.bin --out models/divot

Written against Divot's `DynamiCrafter` class (1865 keys). A file may carry the video tokenizer
beside them (`video_tokenizer.*`): it is not part of the de-tokenizer and is left out.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from convert.engine import command, found
from convert.engine.plan import Plan, plan, shapes_of, write_module
from convert.engine.rules import ConversionError, prefixed
from convert.engine.sources import open_source
from convert.parts import autoencoder_kl, buffers, resampler, unet3d
from dicode_jax.errors import UserError
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines import divot as pipeline
from dicode_jax.storage import model_card, weights

PREFIXES = {
    "unet": "diffusion_model.",
    "autoencoder": "first_stage_model.",
    "resampler": "image_proj_model.",
}
VIDEO_TOKENIZER = "video_tokenizer."
TEXT_LENGTH = 77  # leading tokens that the UNet reads as text, whatever they are


def find_configs(source: Mapping[str, Any]) -> dict[str, found.Found]:
    """Configs of the parts, from the keys and shapes.

    Raises:
      UserError: It is no de-tokenizer of Divot, or the shapes make no model.
    """
    keys = found.Keys(source)
    if not keys.any(PREFIXES["unet"]) or not keys.any(PREFIXES["resampler"]):
        raise UserError(
            "no de-tokenizer of Divot: want keys below "
            f"{', '.join(PREFIXES.values())}, got {', '.join(sorted(_heads(source))[:4])}"
        )
    return {
        "unet": found.unet(
            keys.below(PREFIXES["unet"]),
            context_rule="length",
            default_fs=3,
            text_context_len=TEXT_LENGTH,
        ),
        "autoencoder": found.autoencoder(keys.below(PREFIXES["autoencoder"])),
        "resampler": found.resampler(keys.below(PREFIXES["resampler"])),
    }


def plan_parts(source: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Plan]:
    """What goes where in every part, by shapes alone."""
    tables = {
        "unet": unet3d.rules(use_linear=unet3d.uses_linear(source, PREFIXES["unet"])),
        "autoencoder": autoencoder_kl.RULES,
        "resampler": resampler.RULES,
    }
    plans = {}
    for name, table in tables.items():
        prefix, kind, cfg = PREFIXES[name], pipeline.PARTS[name][0], configs[name]
        own = {key: value for key, value in source.items() if key.startswith(prefix)}
        shapes = shapes_of(lambda kind=kind, cfg=cfg: kind(cfg, rngs=ShapeRngs()))
        plans[name] = plan(own, prefixed(table, prefix), shapes)
    return plans


def problems(source: Mapping[str, Any], plans: Mapping[str, Plan]) -> list[str]:
    """All that does not fit: keys of no part, and what the plans report."""
    known = (*PREFIXES.values(), VIDEO_TOKENIZER)
    stray = [k for k in source if not k.startswith(known) and k not in buffers.BUFFERS]
    lines = [f"unused source key: {key}" for key in sorted(stray)]
    return lines + [line for made in plans.values() for line in made.problems]


def convert(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs the command."""
    out = pathlib.Path(args.out)
    reads = command.sources(args)
    command.check_folder(out, overwrite=args.overwrite, sources=reads)
    source = open_source(args.ckpt)
    configs = find_configs(source)
    plans = plan_parts(source, {name: found_.config for name, found_ in configs.items()})
    config = pipeline.DivotConfig()
    report["assumed"] = {name: found_.assumed for name, found_ in configs.items()}
    report["parts"] = {name: made.report() for name, made in plans.items()}
    left_out = [key for key in source if key.startswith(VIDEO_TOKENIZER)]
    report["skipped"] = dict.fromkeys(left_out, "video tokenizer, not part of the de-tokenizer")
    wrong = problems(source, plans) + buffers.compare(source, config.schedule)
    if wrong:
        raise ConversionError(wrong)
    report["sources"] = sha256 = command.hashes(source)
    header = command.metadata("divot", report, sha256)
    with command.output_folder(out, overwrite=args.overwrite, sources=reads) as folder:
        for name, made in plans.items():
            cfg = configs[name].config
            write_module(folder / name, made, cfg, dtype=args.dtype, metadata=header)
        weights.write_config(folder, config, header)
        model_card.write(folder, name=out.name)
        command.write_report(folder, report)
    print(f"wrote {out}: Divot's de-tokenizer")


def _heads(source: Mapping[str, Any]) -> set[str]:
    return {key.split(".")[0] for key in source}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = command.parser("convert.divot", __doc__, reads=("ckpt",))
    options.add_argument("--ckpt", required=True, metavar="FILE", help="Divot_detokenizer_*.bin")
    return command.run(convert, options, argv)


if __name__ == "__main__":
    sys.exit(main())

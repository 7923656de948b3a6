"""Divot's de-tokenizer to a clip decoder (UNet, autoencoder and resampler).

    python -m convert divot Divot_detokenizer_stage1.bin --out models/divot

Written against Divot's `DynamiCrafter` class (1865 keys). A file may carry the video tokenizer
beside them (`video_tokenizer.*`): it is not part of the de-tokenizer and is left out.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from convert.engine import command, found
from convert.engine.plan import Plan, stray_keys
from convert.engine.sources import open_source
from convert.parts import autoencoder_kl, buffers, resampler, unet3d
from dicode_jax.errors import UserError
from dicode_jax.pipelines import divot as pipeline

PREFIXES = {
    "unet": "diffusion_model.",
    "autoencoder": "first_stage_model.",
    "resampler": "image_proj_model.",
}
KINDS = {
    "unet": unet3d.KIND,
    "autoencoder": autoencoder_kl.KIND,
    "resampler": resampler.KIND,
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
        heads = sorted({key.split(".")[0] for key in source})[:4]
        raise UserError(
            f"no de-tokenizer of Divot: want keys below {', '.join(PREFIXES.values())}, "
            f"got {', '.join(heads)}"
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
    return {name: kind.plan(source, configs[name], PREFIXES[name]) for name, kind in KINDS.items()}


def problems(source: Mapping[str, Any], plans: Mapping[str, Plan]) -> list[str]:
    """All that does not fit: keys of no part, and what the plans report."""
    lines = stray_keys(source, (*PREFIXES.values(), VIDEO_TOKENIZER), buffers.BUFFERS)
    return lines + [line for made in plans.values() for line in made.problems]


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the file that the options name.

    Raises:
      UserError: It is missing, damaged or of another model, or OUT is in the way.
    """
    reads = command.check_out(args, either=("*.safetensors", "*[Dd]etokenizer*.bin"))
    source = open_source(args.source)
    told = find_configs(source)
    configs = {name: found_.config for name, found_ in told.items()}
    plans, settings = plan_parts(source, configs), pipeline.DivotConfig()
    left_out = [key for key in source if key.startswith(VIDEO_TOKENIZER)]
    return command.Conversion(
        origin="divot",
        sources=[source],
        reads=reads,
        parts={name: command.Part(made, configs[name], "divot") for name, made in plans.items()},
        settings=settings,
        report={
            "assumed": {name: found_.assumed for name, found_ in told.items()},
            "parts": {name: made.report() for name, made in plans.items()},
            "skipped": dict.fromkeys(left_out, "video tokenizer, not part of the de-tokenizer"),
        },
        problems=problems(source, plans) + buffers.compare(source, settings.schedule),
        summary=f"wrote {args.out}: Divot's de-tokenizer",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    what = "Divot_detokenizer_*.bin, its folder, or owner/name on the Hub"
    options = command.parser("convert.divot", __doc__, source=what, alias="--ckpt")
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

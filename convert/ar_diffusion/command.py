"""The published checkpoints of AR-Diffusion.

    python -m convert ar_diffusion --vae CHECKPOINT --out models/ar_diffusion

A checkpoint is a file, or the folder `checkpoint-N` that Accelerate wrote. `--vae` is the image VAE
or the one with time. `--discriminator` is its loss's, with `discriminator.*` and
`perceptual_loss.*`, or the discriminator alone: a training goes on from both.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from convert.ar_diffusion import discriminator, vae
from convert.engine import command
from convert.engine.plan import below, stray_keys
from convert.engine.sources import open_source
from dicode_jax.errors import UserError

ORIGIN = "ar_diffusion"
OF_LOSS = {"discriminator": "discriminator.", "lpips": "perceptual_loss."}


def plan_vae(source: Mapping[str, Any]) -> tuple[command.Part, dict[str, Any]]:
    """The VAE and what was assumed of it.

    Raises:
      UserError: It is none.
    """
    told = vae.find_config(source)
    return command.Part(vae.KIND.plan(source, told.config), told.config, ORIGIN), told.assumed


def plan_loss(source: Mapping[str, Any]) -> tuple[dict[str, command.Part], list[str]]:
    """The discriminator, LPIPS if it is there, and one line for each key of neither.

    Raises:
      UserError: There is no discriminator.
    """
    if "main.0.weight" in source:
        source = {OF_LOSS["discriminator"] + key: value for key, value in source.items()}
    own = below(source, OF_LOSS["discriminator"])
    config = discriminator.find_config(own)
    parts = {"discriminator": command.Part(discriminator.KIND.plan(own, config), config, ORIGIN)}
    if perceptual := below(source, OF_LOSS["lpips"]):
        of_lpips = discriminator.LPIPSConfig()
        made = discriminator.LPIPS_KIND.plan(perceptual, of_lpips)
        parts["lpips"] = command.Part(made, of_lpips, ORIGIN)
    # `logvar`: a scalar of the loss that no optimiser stepped.
    return parts, stray_keys(source, OF_LOSS.values(), ("logvar",))


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the files that the options name.

    Raises:
      UserError: One is missing, damaged or of another model, or OUT is in the way.
    """
    if args.source is None and args.discriminator is None:
        raise UserError("nothing to convert: name a checkpoint as SOURCE, or as --discriminator")
    if args.source is None:
        command.check_folder(args.out, overwrite=args.overwrite, sources=command.sources(args))
    else:
        command.check_out(args, "*.safetensors")
    sources, parts, assumed, problems = [], {}, {}, []
    if args.source is not None:
        sources.append(source := open_source(args.source))
        parts["vae"], assumed["vae"] = plan_vae(source)
    if args.discriminator is not None:
        sources.append(source := open_source(args.discriminator))
        of_loss, problems = plan_loss(source)
        parts |= of_loss
    problems += [line for part in parts.values() for line in part.plan.problems]
    return command.Conversion(
        origin=ORIGIN,
        sources=sources,
        reads=command.sources(args),
        parts=parts,
        report={
            "assumed": assumed,
            "parts": {name: part.plan.report() for name, part in parts.items()},
        },
        problems=problems,
        summary=f"wrote {args.out}: {', '.join(parts)} of AR-Diffusion",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = command.parser(
        "convert.ar_diffusion",
        __doc__,
        source="the VAE: a file, the folder of a checkpoint, or owner/name on the Hub",
        alias="--vae",
        required=False,
        reads=("discriminator",),
    )
    options.add_argument("--discriminator", metavar="CHECKPOINT", help="file or folder")
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

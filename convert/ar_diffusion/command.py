"""The published checkpoints of AR-Diffusion.

    python -m convert ar_diffusion --vae CHECKPOINT --dit CHECKPOINT --out models/ar_diffusion

A checkpoint is a file, or the folder `checkpoint-N` that Accelerate wrote. `--vae` is the image VAE
or the one with time, `--dit` the denoiser, whose weights are the average already; image VAE and
denoiser together are a model that generates. What a checkpoint does not tell (number of heads,
mask, what is predicted) is that of the release, or of `--config`, the original's YAML file, which
may not contradict the checkpoint; `--vae-config` is the VAE's.

`--discriminator` is that of the VAE's loss, with `discriminator.*` and `perceptual_loss.*`, or the
discriminator alone: a training goes on from both. LPIPS also comes of torchvision's VGG-16
(`--vgg`) and the heads in taming's `vgg.pth` (`--lpips`).
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convert.ar_diffusion import discriminator, dit, vae
from convert.engine import command
from convert.engine.found import Found, differences
from convert.engine.plan import below, stray_keys
from convert.engine.sources import Source, open_source
from convert.engine.yaml import read_options, reading, typed
from dicode_jax.errors import UserError
from dicode_jax.pipelines.ar_diffusion import (
    ARDiffusionConfig,
    ARDiffusionPipeline,
    FrameSamplingConfig,
)
from dicode_jax.storage import hub

ORIGIN = "ar_diffusion"
OF_LOSS = {"discriminator": discriminator.JUDGE, "lpips": discriminator.PERCEPTUAL}
PATTERNS = ("*.safetensors",)  # of a repository on the Hub
OPTIONS = ("dit", "config", "vae_config", "discriminator", "vgg", "lpips")


def plan_vae(
    source: Mapping[str, Any], yaml: str | None = None
) -> tuple[command.Part, dict[str, Any]]:
    """The VAE and what was assumed of it.

    Raises:
      UserError: It is none, or the YAML file is not its.
    """
    told = vae.find_config(source)
    if yaml is not None:
        told = _given(told, yaml, vae.config_from_original, told.assumed)
    return command.Part(vae.KIND.plan(source, told.config), told.config, ORIGIN), told.assumed


def plan_dit(
    source: Mapping[str, Any], yaml: str | None = None
) -> tuple[command.Part, dict[str, Any], list[str]]:
    """The denoiser, what was assumed of it, and one line for each table that is not its.

    Raises:
      UserError: It is none, or the YAML file is not its.
    """
    told = dit.find_config(source)
    if yaml is not None:
        of_dit = (f"dit.{name}" for name in told.assumed)
        told = _given(told, yaml, dit.denoiser_config, (*of_dit, "schedule.parameterization"))
    made = dit.KIND.plan(source, told.config)
    wrong = [] if made.problems else list(dit.check_values(source, told.config))
    return command.Part(made, told.config, ORIGIN), told.assumed, wrong


def _given(
    told: Found, yaml: str, read: Callable[[Mapping[str, Any]], Any], free: Sequence[str]
) -> Found:
    """The configuration of a YAML file, once it is seen that the weights do not contradict it."""
    options = read_options(yaml)
    with reading(f"{yaml} is no configuration of AR-Diffusion that is known here"):
        given = typed(read(options))
    if lines := differences(yaml, told.config, given, dict.fromkeys(free)):
        raise UserError(f"{yaml} is of another checkpoint: {'; '.join(lines)}")
    return Found(given, {})


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


def plan_lpips(vgg: Mapping[str, Any], heads: Mapping[str, Any]) -> command.Part:
    """LPIPS of torchvision's VGG-16 and of taming's heads.

    Raises:
      UserError: A key lies in both.
    """
    if twice := sorted(set(vgg) & set(heads)):
        raise UserError(f"--vgg and --lpips both hold {twice[0]}: want VGG-16 and its heads")
    config = discriminator.LPIPSConfig()
    made = discriminator.TORCHVISION_KIND.plan({**vgg, **heads}, config)
    return command.Part(made, config, ORIGIN)


def _settings(parts: Mapping[str, command.Part]) -> ARDiffusionConfig | None:
    """The pipeline's configuration, if the parts make one.

    Raises:
      UserError: They do not fit together.
    """
    if not {"vae", "denoiser"} <= parts.keys():
        return None
    configs = {name: parts[name].config for name in ("vae", "denoiser")}
    frames = configs["denoiser"].dit.num_frames
    settings = ARDiffusionConfig(sampling=FrameSamplingConfig(num_frames=frames))
    ARDiffusionPipeline.check_fit(settings, configs)
    return settings


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the files that the options name.

    Raises:
      UserError: One is missing, damaged or of another model, or OUT is in the way.
    """
    _check_options(args)
    reads = command.sources(args)
    command.check_folder(args.out, overwrite=args.overwrite, sources=reads)
    sources: list[Source] = []
    parts: dict[str, command.Part] = {}
    assumed: dict[str, Any] = {}
    problems: list[str] = []

    def opened(name: str) -> Source:
        sources.append(open_source(hub.find_folder(getattr(args, name), PATTERNS)))
        return sources[-1]

    if args.source is not None:
        parts["vae"], assumed["vae"] = plan_vae(opened("source"), args.vae_config)
    if args.dit is not None:
        made = plan_dit(opened("dit"), args.config)
        parts["denoiser"], assumed["denoiser"], problems = made
    settings = _settings(parts)
    if args.discriminator is not None:
        of_loss, stray = plan_loss(opened("discriminator"))
        problems, parts = problems + stray, parts | of_loss
    if args.lpips is not None:
        if "lpips" in parts:
            raise UserError("--discriminator holds LPIPS already: leave --vgg and --lpips out")
        parts["lpips"] = plan_lpips(opened("vgg"), opened("lpips"))
    problems += [line for part in parts.values() for line in part.plan.problems]
    what = "a model that generates, " * (settings is not None)
    return command.Conversion(
        origin=ORIGIN,
        sources=sources,
        reads=reads,
        parts=parts,
        settings=settings,
        report={
            "assumed": assumed,
            "parts": {name: part.plan.report() for name, part in parts.items()},
        },
        problems=problems,
        summary=f"wrote {args.out}: {what}{', '.join(parts)} of AR-Diffusion",
    )


def _check_options(args: argparse.Namespace) -> None:
    if all(x is None for x in (args.source, args.dit, args.discriminator, args.lpips, args.vgg)):
        raise UserError(
            "nothing to convert: name a checkpoint as SOURCE (the VAE), --dit, --discriminator, or "
            "two as --vgg and --lpips"
        )
    if (args.vgg is None) != (args.lpips is None):
        raise UserError("LPIPS is VGG-16 and its heads: give both --vgg and --lpips")
    for yaml, of, option in (("config", "dit", "--dit"), ("vae_config", "source", "--vae")):
        if getattr(args, yaml) is not None and getattr(args, of) is None:
            raise UserError(f"--{yaml.replace('_', '-')} is of {option}, which is not given")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = command.parser(
        "convert.ar_diffusion",
        __doc__,
        source="the VAE: a file, the folder of a checkpoint, or owner/name on the Hub",
        alias="--vae",
        required=False,
        reads=OPTIONS,
    )
    for name in OPTIONS:
        kind = "FILE.yaml" if "config" in name else "CHECKPOINT"
        options.add_argument(f"--{name.replace('_', '-')}", metavar=kind)
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

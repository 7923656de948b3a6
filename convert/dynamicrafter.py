"""DynamiCrafter checkpoints to an image-to-video pipeline, or to the start of tokenizer training.

    python -m convert.dynamicrafter --ckpt model.ckpt --out models/dynamicrafter_512 --variant 512
    python -m convert.dynamicrafter --ckpt model.ckpt --out models/start --for-dicode

Written against the four releases (256, 512, 512_interp, 1024; 2535 or 2520 keys with both CLIP
towers). What tells them apart in the file is the learnable image scale (256) and the dynamic
rescale (1024); 512 and 512_interp hold the same keys, shapes and schedule, so one of them has to be
named. `--for-dicode` does what DiCoDe began with: the first convolution keeps the four channels of
the noisy latents, the resampler the queries of one frame.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert.engine import command, found
from convert.engine.plan import Plan, plan, shapes_of, write_module
from convert.engine.rules import ConversionError, Rule, Rules, prefixed, to_numpy
from convert.engine.sources import LazyTensor, open_source
from convert.engine.yaml import read_options
from convert.parts import autoencoder_kl, buffers, constants, resampler, unet3d
from convert.parts import clip as open_clip
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.clip import CLIPText
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines import dynamicrafter as pipeline
from dicode_jax.pipelines.dicode import PipelineConfig
from dicode_jax.storage import model_card, weights
from dicode_jax.text.clip import ClipTokenizer

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
TEXT_TOWER, IMAGE_TOWER = "cond_stage_model.model.", "embedder.model."
RESAMPLER = "image_proj_model."
PREFIXES = {
    "unet": UNET,
    "autoencoder": AUTOENCODER,
    "text_tower": TEXT_TOWER,
    "image_tower": IMAGE_TOWER,
    "resampler": RESAMPLER,
}
FIRST_CONV, QUERIES = f"{UNET}input_blocks.0.0.weight", f"{RESAMPLER}latents"
VIDEO_LENGTH = 16  # frames that the resampler has queries for; fixed in all releases
ORIGINS = {"text_tower": "open_clip", "image_tower": "open_clip"}  # of the others: dynamicrafter

_V = NoiseSchedule(zero_terminal_snr=True, parameterization="v", base_scale=0.7)
_TRAILING = SamplingConfig(spacing="uniform_trailing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What the release of a model says beside its weights.

    Attributes:
      frame_size: Height and width.
      schedule, sampling: As its own script uses them.
      default_fs: What the UNet takes for a missing fs.
      learnable_image_scale: Has an `alpha` in every spatial transformer.
      interpolation: Paints between two images.
    """

    frame_size: tuple[int, int]
    schedule: NoiseSchedule
    sampling: SamplingConfig
    default_fs: int
    learnable_image_scale: bool = False
    interpolation: bool = False


VARIANTS = {
    "256": Variant(
        frame_size=(256, 256),
        schedule=NoiseSchedule(linear_start=0.00085, linear_end=0.012),
        sampling=SamplingConfig(guidance_rescale=0.0, fs=3),
        default_fs=3,
        learnable_image_scale=True,
    ),
    "512": Variant(
        frame_size=(320, 512),
        schedule=_V,
        sampling=dataclasses.replace(_TRAILING, fs=24),
        default_fs=24,
    ),
    "512_interp": Variant(
        frame_size=(320, 512),
        schedule=_V,
        sampling=dataclasses.replace(_TRAILING, fs=5),
        default_fs=10,
        interpolation=True,
    ),
    "1024": Variant(
        frame_size=(576, 1024),
        schedule=dataclasses.replace(_V, base_scale=0.3),
        sampling=dataclasses.replace(_TRAILING, fs=10),
        default_fs=10,
    ),
}


class Part(NamedTuple):
    """One folder of the output.

    Attributes:
      plan: What goes where.
      config: Builds the module.
      origin: Keys of `model_card.LICENCES`, with commas between.
    """

    plan: Plan
    config: Any
    origin: str


def find_variant(source: Mapping[str, Any], wanted: str | None = None) -> str:
    """The name of the release in a checkpoint, a key of `VARIANTS`.

    Args:
      wanted: What the user says; it is checked as far as the file can tell.

    Raises:
      UserError: It is no DynamiCrafter, another one than `wanted`, or cannot be told.
    """
    if FIRST_CONV not in source:
        raise UserError(
            f"no DynamiCrafter checkpoint: it has no {FIRST_CONV} (its keys start with "
            f"{', '.join(sorted({key.split('.')[0] for key in source})[:4])})"
        )
    if tuple(source[FIRST_CONV].shape[1:2]) == (4,):
        raise UserError(
            "this UNet takes four channels, so it was made from DynamiCrafter and is not one; "
            "for DiCoDe's tokenizer use convert.dicode --tokenizer"
        )
    if any(key.startswith(UNET) and key.endswith(".alpha") for key in source):
        possible = ["256"]
    elif "scale_arr" in source and hasattr(source["scale_arr"], "numpy"):
        low = to_numpy(source["scale_arr"]).min(initial=1.0)
        possible = ["1024"] if abs(low - 0.3) < 0.01 else ["512", "512_interp"]
    else:
        possible = ["512", "512_interp", "1024"]
    if wanted is not None and wanted not in possible:
        raise UserError(f"--variant {wanted}: the file is of {' or '.join(possible)}")
    if wanted is None and len(possible) > 1:
        raise UserError(
            f"the file may be {' or '.join(possible)}, which hold the same keys and shapes: name "
            "yours with --variant"
        )
    return wanted or possible[0]


def find_configs(source: Mapping[str, Any], variant: Variant) -> dict[str, found.Found]:
    """Configs of the parts, from the keys and shapes.

    Raises:
      UserError: A key that tells a size is missing, or the shapes make no model.
    """
    keys = found.Keys(source)
    text = found.clip_text(keys.below(TEXT_TOWER))
    queries = found.resampler(keys.below(RESAMPLER), video_length=VIDEO_LENGTH)
    unet = found.unet(
        keys.below(UNET),
        context_rule="length",
        default_fs=variant.default_fs,
        text_context_len=text.config.max_seq_len,
    )
    name = "image_tokens_per_frame"  # told by the resampler, not by the UNet
    config = dataclasses.replace(unet.config, **{name: queries.config.num_queries})
    assumed = {key: value for key, value in unet.assumed.items() if key != name}
    return {
        "unet": found.Found(config, assumed),
        "autoencoder": found.autoencoder(keys.below(AUTOENCODER)),
        "text_tower": text,
        "image_tower": found.clip_vision(keys.below(f"{IMAGE_TOWER}visual.")),
        "resampler": queries,
    }


def _rules(source: Mapping[str, Any]) -> dict[str, Rules]:
    """The table of every part, keys with their prefixes, targets without."""
    tables = {
        "unet": unet3d.rules(use_linear=unet3d.uses_linear(source, UNET)),
        "autoencoder": autoencoder_kl.RULES,
        "text_tower": open_clip.TEXT_RULES,
        "image_tower": open_clip.VISION_RULES,
        "resampler": resampler.RULES,
    }
    return {name: prefixed(table, PREFIXES[name]) for name, table in tables.items()}


def plan_pipeline(source: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Part]:
    """The parts of an image-to-video pipeline, by shapes alone."""
    parts = {}
    for name, rules in _rules(source).items():
        kind, cfg = pipeline.PARTS[name][0], configs[name]
        shapes = shapes_of(lambda kind=kind, cfg=cfg: kind(cfg, rngs=ShapeRngs()))
        own = _select(source, PREFIXES[name])
        parts[name] = Part(plan(own, rules, shapes), cfg, ORIGINS.get(name, "dynamicrafter"))
    return parts


def plan_for_dicode(source: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Part]:
    """Tokenizer and clip decoder to start DiCoDe's training from, by shapes alone.

    The decoder's constants are computed from the planned towers when they are written.
    """
    latents, queries = configs["autoencoder"].embed_dim, configs["resampler"].num_queries
    text_config = configs["text_tower"]
    source = dict(source)
    source[FIRST_CONV] = _first(source[FIRST_CONV], latents)
    source[QUERIES] = _first(source[QUERIES], queries)
    rules = _rules(source)
    text_shapes = shapes_of(lambda: CLIPText(text_config, rngs=ShapeRngs()))
    text = plan(_select(source, TEXT_TOWER), rules["text_tower"], text_shapes)

    config = DeepTokenizerConfig(
        vision=configs["image_tower"],
        resampler=dataclasses.replace(configs["resampler"], video_length=None),
        resize="stretch",
    )
    tokenizer = plan(
        _select(source, IMAGE_TOWER, RESAMPLER),
        (
            *prefixed(open_clip.VISION_RULES, IMAGE_TOWER, "vision."),
            *prefixed(resampler.RULES, RESAMPLER, "resampler."),
        ),
        shapes_of(lambda: DeepTokenizer(config, rngs=ShapeRngs())),
    )

    unet = dataclasses.replace(
        configs["unet"], in_channels=latents, context_rule="per_frame", default_fs=3
    )
    decoder_config = ClipDecoderConfig(
        unet=unet, autoencoder=configs["autoencoder"], num_tokens=queries
    )
    own = _select(source, UNET, AUTOENCODER)
    own["text_context"] = _computed(
        (text_config.max_seq_len, text_config.embed_dim),
        lambda: constants.empty_text_context(text, text_config),
    )
    own["null_tokens"] = _computed(
        (queries, config.token_dim), lambda: constants.null_tokens(tokenizer, config)
    )
    use_linear = unet3d.uses_linear(source, UNET)
    decoder = plan(
        own,
        (
            *prefixed(unet3d.rules(use_linear=use_linear), UNET, "unet."),
            *prefixed(autoencoder_kl.RULES, AUTOENCODER, "autoencoder."),
            Rule("text_context", "text_context"),
            Rule("null_tokens", "null_tokens"),
        ),
        shapes_of(lambda: ClipDecoder(decoder_config, rngs=ShapeRngs())),
    )
    decoder.problems.extend(text.problems)
    return {
        "tokenizer": Part(tokenizer, config, "dynamicrafter,open_clip"),
        "decoder": Part(decoder, decoder_config, "dynamicrafter"),
    }


def problems(source: Mapping[str, Any], parts: Mapping[str, Part]) -> list[str]:
    """All that does not fit: keys of no part, and what the parts report."""
    known = tuple(PREFIXES.values())
    names = {*buffers.BUFFERS, "scale_factor"}
    stray = [key for key in source if not key.startswith(known) and key not in names]
    lines = [f"unused source key: {key}" for key in sorted(stray)]
    return lines + [line for part in parts.values() for line in part.plan.problems]


def contradictions(
    options: Mapping[str, Any], configs: Mapping[str, found.Found], variant: Variant, name: str
) -> list[str]:
    """Where an original configuration contradicts what the weights tell.

    Args:
      options: Arguments of its `model` node.
      name: For the lines, the file's.

    Raises:
      UserError: It is no configuration of DynamiCrafter.
    """
    try:
        first_stage = options["first_stage_config"]["params"]
        idle = ("monitor", "lossconfig", "ckpt_path")
        given = {
            "unet": unet3d.config_from_original(options["unet_config"]),
            "autoencoder": autoencoder_kl.config_from_original(
                {key: value for key, value in first_stage.items() if key not in idle}
            ),
            "resampler": resampler.config_from_original(options["image_proj_stage_config"]),
        }
        schedule = buffers.schedule_from_original(options)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{name} is no configuration of DynamiCrafter: {error}") from error
    lines = [
        f"{part}.{line}"
        for part, config in given.items()
        for line in found.differences(name, configs[part].config, config, configs[part].assumed)
    ]
    if schedule != variant.schedule:
        lines.append(f"schedule: {variant.schedule} by the weights, {schedule} by {name}")
    return lines


def convert(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs the command."""
    out = pathlib.Path(args.out)
    reads = command.sources(args)
    command.check_folder(out, overwrite=args.overwrite, sources=reads)
    source = open_source(args.ckpt)
    name = find_variant(source, args.variant)
    variant = VARIANTS[name]
    configs = find_configs(source, variant)
    make = plan_for_dicode if args.for_dicode else plan_pipeline
    parts = make(source, {part: config.config for part, config in configs.items()})
    report["variant"] = name
    report["assumed"] = {part: config.assumed for part, config in configs.items()}
    report["parts"] = {part: made.plan.report() for part, made in parts.items()}
    if args.for_dicode:
        report["cut"] = {FIRST_CONV: "input channels of the latents", QUERIES: "one frame"}
    wrong = problems(source, parts) + buffers.compare(source, variant.schedule)
    if args.yaml is not None:
        wrong += contradictions(read_options(args.yaml), configs, variant, args.yaml)
    if wrong:
        raise ConversionError(wrong)
    text = None
    if args.vocab is not None:
        text = ClipTokenizer.from_file(args.vocab, configs["text_tower"].config.vocab_size)
    report["sources"] = sha256 = command.hashes(source)
    with command.output_folder(out, overwrite=args.overwrite, sources=reads) as folder:
        for part, (made, config, origin) in parts.items():
            header = command.metadata(origin, report, sha256)
            write_module(folder / part, made, config, dtype=args.dtype, metadata=header)
        settings = PipelineConfig() if args.for_dicode else _pipeline_config(variant)
        notes = command.metadata("dynamicrafter", report, sha256)
        weights.write_config(folder, settings, notes)
        if text is not None and not args.for_dicode:
            text.save(folder / pipeline.TEXT_FOLDER)
        model_card.write(folder, name=out.name)
        command.write_report(folder, report)
    what = "start of DiCoDe's tokenizer training" if args.for_dicode else "pipeline"
    print(f"wrote {out}: DynamiCrafter {name}, {what}")


def _pipeline_config(variant: Variant) -> pipeline.DynamiCrafterConfig:
    return pipeline.DynamiCrafterConfig(
        frame_size=variant.frame_size,
        interpolation=variant.interpolation,
        schedule=variant.schedule,
        sampling=variant.sampling,
    )


def _select(source: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key.startswith(prefixes)}


def _first(tensor: Any, count: int) -> LazyTensor:
    """The first `count` along the second axis of a tensor."""
    shape = (tensor.shape[0], min(count, tensor.shape[1]), *tensor.shape[2:])
    read = lambda: np.ascontiguousarray(to_numpy(tensor)[:, :count])  # noqa: E731
    return LazyTensor(shape, tensor.dtype, read)


def _computed(shape: tuple[int, ...], compute: Any) -> LazyTensor:
    return LazyTensor(shape, np.dtype(np.float32), compute)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = command.parser("convert.dynamicrafter", __doc__, reads=("ckpt", "vocab", "yaml"))
    options.add_argument("--ckpt", required=True, metavar="FILE", help="the released model.ckpt")
    options.add_argument(
        "--variant", choices=sorted(VARIANTS), help="needed for 512 and 512_interp alone"
    )
    options.add_argument(
        "--for-dicode", action="store_true", help="write the start of DiCoDe's tokenizer training"
    )
    options.add_argument(
        "--vocab",
        metavar="FILE",
        help="CLIP's vocabulary: a tokenizer.json or OpenCLIP's bpe_simple_vocab_16e6.txt.gz; "
        "without it the pipeline knows the empty prompt only",
    )
    options.add_argument(
        "--yaml", metavar="FILE", help="the original's config, checked against the weights"
    )
    return command.run(convert, options, argv)


if __name__ == "__main__":
    sys.exit(main())

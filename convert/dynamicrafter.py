"""DynamiCrafter checkpoints to an image-to-video pipeline, or to the start of tokenizer training.

    python -m convert dynamicrafter model.ckpt --out models/dynamicrafter_512 --variant 512
    python -m convert dynamicrafter Doubiiu/DynamiCrafter --out models/start --for-dicode

Written against the four releases (256, 512, 512_interp, 1024; 2535 or 2520 keys with both CLIP
towers). What tells them apart in the file is the learnable image scale (256) and the dynamic
rescale (1024); 512 and 512_interp hold the same keys, shapes and schedule, so one of them has to be
named. `--for-dicode` does what DiCoDe began with: the first convolution keeps the four channels of
the noisy latents, the resampler the queries of one frame.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.engine import command, found
from convert.engine.command import Part
from convert.engine.plan import stray_keys
from convert.engine.rules import to_numpy
from convert.engine.sources import LazyTensor, open_source
from convert.engine.yaml import read_options, reading, typed
from convert.parts import autoencoder_kl, buffers, clip, deep_tokens, resampler, unet3d
from convert.parts.deep_tokens import AUTOENCODER, IMAGE_TOWER, RESAMPLER, TEXT_TOWER, UNET
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.decoder import ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.pipelines import dynamicrafter as pipeline
from dicode_jax.pipelines.base import TEXT_FOLDER
from dicode_jax.pipelines.dicode import PipelineConfig
from dicode_jax.storage import hub
from dicode_jax.text.clip import TOKENIZER_FILE, ClipTokenizer, installed_vocabulary

PREFIXES = {
    "unet": UNET,
    "autoencoder": AUTOENCODER,
    "text_tower": TEXT_TOWER,
    "image_tower": IMAGE_TOWER,
    "resampler": RESAMPLER,
}
KINDS = {
    "unet": unet3d.KIND,
    "autoencoder": autoencoder_kl.KIND,
    "text_tower": clip.TEXT,
    "image_tower": clip.VISION,
    "resampler": resampler.KIND,
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
            "for DiCoDe's tokenizer use python -m convert dicode --tokenizer"
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


def plan_pipeline(source: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Part]:
    """The parts of an image-to-video pipeline, by shapes alone."""
    return {
        name: Part(
            KINDS[name].plan(source, configs[name], prefix),
            configs[name],
            ORIGINS.get(name, "dynamicrafter"),
        )
        for name, prefix in PREFIXES.items()
    }


def plan_for_dicode(source: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Part]:
    """Tokenizer and clip decoder to start DiCoDe's training from, by shapes alone.

    The decoder's constants are computed from the planned towers when they are written.
    """
    latents, queries = configs["autoencoder"].embed_dim, configs["resampler"].num_queries
    source = dict(source)
    source[FIRST_CONV] = _first(source[FIRST_CONV], latents)
    source[QUERIES] = _first(source[QUERIES], queries)
    tokenizer = DeepTokenizerConfig(
        vision=configs["image_tower"],
        resampler=dataclasses.replace(configs["resampler"], video_length=None),
        resize="stretch",
    )
    unet = dataclasses.replace(
        configs["unet"], in_channels=latents, context_rule="per_frame", default_fs=3
    )
    decoder = ClipDecoderConfig(unet=unet, autoencoder=configs["autoencoder"], num_tokens=queries)
    plans = deep_tokens.plan_system(source, tokenizer, decoder, configs["text_tower"])
    plans.decoder.problems.extend(plans.text.problems)
    return {
        "tokenizer": Part(plans.tokenizer, tokenizer, "dynamicrafter,open_clip"),
        "decoder": Part(plans.decoder, decoder, "dynamicrafter"),
    }


def problems(source: Mapping[str, Any], parts: Mapping[str, Part]) -> list[str]:
    """All that does not fit: keys of no part, and what the parts report."""
    lines = stray_keys(source, PREFIXES.values(), (*buffers.BUFFERS, "scale_factor"))
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
    with reading(f"{name} is no configuration of DynamiCrafter"):
        given = {
            "unet": unet3d.config_from_original(options["unet_config"]),
            "autoencoder": autoencoder_kl.config_from_original(options["first_stage_config"]),
            "resampler": resampler.config_from_original(options["image_proj_stage_config"]),
        }
        schedule = typed(buffers.schedule_from_original(options))
    lines = [
        f"{part}.{line}"
        for part, config in given.items()
        for line in found.differences(name, configs[part].config, config, configs[part].assumed)
    ]
    if schedule != variant.schedule:
        lines.append(f"schedule: {variant.schedule} by the weights, {schedule} by {name}")
    return lines


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the file that the options name.

    Raises:
      UserError: It is missing, damaged or of another model, or OUT is in the way.
    """
    reads = command.check_out(args, either=("*.safetensors", "*.ckpt"))
    checkpoint = open_source(args.source)
    source = dict(checkpoint)
    sources = [checkpoint, *deep_tokens.add_clip(source, args.clip)]
    name = find_variant(source, args.variant)
    variant = VARIANTS[name]
    configs = find_configs(source, variant)
    make = plan_for_dicode if args.for_dicode else plan_pipeline
    parts = make(source, {part: config.config for part, config in configs.items()})
    wrong = problems(source, parts) + buffers.compare(source, variant.schedule)
    if args.yaml is not None:
        wrong += contradictions(read_options(args.yaml), configs, variant, args.yaml)
    report = {
        "variant": name,
        "assumed": {part: config.assumed for part, config in configs.items()},
        "parts": {part: made.plan.report() for part, made in parts.items()},
    }
    if args.for_dicode:
        report["cut"] = {FIRST_CONV: "input channels of the latents", QUERIES: "one frame"}
    text, note = {}, ""
    vocab_size = configs["text_tower"].config.vocab_size
    vocab = args.vocab and hub.find_folder(args.vocab, (TOKENIZER_FILE,))
    vocab = vocab or installed_vocabulary(vocab_size)
    if not args.for_dicode and vocab is None:
        note = (
            "\nwithout CLIP's vocabulary it knows the empty prompt only: convert again with "
            "--vocab FILE, or after pip install open_clip_torch"
        )
    elif not args.for_dicode and not wrong:
        text[TEXT_FOLDER] = ClipTokenizer.from_file(vocab, vocab_size)
    what = "start of DiCoDe's tokenizer training" if args.for_dicode else "pipeline"
    return command.Conversion(
        origin="dynamicrafter",
        sources=sources,
        reads=reads,
        parts=parts,
        settings=PipelineConfig() if args.for_dicode else _pipeline_config(variant),
        text=text,
        report=report,
        problems=wrong,
        summary=f"wrote {args.out}: DynamiCrafter {name}, {what}{note}",
    )


def _pipeline_config(variant: Variant) -> pipeline.DynamiCrafterConfig:
    return pipeline.DynamiCrafterConfig(
        frame_size=variant.frame_size,
        interpolation=variant.interpolation,
        schedule=variant.schedule,
        sampling=variant.sampling,
    )


def _first(tensor: Any, count: int) -> LazyTensor:
    """The first `count` along the second axis of a tensor."""
    shape = (tensor.shape[0], min(count, tensor.shape[1]), *tensor.shape[2:])
    read = lambda: np.ascontiguousarray(to_numpy(tensor)[:, :count])  # noqa: E731
    return LazyTensor(shape, tensor.dtype, read)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    options = command.parser(
        "convert.dynamicrafter",
        __doc__,
        source="the released model.ckpt, its folder, or owner/name on the Hub",
        alias="--ckpt",
        reads=("clip", "vocab", "yaml"),
    )
    options.add_argument(
        "--variant", choices=sorted(VARIANTS), help="needed for 512 and 512_interp alone"
    )
    options.add_argument(
        "--for-dicode", action="store_true", help="write the start of DiCoDe's tokenizer training"
    )
    options.add_argument("--clip", metavar="FILE", help="CLIP, if SOURCE has none inside")
    options.add_argument(
        "--vocab",
        metavar="FILE",
        help="CLIP's vocabulary: a tokenizer.json or OpenCLIP's bpe_simple_vocab_16e6.txt.gz "
        "(default: that of an installed open_clip_torch; without any, the pipeline knows the empty "
        "prompt only)",
    )
    options.add_argument(
        "--yaml", metavar="FILE", help="the original's config, checked against the weights"
    )
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

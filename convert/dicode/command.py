"""The command `python -m convert.dicode`: official DiCoDe files to a pipeline folder."""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.dicode import found as dicode_found
from convert.dicode import lm as dicode_lm
from convert.dicode import modules as dicode
from convert.dicode.config import SystemConfig, config_from_original
from convert.engine import command
from convert.engine import yaml as original_yaml
from convert.engine.found import Found, differences
from convert.engine.plan import Plan, below
from convert.engine.rules import to_numpy
from convert.engine.sources import Source, open_source
from convert.parts import clip, deep_tokens, gpt2, hugging_face
from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.models.clip import CLIPConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.pipelines.dicode import PipelineConfig
from dicode_jax.storage import hub
from dicode_jax.text.gpt import TextTokenizer

TOKENIZER_FILES = ("pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors")
LM_FILES = ("gpt2_large.bin", "gpt2_large.pt", "gpt2_large.safetensors")
TEXT_FOLDER = "gpt2-large"
CLIP_FIELDS = ("tokenizer.vision.", "text.")  # what the original's YAML does not say either

READS = ("tokenizer", "lm", "text", "clip", "yaml")
ON_HUB = (*TOKENIZER_FILES, *LM_FILES, f"{TEXT_FOLDER}/*.json", f"{TEXT_FOLDER}/*.txt")

DESCRIPTION = """\
Convert the official files of DiCoDe to a folder that DiCoDePipeline.from_pretrained loads.

With SOURCE, everything: a folder with pytorch_model.bin, gpt2_large.bin (or .pt), the folder
gpt2-large, and open_clip_pytorch_model.bin, which is only read if pytorch_model.bin lacks CLIP.
With --tokenizer and --lm, the parts that are given. Sizes are found from the weights."""


@dataclasses.dataclass(frozen=True)
class Files:
    """What a conversion reads; None for what is not there.

    Attributes:
      tokenizer: Tokenizer and clip decoder.
      lm: Language model, with or without the diffusion model inside.
      text: Folder of the text tokenizer, and of the body's `config.json`.
      clip: CLIP's own file.
    """

    tokenizer: pathlib.Path | None
    lm: pathlib.Path | None
    text: pathlib.Path | None
    clip: pathlib.Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    return command.run(examine, parser(), argv)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    what = "folder of the official layout, all parts, or owner/name on the Hub"
    options = command.parser(
        "convert.dicode", DESCRIPTION, source=what, alias="--models", required=False, reads=READS
    )
    options.add_argument("--tokenizer", metavar="FILE", help="tokenizer and clip decoder")
    options.add_argument("--lm", metavar="FILE", help="language model")
    options.add_argument(
        "--text", metavar="DIR", help="GPT-2's tokenizer, folder or name, for --lm"
    )
    options.add_argument("--clip", metavar="FILE", help="CLIP, where the files have none inside")
    options.add_argument("--yaml", metavar="FILE", help="original config, checked against weights")
    return options


def examine(args: argparse.Namespace) -> command.Conversion:
    """What is in the files that the options name; see `main`.

    Raises:
      UserError: A file is missing, damaged or of another model, or OUT is in the way.
    """
    if args.source is not None and not pathlib.Path(args.source).exists():  # it is to be fetched
        command.check_folder(args.out, overwrite=args.overwrite)
    files = find_files(args)
    named = (files.tokenizer, files.lm, files.text, files.clip, args.yaml)
    reads = [path for path in named if path is not None]  # OUT may lie beside them in SOURCE
    command.check_folder(args.out, overwrite=args.overwrite, sources=reads)
    sources, problems, parts, report = [], [], {}, {}
    system = lm = text = None
    if files.tokenizer is not None:
        sources, tensors = open_system(files)
        system = read_system(tensors, yaml=args.yaml)
        report |= system.report | {"left_out": sources[0].left_out}
        problems += system.problems
        cfg, plans = system.config, system.plans
        parts["tokenizer"] = command.Part(plans.tokenizer, cfg.tokenizer, "dicode")
        parts["decoder"] = command.Part(plans.decoder, cfg.decoder, "dicode")
    if files.lm is not None:
        lm_source = open_source(files.lm)
        lm = read_lm(lm_source, body=read_body(files.text))
        report["language_model"] = lm.report | {"left_out": lm_source.left_out}
        problems += lm.problems
        parts["language_model"] = command.Part(lm.plans, lm.config, "dicode")
        if files.text is not None:
            text = TextTokenizer.from_file(files.text)
    if not problems:
        _check_together(system and system.config, lm and lm.config, text)
        if lm is not None:
            if system is not None:
                _check_copy(sources[0], lm_source)
            problems += dicode_lm.untied_head(lm_source, dicode.agent_prefix(lm_source))
            sources.append(lm_source)
    counts = {name: part.plan.report() for name, part in parts.items()}
    return command.Conversion(
        origin="dicode",
        sources=sources,
        reads=reads,
        parts=parts,
        settings=None if system is None else pipeline_config(system.config),
        text={} if text is None else {"text": text},
        report=report | {"parts": counts},
        problems=problems,
        summary="\n".join(
            f"{pathlib.Path(args.out) / name}: {part['parameters']:,} parameters"
            for name, part in counts.items()
        ),
    )


def find_files(args: argparse.Namespace) -> Files:
    """What the options name, or what lies in the official layout.

    Raises:
      UserError: Nothing is named, or a file of the layout is missing.
    """
    given = {name: getattr(args, name) for name in ("tokenizer", "lm", "text", "clip")}
    if args.text is not None:
        given["text"] = hub.find_folder(args.text, hugging_face.TEXT_FILES, bare=True)
    named = {name: pathlib.Path(path) for name, path in given.items() if path is not None}
    if args.source is None:
        if not {"tokenizer", "lm"} & set(named):
            raise UserError("name what to convert: SOURCE, or --tokenizer or --lm FILE")
        return Files(**{name: named.get(name) for name in given})
    if {"tokenizer", "lm"} & set(named):
        raise UserError("SOURCE stands for all parts; leave out --tokenizer and --lm")
    folder = hub.find_folder(args.source, ON_HUB, either=clip.FILES)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}")
    layout = {
        "tokenizer": _first(folder, TOKENIZER_FILES),
        "lm": _first(folder, LM_FILES),
        "text": folder / TEXT_FOLDER if (folder / TEXT_FOLDER).is_dir() else None,
        "clip": _first(folder, clip.FILES),
    } | named
    wanted = {"tokenizer": TOKENIZER_FILES[0], "lm": LM_FILES[0], "text": TEXT_FOLDER + "/"}
    if absent := [name for part, name in wanted.items() if layout[part] is None]:
        raise UserError(f"{folder} lacks {', '.join(absent)}; convert parts with --tokenizer, --lm")
    return Files(**layout)


def _first(folder: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_system(files: Files) -> tuple[list[Source], dict[str, Any]]:
    """Tokenizer and clip decoder: what is read, and all tensors together.

    CLIP's are taken from its own file where the checkpoint has none.

    Raises:
      UserError: A file is missing, damaged or no state dict.
    """
    source = open_source(files.tokenizer)
    tensors = dict(source)
    return [source, *deep_tokens.add_clip(tensors, files.clip)], tensors


@dataclasses.dataclass(frozen=True)
class Examined:
    """What a file holds, by shapes alone.

    Attributes:
      config: Found, or the original's where that is given and agrees.
      plans: `deep_tokens.Plans` of tokenizer and clip decoder, or the plan of the language model.
      problems: One line each.
      report: Ready for JSON.
    """

    config: Any
    plans: deep_tokens.Plans | Plan
    problems: list[str]
    report: dict[str, Any]


def read_system(tensors: Mapping[str, Any], *, yaml: str | None = None) -> Examined:
    """Tokenizer and clip decoder of a checkpoint.

    Raises:
      UserError: It is of another model, or the YAML is of none.
    """
    options = None if yaml is None else original_yaml.read_options(yaml)
    towers = None if options is None else _read_clip(options, yaml)
    found = dicode_found.system(tensors, towers)
    cfg, problems = _reconciled(found, options, yaml)
    clip_only = {k: v for k, v in found.assumed.items() if k.startswith(CLIP_FIELDS)}
    assumed = dict(found.assumed) if yaml is None else {} if towers else clip_only
    assumed["pipeline"] = config_lib.to_dict(pipeline_config(cfg))
    if "alphas_cumprod" in tensors:  # then the schedule is compared
        assumed.pop("decoder.schedule", None)
    plans = deep_tokens.plan_system(tensors, cfg.tokenizer, cfg.decoder, cfg.text, cfg.text_layer)
    problems += dicode.stray_keys(tensors) + dicode.check_schedule(tensors, cfg.decoder)
    lm = [key for key in tensors if key.startswith(dicode.LANGUAGE_MODEL)]
    sizes = config_lib.to_dict(cfg)
    report = {
        "config": {k: v for k, v in sizes.items() if k not in dicode_found.TRAINING},
        "assumed": assumed,
        "skipped": {
            **{k: "noise schedule, equal to the config's" for k in dicode.BUFFERS if k in tensors},
            **dict.fromkeys(lm, "language model, converted by --lm"),
        },
        "empty_prompt": plans.text.report(),
    }
    return Examined(cfg, plans, problems + plans.problems, report)


def read_lm(source: Mapping[str, Any], *, body: GPT2Config | None = None) -> Examined:
    """The language model of a checkpoint.

    Args:
      body: From the original's `config.json`, checked against the weights.

    Raises:
      UserError: It is of another model.
    """
    prefix = dicode.agent_prefix(source)
    found = dicode_found.language_model(below(source, prefix), body)
    cfg, assumed, problems = found.config, dict(found.assumed), []
    if body is not None:
        body = dataclasses.replace(body, vocab_size=cfg.body.vocab_size)  # grown for image tokens
        lines = differences("config.json", cfg.body, body, below(assumed, "body."))
        problems += [f"language model: {line}" for line in lines]
        cfg = dataclasses.replace(cfg, body=body)
        assumed = {k: v for k, v in assumed.items() if not k.startswith("body.")}
    # One stack of blocks compiles in seconds where 36 separate ones take minutes.
    cfg = dataclasses.replace(cfg, body=dataclasses.replace(cfg.body, scan_layers=True))
    assumed.pop("body.scan_layers", None)
    beside = [key for key in source if not key.startswith(prefix)]
    skipped = dict.fromkeys(beside, "not of the language model; converted by --tokenizer")
    report = {"config": config_lib.to_dict(cfg), "assumed": assumed, "skipped": skipped}
    problems += dicode.stray_keys(source) if prefix else []
    made = dicode_lm.KIND.plan(source, cfg, prefix)
    return Examined(cfg, made, problems + made.problems, report)


def pipeline_config(cfg: SystemConfig) -> PipelineConfig:
    """Settings of the pipeline; all but the frame size are the released demo's."""
    height = cfg.decoder.latent_shape[0] * cfg.decoder.autoencoder.downsampling
    return PipelineConfig(frame_size=height)


def read_body(folder: pathlib.Path | None) -> GPT2Config | None:
    """Sizes of GPT-2 by the `config.json` of its folder, None where there is none.

    Raises:
      UserError: It is damaged or of another model.
    """
    if folder is None or not (folder / "config.json").is_file():
        return None
    with original_yaml.reading(f"{folder / 'config.json'} is no config of GPT-2"):
        return original_yaml.typed(gpt2.config_from_original(hugging_face.read_config(folder)))


def _reconciled(
    found: Found, options: Mapping[str, Any] | None, path: str | None
) -> tuple[SystemConfig, list[str]]:
    """The configuration to use, and where a YAML contradicts the weights, which are believed."""
    if options is None:
        return found.config, []
    with original_yaml.reading(f"{path} is no configuration of DiCoDe"):
        towers = CLIPConfig(vision=found.config.tokenizer.vision, text=found.config.text)
        given = config_from_original({"clip": towers, **options})
        for part in (given.tokenizer, given.decoder, given.text):
            original_yaml.typed(part)
    free = found.assumed | dict.fromkeys(dicode_found.TRAINING)
    lines = differences(path, found.config, given, free)
    return (found.config if lines else given), lines


def _read_clip(options: Mapping[str, Any], path: str) -> CLIPConfig | None:
    """CLIP's configuration, which may stand beside the original's arguments."""
    if "clip" not in options:
        return None
    with original_yaml.reading(f"{path}: clip is no configuration of OpenCLIP"):
        return original_yaml.typed(clip.config_from_original(options["clip"]))


def _check_together(
    cfg: SystemConfig | None, lm: DiCoDeLMConfig | None, text: TextTokenizer | None
) -> None:
    """Refuses parts of different models."""
    if cfg is not None:
        widths = cfg.tokenizer.token_dim, cfg.decoder.token_dim
        if widths[0] != widths[1]:
            raise UserError(f"deep tokens are {widths[0]} wide, the UNet reads {widths[1]}")
        if lm is not None:
            ours = cfg.tokenizer.num_tokens, cfg.tokenizer.token_dim
            if (lm.num_tokens, lm.token_dim) != ours:
                raise UserError(
                    f"the language model makes {lm.num_tokens} deep tokens of width "
                    f"{lm.token_dim}, the tokenizer {ours[0]} of width {ours[1]}"
                )
    if text is not None and text.vocab_size != lm.body.vocab_size:
        raise UserError(
            f"the text tokenizer has {text.vocab_size} ids, the language model {lm.body.vocab_size}"
        )


def _check_copy(source: Source, lm_source: Source) -> None:
    """Refuses two different diffusion models, as only one of them would be kept."""
    inside = [key for key in lm_source if not key.startswith(dicode.LANGUAGE_MODEL)]
    if not any(key.startswith(deep_tokens.UNET) for key in inside):
        return
    for key in inside:
        mine = source.get(key)
        if mine is not None and not _equal(to_numpy(mine), to_numpy(lm_source[key])):
            raise UserError(
                f"{source.files[0].name} and {lm_source.files[0].name} hold different diffusion "
                f"models (first at {key}): convert one alone, with --tokenizer or --lm"
            )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same numbers in the coarser of their types."""
    coarse = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.shape == b.shape and np.array_equal(a.astype(coarse), b.astype(coarse))

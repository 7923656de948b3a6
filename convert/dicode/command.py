"""The command `python -m convert.dicode`: official DiCoDe files to a pipeline folder."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.dicode import found as dicode_found
from convert.dicode import lm as dicode_lm
from convert.dicode import modules as dicode
from convert.dicode.config import SystemConfig, config_from_original
from convert.engine import command
from convert.engine import yaml as original_yaml
from convert.engine.found import Found, differences
from convert.engine.plan import Plan, plan, shapes_of, write_module
from convert.engine.rules import ConversionError, Rules, prefixed, to_numpy
from convert.engine.sources import LazyTensor, Source, open_source
from convert.parts import clip as open_clip
from convert.parts import constants, gpt2, hugging_face
from dicode_jax import config as config_lib
from dicode_jax.errors import UserError
from dicode_jax.models.clip import CLIPConfig, CLIPText
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder
from dicode_jax.models.dicode.tokenizer import DeepTokenizer
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.dicode import PipelineConfig
from dicode_jax.storage import model_card
from dicode_jax.storage.weights import write_config
from dicode_jax.text.gpt import TextTokenizer

TOKENIZER_FILES = ("pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors")
LM_FILES = ("gpt2_large.bin", "gpt2_large.pt", "gpt2_large.safetensors")
CLIP_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
TEXT_FOLDER = "gpt2-large"
CLIP_FIELDS = ("tokenizer.vision.", "text.")  # what the original's YAML does not say either

READS = ("models", "tokenizer", "lm", "text", "clip", "yaml")

DESCRIPTION = """\
Convert the official files of DiCoDe to a folder that DiCoDePipeline.from_pretrained loads.

With --models DIR, everything: DIR holds pytorch_model.bin, gpt2_large.bin (or .pt), the folder
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
    options = command.parser("convert.dicode", DESCRIPTION, reads=READS)
    options.add_argument("--models", metavar="DIR", help="the official layout, all parts")
    options.add_argument("--tokenizer", metavar="FILE", help="tokenizer and clip decoder")
    options.add_argument("--lm", metavar="FILE", help="language model")
    options.add_argument("--text", metavar="DIR", help="folder of GPT-2's tokenizer, for --lm")
    options.add_argument("--clip", metavar="FILE", help="CLIP, if --tokenizer has none inside")
    options.add_argument("--yaml", metavar="FILE", help="original config, checked against weights")
    return command.run(convert, options, argv)


def convert(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Converts what the options name; see `main`.

    Raises:
      UserError: A file is missing, damaged or of another model, or OUT is in the way.
      ConversionError: Keys, shapes or the noise schedule do not fit; lists all problems.
    """
    out = pathlib.Path(args.out)
    files = find_files(args)
    named = (files.tokenizer, files.lm, files.text, files.clip, args.yaml)
    reads = [path for path in named if path is not None]  # OUT may lie beside them in --models
    command.check_folder(out, overwrite=args.overwrite, sources=reads)
    sources, problems, parts = [], [], {}
    system = text = lm_cfg = None
    if files.tokenizer is not None:
        sources, tensors = open_system(files)
        system = System(tensors, report, yaml=args.yaml)
        report["left_out"] = sources[0].left_out
        problems += system.problems
        parts |= {"tokenizer": system.tokenizer, "decoder": system.decoder}
    if files.lm is not None:
        lm_source = open_source(files.lm)
        sources.append(lm_source)
        lm_plan, lm_cfg = plan_lm(lm_source, report, problems, body=read_body(files.text))
        report["language_model"]["left_out"] = lm_source.left_out
        parts["language_model"] = lm_plan
        if files.text is not None:
            text = TextTokenizer.from_file(files.text)
    report["parts"] = {name: part.report() for name, part in parts.items()}
    if problems:
        raise ConversionError(sorted(problems))
    _check_together(system, lm_cfg, text)
    report["sources"] = command.hashes(*sources)
    if lm_cfg is not None:
        agent = dicode.below(lm_source, dicode.LANGUAGE_MODEL) or lm_source
        hugging_face.check_tied_head(agent, "llm.lm_head.weight", "llm.transformer.wte.weight")
        if system is not None:
            _check_copy(sources[0], lm_source)
    configs: dict[str, Any] = {"language_model": lm_cfg}
    if system is not None:
        configs |= {"tokenizer": system.config.tokenizer, "decoder": system.config.decoder}
    with command.output_folder(out, overwrite=args.overwrite, sources=reads) as folder:
        notes = command.metadata("dicode", report, report["sources"])
        for name, part in parts.items():
            write_module(folder / name, part, configs[name], dtype=args.dtype, metadata=notes)
        if text is not None:
            text.save(folder / "text")
        if system is not None:
            write_config(folder, pipeline_config(system.config), notes)
        model_card.write(folder, name=out.name)
        command.write_report(folder, report)
    for name, part in report["parts"].items():
        print(f"{out / name}: {part['parameters']:,} parameters")


def find_files(args: argparse.Namespace) -> Files:
    """What the options name, or what lies in the official layout.

    Raises:
      UserError: Nothing is named, or a file of the layout is missing.
    """
    given = {name: getattr(args, name) for name in ("tokenizer", "lm", "text", "clip")}
    named = {name: pathlib.Path(path) for name, path in given.items() if path is not None}
    if args.models is None:
        if not {"tokenizer", "lm"} & set(named):
            raise UserError("name what to convert: --models DIR, or --tokenizer or --lm FILE")
        return Files(**{name: named.get(name) for name in given})
    if {"tokenizer", "lm"} & set(named):
        raise UserError("--models stands for all parts; leave out --tokenizer and --lm")
    folder = pathlib.Path(args.models)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}")
    layout = {
        "tokenizer": _first(folder, TOKENIZER_FILES),
        "lm": _first(folder, LM_FILES),
        "text": folder / TEXT_FOLDER if (folder / TEXT_FOLDER).is_dir() else None,
        "clip": _first(folder, CLIP_FILES),
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
    sources = [open_source(files.tokenizer)]
    tensors = dict(sources[0])
    absent = [
        prefix
        for prefix in (dicode.TEXT_TOWER, dicode.IMAGE_TOWER)
        if not any(key.startswith(prefix) for key in tensors)
    ]
    if absent and files.clip is not None:
        sources.append(open_source(files.clip))
        for key, tensor in sources[1].items():
            is_image = key.startswith("visual.")
            prefix = dicode.IMAGE_TOWER if is_image else dicode.TEXT_TOWER
            if prefix in absent:
                tensors[prefix + key] = tensor
    return sources, tensors


class System:
    """Tokenizer and clip decoder of a checkpoint: configuration and plans.

    Attributes:
      config: Found, or the YAML's where that is given and agrees.
      tokenizer, decoder, text: Plans; only the empty prompt is kept of the text tower.
      problems: One line each.
    """

    def __init__(
        self, tensors: Mapping[str, Any], report: dict[str, Any], *, yaml: str | None = None
    ):
        options = None if yaml is None else original_yaml.read_options(yaml)
        clip = None if options is None else _read_clip(options, yaml)
        found = dicode_found.system(tensors, clip)
        self.config, self.problems = _reconciled(found, options, yaml)
        sizes = config_lib.to_dict(self.config)
        report["config"] = {k: v for k, v in sizes.items() if k not in dicode_found.TRAINING}
        clip_only = {k: v for k, v in found.assumed.items() if k.startswith(CLIP_FIELDS)}
        report["assumed"] = dict(found.assumed) if yaml is None else {} if clip else clip_only
        report["assumed"]["pipeline"] = config_lib.to_dict(pipeline_config(self.config))
        cfg = self.config
        self.problems += dicode.stray_keys(tensors) + dicode.check_schedule(tensors, cfg.decoder)
        if "alphas_cumprod" in tensors:  # then the schedule was compared
            report["assumed"].pop("decoder.schedule", None)
        lm = [key for key in tensors if key.startswith(dicode.LANGUAGE_MODEL)]
        report["skipped"] = {
            **{k: "noise schedule, equal to the config's" for k in dicode.BUFFERS if k in tensors},
            **dict.fromkeys(lm, "language model, converted by --lm"),
        }
        self.tokenizer = _planned(
            dicode.select(tensors, dicode.TOKENIZER_PARTS),
            dicode.TOKENIZER_RULES,
            lambda: DeepTokenizer(cfg.tokenizer, rngs=ShapeRngs()),
        )
        self.text = _planned(
            dicode.select(tensors, (dicode.TEXT_TOWER,)),
            prefixed(open_clip.TEXT_RULES, dicode.TEXT_TOWER),
            lambda: CLIPText(cfg.text, rngs=ShapeRngs()),
        )
        computed = {
            "text_context": _computed(
                (cfg.text.max_seq_len, cfg.text.embed_dim),
                lambda: constants.empty_text_context(self.text, cfg.text, cfg.text_layer),
            ),
            "null_tokens": _computed(
                (cfg.tokenizer.num_tokens, cfg.tokenizer.token_dim),
                lambda: constants.null_tokens(self.tokenizer, cfg.tokenizer),
            ),
        }
        self.decoder = _planned(
            dicode.select(tensors, dicode.DECODER_PARTS) | computed,
            dicode.decoder_rules(tensors, cfg.decoder),
            lambda: ClipDecoder(cfg.decoder, rngs=ShapeRngs()),
        )
        for part in (self.tokenizer, self.text, self.decoder):
            self.problems += part.problems
        report["empty_prompt"] = self.text.report()


def plan_lm(
    source: Mapping[str, Any],
    report: dict[str, Any],
    problems: list[str],
    *,
    body: GPT2Config | None = None,
) -> tuple[Plan, DiCoDeLMConfig]:
    """The language model's plan and configuration; complaints go to `problems`.

    Args:
      body: From the original's `config.json`, checked against the weights.
    """
    inside = any(key.startswith(dicode.LANGUAGE_MODEL) for key in source)
    prefix = dicode.LANGUAGE_MODEL if inside else ""
    found = dicode_found.language_model(dicode.below(source, prefix), body)
    cfg, assumed = found.config, dict(found.assumed)
    if body is not None:
        body = dataclasses.replace(body, vocab_size=cfg.body.vocab_size)  # grown for image tokens
        lines = differences("config.json", cfg.body, body, _below(assumed, "body"))
        problems += [f"language model: {line}" for line in lines]
        cfg = dataclasses.replace(cfg, body=body)
        assumed = {k: v for k, v in assumed.items() if not k.startswith("body.")}
    # One stack of blocks compiles in seconds where 36 separate ones take minutes.
    cfg = dataclasses.replace(cfg, body=dataclasses.replace(cfg.body, scan_layers=True))
    assumed.pop("body.scan_layers", None)
    report["language_model"] = {"config": config_lib.to_dict(cfg), "assumed": assumed}
    beside = [key for key in source if not key.startswith(prefix)]
    skipped = dict.fromkeys(beside, "not of the language model; converted by --tokenizer")
    report["language_model"]["skipped"] = skipped
    if inside:
        problems += dicode.stray_keys(source)
    target = shapes_of(lambda: DiCoDeLM(cfg, rngs=ShapeRngs()))
    rules = prefixed(dicode_lm.RULES, prefix)
    made = plan(dicode.select(source, (prefix,)), rules, target, stacked=("body.blocks",))
    problems += made.problems
    return made, cfg


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
    try:
        return gpt2.config_from_original(hugging_face.read_config(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is no config of GPT-2: {error}") from error


def _planned(source: Mapping[str, Any], rules: Rules, build: Any) -> Plan:
    return plan(source, rules, shapes_of(build))


def _computed(shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> LazyTensor:
    return LazyTensor(shape, np.dtype(np.float32), compute)


def _below(assumed: Mapping[str, Any], part: str) -> dict[str, Any]:
    head = part + "."
    return {k.removeprefix(head): v for k, v in assumed.items() if k.startswith(head)}


def _reconciled(
    found: Found, options: Mapping[str, Any] | None, path: str | None
) -> tuple[SystemConfig, list[str]]:
    """The configuration to use, and where a YAML contradicts the weights."""
    if options is None:
        return found.config, []
    try:
        clip = CLIPConfig(vision=found.config.tokenizer.vision, text=found.config.text)
        given = config_from_original({"clip": clip, **options})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of DiCoDe: {error}") from error
    free = found.assumed | dict.fromkeys(dicode_found.TRAINING)
    return given, differences(path, found.config, given, free)


def _read_clip(options: Mapping[str, Any], path: str) -> CLIPConfig | None:
    """CLIP's configuration, which may stand beside the original's arguments."""
    try:
        return open_clip.config_from_original(options["clip"]) if "clip" in options else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: clip is no configuration of OpenCLIP: {error}") from error


def _check_together(
    system: System | None, lm: DiCoDeLMConfig | None, text: TextTokenizer | None
) -> None:
    """Refuses parts of different models."""
    if system is not None:
        cfg = system.config
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
    if not any(key.startswith(dicode.UNET) for key in inside):
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

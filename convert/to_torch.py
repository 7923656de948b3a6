"""Weights of this package as a state dict with the original key names.

    python -m convert to_torch converted/dicode --out dicode.safetensors
    python -m convert to_torch runs/ar/model --out agent.pt

The tables of the converters, run backwards: what was trained here runs in the original code, and
the way there and back is bitwise. SOURCE is a model folder, of which every part goes into one file,
or a single part, or a folder of parts that make no model. Not written, as nothing here trains them
and the original takes them from elsewhere: CLIP's text tower and the constants made with it
(DiCoDe), the agent's copy of the resampler, tied output matrices.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from convert.ar_diffusion import discriminator
from convert.ar_diffusion import dit as ar_diffusion_dit
from convert.ar_diffusion import vae as ar_diffusion_vae
from convert.dicode import lm as dicode_lm
from convert.dicode import modules as dicode
from convert.engine import archives, command, plan
from convert.engine.rules import Rules, original_names, piece_of, prefixed, to_numpy
from convert.engine.sources import Source, open_source
from convert.landiff import dit as landiff_dit
from convert.landiff import language_model as landiff_lm
from convert.landiff import semantic_tokenizer as landiff_tokenizer
from convert.landiff import theia
from convert.landiff import vae as landiff_vae
from convert.parts import (
    autoencoder_kl,
    clip,
    deep_tokens,
    gpt2,
    inception,
    llama,
    resampler,
    unet3d,
)
from dicode_jax import config as config_lib
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS
from dicode_jax.errors import UserError
from dicode_jax.kinds import kind_of
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import blank
from dicode_jax.storage import hub
from dicode_jax.storage.files import atomic_path, check_no_source, check_output
from dicode_jax.storage.weights import CONFIG_FILE, WEIGHTS_FILE, read_header, read_metadata

NAME = "convert.to_torch"
SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one kind of module is written.

    Attributes:
      module: Its class.
      rules: The converter's table for a configuration.
      extras: Buffers that the original keeps beside its parameters.
      constants: Paths that have no original name.
      copies: Original key that is written twice -> its other name.
      ours: What a configuration asks for that the original's code does not do, as a field's name.
    """

    module: type
    rules: Callable[[Any], Rules]
    extras: Callable[[Any], Mapping[str, np.ndarray]] = lambda cfg: {}
    constants: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ours: Callable[[Any], str | None] = lambda cfg: None


def _not_nearest(cfg: ClipDecoderConfig) -> str | None:
    wanted = {"latent_prior": None, "token_path": None, "latent_view": "nearest"}
    return next((name for name, value in wanted.items() if getattr(cfg, name) != value), None)


def _schedule(cfg: ClipDecoderConfig) -> dict[str, np.ndarray]:
    tables = {name: cfg.schedule.table(name) for name in PERSISTENT_BUFFERS}
    return {name: np.asarray(table, np.float32) for name, table in tables.items()}


def _normalizer(cfg: DiCoDeLMConfig) -> dict[str, np.ndarray]:
    if cfg.pre_normalizer is None:
        return {}
    values = np.asarray(cfg.pre_normalizer, np.float32).reshape(1, -1, 1)
    return {f"{dicode.LANGUAGE_MODEL}pre_normalizer": values}


def _as_read(kind: plan.Kind, prefix: str = "") -> Kind:
    """A kind that is written below a prefix, with nothing that its reader does not know."""
    return Kind(kind.build, lambda cfg: prefixed(kind.rules({}, cfg), prefix))


KINDS: dict[type, Kind] = {
    DeepTokenizerConfig: Kind(DeepTokenizer, lambda cfg: deep_tokens.TOKENIZER_RULES),
    ClipDecoderConfig: Kind(
        ClipDecoder,
        lambda cfg: deep_tokens.decoder_rules({}),
        extras=_schedule,
        constants=("text_context", "null_tokens"),
        ours=_not_nearest,
    ),
    DiCoDeLMConfig: dataclasses.replace(
        _as_read(dicode_lm.KIND, dicode.LANGUAGE_MODEL), extras=_normalizer
    ),
    clip.TOWERS.config: _as_read(clip.TOWERS),
    clip.TEXT.config: _as_read(clip.TEXT, deep_tokens.TEXT_TOWER),
    clip.VISION.config: _as_read(clip.VISION, deep_tokens.IMAGE_TOWER),
    unet3d.KIND.config: _as_read(unet3d.KIND, deep_tokens.UNET),
    autoencoder_kl.KIND.config: _as_read(autoencoder_kl.KIND, deep_tokens.AUTOENCODER),
    resampler.KIND.config: _as_read(resampler.KIND, deep_tokens.RESAMPLER),
    gpt2.KIND.config: _as_read(gpt2.KIND),
    inception.I3D_KIND.config: _as_read(inception.I3D_KIND),
    inception.INCEPTION_KIND.config: _as_read(inception.INCEPTION_KIND),
    llama.KIND.config: _as_read(llama.KIND),
    DenoiserConfig: Kind(
        Denoiser,
        ar_diffusion_dit.denoiser_rules,
        extras=ar_diffusion_dit.stored_tables,
        constants=("null",),
    ),
    ar_diffusion_vae.KIND.config: _as_read(ar_diffusion_vae.KIND),
    discriminator.KIND.config: dataclasses.replace(
        _as_read(discriminator.KIND, discriminator.JUDGE), extras=discriminator.stored_statistics
    ),
    discriminator.LPIPS_KIND.config: dataclasses.replace(
        _as_read(discriminator.LPIPS_KIND, discriminator.PERCEPTUAL),
        extras=discriminator.stored_constants,
    ),
    landiff_dit.KIND.config: dataclasses.replace(
        _as_read(landiff_dit.KIND, "model."),
        extras=landiff_dit.unused_norm,
        ours=lambda cfg: (
            ("semantic_prior" if cfg.semantic_prior is not None else None)
            or ("upsampler.num_past" if cfg.upsampler.num_past else None)
        ),
    ),
    landiff_dit.BASE.config: _as_read(landiff_dit.BASE),
    landiff_vae.KIND.config: _as_read(landiff_vae.KIND),
    landiff_lm.KIND.config: _as_read(landiff_lm.KIND),
    theia.KIND.config: _as_read(theia.KIND),
    landiff_tokenizer.KIND.config: dataclasses.replace(
        _as_read(landiff_tokenizer.KIND),
        extras=landiff_tokenizer.stored_beside,
        copies={landiff_tokenizer.CODES: landiff_tokenizer.AVERAGES},
    ),
}
"""Configuration of a stored module -> how it is written; the parts of DynamiCrafter included."""


def original_state_dict(
    source: Mapping[str, Any], cfg: Any
) -> dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
    """A stored module under original names.

    Args:
      source: Dotted path -> tensor of the module.
      cfg: Its configuration, one of `KINDS`.

    Returns:
      Original key -> shape, dtype, and a function that reads the values in the original layout.

    Raises:
      UserError: The tensors are not those of the configuration, or the original's code would make
        something else of them.
    """
    kind = KINDS[type(cfg)]
    if (field := kind.ours(cfg)) is not None:
        raise UserError(f"the original knows no {field}, as this {kind_of(type(cfg))} has it")
    module = blank(kind.module, cfg, most=len(source) + 100)  # a large misfit takes no time
    shapes = plan.flat_shapes(nnx.state(module))
    if shapes != {path: tuple(tensor.shape) for path, tensor in source.items()}:
        wrong = sorted(set(shapes) ^ set(source))
        raise UserError(
            f"the weights are not those of the config (first: {(wrong or ['shapes'])[0]})"
        )
    rules = kind.rules(cfg)
    keep = _Last(source)
    pieces: dict[str, dict[int, Any]] = {}
    out: dict[str, Any] = {}
    for path, names in plan.by_target(shapes, plan.stacked_blocks(cfg)).items():
        if path in kind.constants:
            continue
        for i, name in enumerate(names):
            key, rule = next(original_names(rules, name), (None, None))
            piece, count = (0, 1) if key is None else piece_of(rule, name)
            own = pieces.setdefault(key or "", {})
            if key is None or piece in own:
                raise UserError(f"{name} has no name of its own in the original code")
            index, layer = (None, shapes[path]) if name == path else (i, shapes[path][1:])
            like = rule.layout.inverse(np.broadcast_to(np.uint8(0), layer)).shape
            read = lambda p=path, i=index, r=rule: r.layout.inverse(keep(p, i))  # noqa: E731
            own[piece] = (like, source[path].dtype, read)
            if len(own) == count:
                out[key] = _joined([own[j] for j in range(count)], getattr(rule, "axis", 0))
    if absent := sorted(pieces.keys() - out.keys()):
        raise UserError(f"{absent[0]} is not whole: the weights lack a piece of it")
    out |= {other: out[key] for key, other in kind.copies.items()}
    for key, array in kind.extras(cfg).items():
        out[key] = (array.shape, array.dtype, lambda a=array: a)
    return out


def _joined(pieces: list[tuple], axis: int) -> tuple:
    """One tensor of the original out of the pieces that a `Split` made of it."""
    if len(pieces) == 1:
        return pieces[0]
    (shape, dtype, _), reads = pieces[0], [read for *_, read in pieces]
    size = sum(like[axis] for like, *_ in pieces)
    whole = (*shape[:axis], size, *shape[axis + 1 :])
    return whole, dtype, lambda: np.concatenate([read() for read in reads], axis=axis)


class _Last:
    """Reads tensors and keeps the last one, as the layers of a stack are asked for in turn."""

    def __init__(self, source: Mapping[str, Any]):
        self._source, self._path, self._array = source, None, None

    def __call__(self, path: str, index: int | None) -> np.ndarray:
        if path != self._path:
            self._array = None
            self._path, self._array = path, to_numpy(self._source[path])
        return self._array if index is None else self._array[index]


def read_config(folder: pathlib.Path) -> Any:
    """The configuration of a stored module, whatever kind it is.

    Raises:
      UserError: It is none of `KINDS`.
    """
    kind, settings = config_lib.read_json(folder / CONFIG_FILE)
    found = [config_type for config_type in KINDS if kind == kind_of(config_type)]
    if kind is None:  # of an earlier release, which may lack fields that came since
        fields = {t: {field.name for field in dataclasses.fields(t)} for t in KINDS}
        gone = {t: getattr(t, "RETIRED", {}).keys() for t in KINDS}
        found = [t for t in KINDS if settings.keys() <= fields[t] | gone[t]]
        found.sort(key=lambda config_type: len(fields[config_type]))
    if not found:
        raise UserError(f"{folder / CONFIG_FILE} is not of a module that has original names")
    return config_lib.from_json(found[0], folder / CONFIG_FILE)


def find_parts(model: pathlib.Path) -> list[pathlib.Path]:
    """Folders of the modules of a model, or the folder itself if it is one module.

    Raises:
      UserError: There is none.
    """
    if (model / WEIGHTS_FILE).is_file():
        return [model]
    parts = sorted(path.parent for path in model.glob(f"*/{WEIGHTS_FILE}"))
    if not parts:
        raise UserError(f"{model} holds no weights")
    return parts


@dataclasses.dataclass(frozen=True)
class Export:
    """The tensors of a model under original names: a `command.Result`."""

    tensors: Mapping[str, Any]
    report: Mapping[str, Any]
    summary: str
    problems: Sequence[str] = ()

    def write(self, args: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
        """Writes the file, whole or not at all."""
        write(pathlib.Path(args.out), self.tensors, converter=report["converter"])
        return report


def examine(args: argparse.Namespace) -> Export:
    """What is in a model; see the module's text.

    Raises:
      UserError: SOURCE is no model, or the file is in the way.
    """
    out = check_output(args.out, SUFFIXES)
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is already there; choose another --out, or add --overwrite")
    if out.exists() and not is_own(out):
        raise UserError(f"{out} was not written by this command; move it away, or name another")
    model = pathlib.Path(args.source)
    is_loose = any(model.glob(f"*/{WEIGHTS_FILE}")) and not (model / CONFIG_FILE).exists()
    if not is_loose and not (model / WEIGHTS_FILE).is_file():
        model = hub.find_model(args.source)
    check_no_source(out, [model])
    tensors: dict[str, Any] = {}
    sources: list[Source] = []
    for folder in find_parts(model):
        source = open_source(folder / WEIGHTS_FILE)
        sources.append(source)
        part = original_state_dict(source, read_config(folder))
        if read_metadata(folder).get("origin") == "divot":  # has the UNet one level higher
            part = {key.removeprefix("model."): value for key, value in part.items()}
        if twice := sorted(set(part) & set(tensors)):
            raise UserError(f"two parts of {model} hold {twice[0]}")
        tensors |= part
    if args.dtype is not None:
        keeps = lambda key, dtype: key in PERSISTENT_BUFFERS or dtype.kind == "i"  # noqa: E731
        tensors = {
            key: (shape, dtype if keeps(key, dtype) else plan.DTYPES[args.dtype], read)
            for key, (shape, dtype, read) in tensors.items()
        }
    report = {"keys": len(tensors), "parts": [str(s.files[0].parent.name) for s in sources]}
    return Export(tensors, report, f"{out}: {len(tensors)} tensors under original names")


def write(out: pathlib.Path, tensors: Mapping[str, Any], *, converter: str) -> None:
    """Writes a state dict to a safetensors or a torch file, whole or not at all.

    The file says which converter wrote it, in its header or in an entry that torch passes over.
    """
    pieces = {
        key: (shape, dtype, lambda read=read: iter([read()]))
        for key, (shape, dtype, read) in tensors.items()
    }
    header = {"format": "pt", "converter": converter}
    if out.suffix == ".safetensors":
        plan.write_safetensors(out, pieces, metadata=header)
        return
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as folder:
        middle = pathlib.Path(folder) / WEIGHTS_FILE  # read as a memory map by torch
        plan.write_safetensors(middle, pieces, metadata=header)
        with atomic_path(out) as temporary:
            torch.save(load_file(middle), temporary)
            archives.add_note(temporary, converter)


def is_own(path: pathlib.Path) -> bool:
    """Whether `write` wrote a file: weights of others have the same extensions."""
    try:
        is_torch = path.suffix != ".safetensors"
        note = archives.read_note(path) if is_torch else read_header(path)[1].get("converter", "")
    except UserError:
        return False
    return note.startswith(NAME + " ")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    what = "model folder, a part of one, or a name"
    options = command.parser(NAME, __doc__, source=what, out="FILE", dtype=None)
    return command.run(examine, options, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Language models in Hugging Face folders: what `convert.gpt2` and `convert.llama` share."""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from convert.engine import command
from convert.engine.found import MAX_BLOCKS
from convert.engine.plan import Kind
from convert.engine.rules import to_numpy
from convert.engine.sources import LazyTensor, open_source
from convert.engine.yaml import reading, typed
from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, printable
from dicode_jax.models.causal_lm import BodyConfig
from dicode_jax.storage.files import read_object
from dicode_jax.text.gpt import IMAGE_TOKENS, TextTokenizer

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
TEXT_FILES = ("config.json", *_TOKENIZER_FILES, "merges.txt", "added_tokens.json")
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")  # indices of shards too
# Options of all models without any effect on what is computed.
_IDLE = {
    *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels"),
    *("architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id"),
    *("id2label", "label2id", "output_attentions", "output_hidden_states", "pad_token_id"),
    *("torch_dtype", "transformers_version", "use_cache"),
}
# An option that we do not know matters if it is named like one of these; others are reported.
_MATTERS = re.compile(
    r"rope|rotary|position|alibi|norm|att(n|ention)|head|layer|window|qkv|mask|soft_?cap|quant"
    r"|(^|_)act(_|$|iv)|scal|multiplier|expert|moe|bias|parallel|(^|_)(is|add|use)_",
)
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of language model.

    Attributes:
      name: Of its module, and the key of its licence note.
      title: For messages.
      kind: How its weights are read.
      tables: Names that the token table may have.
    """

    name: str
    title: str
    kind: Kind
    tables: Sequence[str]


def read_options(
    config: Mapping[str, Any],
    *,
    title: str,
    neutral: Mapping[str, Any],
    idle: Iterable[str],
    take: Callable[[dict[str, Any]], Config],
) -> Config:
    """Our configuration for a `config.json` (or the part of it a fixture carries).

    Args:
      title: Of the model, for messages.
      neutral: Options that change what is computed -> the one value that is supported.
      idle: Options without any effect on what is computed, beside those of all models.
      take: Takes the other options out and makes the configuration of them.

    Raises:
      KeyError: A size is missing.
      ValueError: An option has a value that would change what is computed, or is unknown and named
        like what would; of other unknown ones a warning tells.
    """
    left = dict(config)
    for name, allowed in neutral.items():
        if name in left and (value := left.pop(name)) != allowed:
            raise ValueError(f"{name}={value!r} is not supported; only {allowed!r} is")
    out = take(left)
    unknown = [n for n in sorted(set(left) - _IDLE - set(idle)) if not _is_off(n, left[n])]
    if grave := [name for name in unknown if _MATTERS.search(name)]:
        raise ValueError(f"unknown option(s) of {title}: {', '.join(grave)}")
    if unknown:
        warnings.warn(
            f"options of the config that {title} does not have are passed over: "
            f"{printable(', '.join(unknown), 300)}",
            stacklevel=2,
        )
    return out


def _is_off(name: str, value: Any) -> bool:
    """Whether an option says that nothing is done."""
    return value in (None, {}, []) or (value is False and name.startswith(("is_", "add_", "use_")))


def untied_head(state_dict: Mapping[str, Any], tables: Sequence[str]) -> list[str]:
    """One line when the output matrix is not the token table."""
    return compare_head(state_dict, "lm_head.weight", table_of(state_dict, tables))


def table_of(state_dict: Mapping[str, Any], tables: Sequence[str]) -> str:
    """Name of the token table in a state dict, empty when there is none."""
    return next((name for name in tables if name in state_dict), "")


def compare_head(state_dict: Mapping[str, Any], head: str, table: str) -> list[str]:
    """One line when an output matrix is not the token table, as an untied head would be lost."""
    if head in state_dict and table in state_dict:
        left, right = state_dict[head], state_dict[table]
        same = tuple(left.shape) == tuple(right.shape)
        if not same or not np.array_equal(to_numpy(left), to_numpy(right)):
            return [f"{head} is not tied to {table}: an untied head is not supported"]
    return []


def grow(tensor: LazyTensor, rows: int, *, std: float) -> LazyTensor:
    """The table with more rows, drawn as the original draws new ones: normal, mean 0.

    The draw is always the same.
    """
    count, width = tensor.shape

    def read() -> np.ndarray:
        new = np.random.default_rng(0).normal(0, std, (rows, width))
        return np.concatenate([to_numpy(tensor), new.astype(tensor.dtype)])

    return LazyTensor((count + rows, width), tensor.dtype, read)


def main(family: Family, argv: Sequence[str] | None = None) -> int:
    """The command `python -m convert.<family> SOURCE --out OUT`; returns its exit status."""
    return command.run(functools.partial(examine, family), parser(family), argv)


def convert_for_dicode(family: Family, folder: pathlib.Path, out: pathlib.Path) -> str:
    """Does what `--for-dicode` does, in place of an OUT of its own; returns what it has to say.

    Raises:
      UserError: Something is missing, damaged, does not fit, or OUT is in the way.
    """
    options = parser(family)
    args = options.parse_args([str(folder), "--out", str(out), "--for-dicode", "--overwrite"])
    return command.perform(functools.partial(examine, family), args, options.prog)


def parser(family: Family) -> argparse.ArgumentParser:
    """The options of `main`."""
    options = command.parser(
        f"convert.{family.name}",
        f"{family.title} of Hugging Face to the body of a language model.",
        source="a folder with config.json and the weights, safetensors or .bin, in one file or in "
        "shards; or a name on the Hub, such as gpt2 or owner/name",
    )
    options.add_argument(
        "--for-dicode",
        action="store_true",
        help=f"append the {len(IMAGE_TOKENS)} image tokens to the tokenizer, if SOURCE holds one, "
        "and the rows that they lack to the token table, drawn as the original draws them (normal "
        "with the config's initializer_range, always the same)",
    )
    return options


def examine(family: Family, args: argparse.Namespace) -> command.Conversion:
    """What is in a folder; see `main`.

    Raises:
      UserError: Something is missing, damaged or not of this kind, or OUT is in the way.
    """
    reads = command.check_out(args, *TEXT_FILES, either=WEIGHTS, bare=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cfg, std = _read_family(family, args.source)
    source = open_source(args.source)
    if cfg.num_layers > min(len(source), MAX_BLOCKS):
        raise UserError(
            f"config.json names {cfg.num_layers} layers, for {len(source)} tensors; there may be "
            f"{MAX_BLOCKS}"
        )
    tensors: dict[str, Any] = dict(source)
    text, new, notes = {}, {}, [str(warning.message) for warning in told]
    if args.for_dicode:
        count = len(IMAGE_TOKENS)
        if any((args.source / name).is_file() for name in _TOKENIZER_FILES):
            text[""] = TextTokenizer.from_file(args.source)
            size = text[""].vocab_size
            if size > cfg.vocab_size + count:
                raise UserError(
                    f"the tokenizer in {args.source} has {size} ids with the image tokens, the "
                    f"token table {cfg.vocab_size + count} rows"
                )
            count = max(size - cfg.vocab_size, 0)  # a padded table has rows to spare
            first = text[""].image_start_id - 1
            notes.append(f"the image tokens have the ids {first} to {size - 1}")
        else:
            notes.append(f"{args.source} holds no tokenizer, so there is none in {args.out} either")
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size + count)
        for name in (table_of(tensors, family.tables), "lm_head.weight"):
            if name in tensors and len(tensors[name].shape) == 2:
                tensors[name] = grow(tensors[name], count, std=std)
        new = {"new_rows": {"count": count, "normal_std": std}}
        notes.append(f"{count} rows of the token table are new: normal, standard deviation {std}")
    done = family.kind.plan(tensors, cfg)
    report = done.report() | {"left_out": source.left_out, "config": config_lib.to_dict(cfg)} | new
    report |= {"notes": notes}
    first = f"{args.out}: {family.title}, {report['parameters']:,} parameters"
    return command.Conversion(
        origin=family.name,
        sources=[source],
        reads=reads,
        parts={"": command.Part(done, cfg, family.name)},
        text=text,
        report=report,
        problems=done.problems or family.kind.check(tensors, cfg),
        summary="\n".join([first, *notes]),
    )


def _read_family(family: Family, folder: pathlib.Path) -> tuple[BodyConfig, float]:
    """The configuration in a folder, and the standard deviation of fresh weights."""
    original = read_config(folder)
    with reading(f"{folder / 'config.json'} is not a config of {family.title}"):
        cfg = typed(family.kind.read(original))
        std = original.get("initializer_range", 0.02)
        if not isinstance(std, float) or not 0 < std < 1:
            raise ValueError(f"initializer_range must be between 0 and 1, got {std!r}")
    return cfg, std


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
      UserError: There is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not os.path.exists(path):
        raise UserError(f"no config.json in {folder}: want a folder of Hugging Face")
    return read_object(path, "a configuration")

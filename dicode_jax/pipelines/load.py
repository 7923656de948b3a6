"""Any model folder as the pipeline that it says it is: `dicode_jax.load`."""

import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dicode_jax import config as config_lib
from dicode_jax import kinds
from dicode_jax.errors import UserError
from dicode_jax.storage import hub
from dicode_jax.storage.weights import CONFIG_FILE, WEIGHTS_FILE

__all__ = ["load", "pipeline_kind"]

PIPELINES = {
    "dicode": "DiCoDePipeline",
    "dynamicrafter": "DynamiCrafterPipeline",
    "divot": "DivotDetokenizer",
    "ar_diffusion": "ARDiffusionPipeline",
    "landiff": "LanDiffPipeline",
}
"""Kind, which is the name of a module here too -> class."""

# Parts by which a folder of an earlier release is known, whose config says no kind; the first wins.
_PARTS_OF_OLD = {
    "dicode": ("decoder", "language_model", "tokenizer"),
    "dynamicrafter": ("text_tower", "image_tower"),
    "divot": ("unet", "autoencoder", "resampler"),
}


def load(
    path_or_name: str | os.PathLike | None = None,
    revision: str | None = None,
    *,
    dtype: Any = "auto",
    param_dtype: Any = None,
    how: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Loads a model of any kind: a folder, a model of the package, or one of the Hub.

        pipe = dicode_jax.load()
        pipe("a red circle moves right on a black background").save("circle.mp4")

    Args:
      path_or_name: A folder, the name of a packaged model, or `owner/name` on the Hugging Face Hub,
        which is downloaded once; None for the packaged default.
      revision: Branch, tag or commit on the Hub.
      dtype: Computing type; None for that of the parameters and inputs, "auto" for what suits the
        device, in weights and computing: float32 on CPUs, bfloat16 on accelerators, float16 on
        those that have no bfloat16 (LanDiff, which overflows in it, float32).
      param_dtype: Type of the weights in memory; None for what "auto" says, else float32. One that
        is given goes before "auto", which then leaves the computing type to it.
      how: What the kind of pipeline takes besides in `from_pretrained`.
      options: Of `hub.find_model`: `cache_dir`, `local_files_only`, `token`.

    Returns:
      The pipeline of the kind that the folder's `config.json` says: `DiCoDePipeline`,
      `DynamiCrafterPipeline`, `DivotDetokenizer`, `ARDiffusionPipeline` or `LanDiffPipeline`.

    Raises:
      UserError: There is no such model, it is no pipeline, or its files are broken or do not fit
        together.
    """
    folder = hub.find_model(path_or_name, revision=revision, **options)
    is_auto = isinstance(dtype, str) and dtype == "auto"
    if is_auto and param_dtype is not None:
        dtype = None
    return pipeline_class(pipeline_kind(folder)).from_pretrained(
        folder,
        dtype=dtype,
        param_dtype=jnp.float32 if param_dtype is None else param_dtype,
        **(how or {}),
    )


def pipeline_class(kind: str) -> Any:
    """The class of a kind of pipeline."""
    module = importlib.import_module(f"dicode_jax.pipelines.{kind}")
    return getattr(module, PIPELINES[kind])


def pipeline_kind(folder: str | os.PathLike) -> str:
    """Which pipeline a folder holds, a key of `PIPELINES`; no weights are read.

    Raises:
      UserError: It holds none; the line says what it is and what to do.
    """
    folder = pathlib.Path(folder)
    kind, settings = config_lib.read_json(folder / CONFIG_FILE)
    if kind in PIPELINES:
        return kind
    if kind in kinds.TRAININGS or (kind is None and {"optim", "num_steps"} <= settings.keys()):
        raise UserError(
            f"{folder} is the folder of a training{_named(kind)}; make a pipeline of it with: "
            f"dicode export {folder} --out MODEL"
        )
    if kind in kinds.MODULES or (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} is a single module{_named(kind)}; name the folder of a whole pipeline "
            f"({', '.join(PIPELINES)}), of which it can be a part"
        )
    for kind, parts in _PARTS_OF_OLD.items():
        if any((folder / part).is_dir() for part in parts):
            return kind
    raise UserError(f"{folder} is no model: its {CONFIG_FILE} says no kind, and no part lies there")


def check_kind(folder: str | os.PathLike, wanted: str) -> None:
    """Refuses a folder of another pipeline than `wanted`.

    Raises:
      UserError: It holds another one, or none (see `pipeline_kind`).
    """
    kind = pipeline_kind(folder)
    if kind != wanted:
        raise UserError(
            f"{folder} is of the kind {kind!r}, which {PIPELINES[wanted]} does not load; "
            "dicode_jax.load takes every kind"
        )


def _named(kind: str | None) -> str:
    return "" if kind is None else f" of the kind {kind!r}"

"""Modules that have moved: their old names work for one release, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings

# Old name -> new name, below `dicode_jax`.
MOVED = {
    "checkpoint": "training.checkpoint",
    "cli_arguments": "cli.arguments",
    "cli_data": "cli.data",
    "cli_runs": "cli.runs",
    "data.clip_text": "text.clip",
    "data.container": "media.container",
    "data.files": "storage.files",
    "data.packing": "stages.dicode.packing",
    "data.sources_array_record": "data.sources.array_record",
    "data.sources_folder": "data.sources.folder",
    "data.sources_shapes": "data.sources.shapes",
    "data.sources_table": "data.sources.table",
    "data.sources_tar": "data.sources.tar",
    "data.synthetic": "data.shapes_world",
    "data.text": "text.gpt",
    "data.token_cache": "data.encoded_cache",
    "data.transforms": "media.transforms",
    "data.video": "media.video",
    "distributed": "runtime.distributed",
    "hub": "storage.hub",
    "model_card": "storage.model_card",
    "models.dicode.lm_data": "stages.dicode.examples",
    "models.dicode.representation": "stages.dicode.representation_model",
    "models.dicode.stages": "stages.registry",
    "models.dicode.stages.autoencoder": "stages.autoencoder",
    "models.dicode.stages.configs": "stages.dicode.configs",
    "models.dicode.stages.language_model": "stages.dicode.language_model",
    "models.dicode.stages.parts": "stages.parts",
    "models.dicode.stages.representation": "stages.dicode.representation",
    "models.dicode.stages.tokenizer": "stages.dicode.tokenizer",
    "models.dicode.tokenizer_loss": "stages.dicode.tokenizer_loss",
    "models.dicode.trainable": "stages.dicode.trainable",
    "models.language_model": "models.causal_lm",
    "pipelines.export": "stages.export",
    "sharding": "runtime.sharding",
    "weights": "storage.weights",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives an old name a module that holds what the new one holds."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MOVED:
            return None
        is_package = any(old.startswith(f"{name}.") for old in MOVED)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)

    def create_module(self, spec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        new = f"{__package__}.{MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(
            f"{module.__name__} has moved to {new}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        found = vars(importlib.import_module(new))
        vars(module).update({name: x for name, x in found.items() if not name.startswith("__")})


def install() -> None:
    """Makes the old names work."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

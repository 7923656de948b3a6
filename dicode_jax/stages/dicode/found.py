"""What a language model's config leaves to the data and the tokenizer that it names: its sizes."""

import dataclasses
import pathlib

from dicode_jax import config as config_lib
from dicode_jax import kinds
from dicode_jax.data.encoded_cache import EncodedCache
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.pipelines import options
from dicode_jax.stages import parts
from dicode_jax.stages.dicode import configs
from dicode_jax.storage import hub


def with_world_tokenizer(config: configs.ARTrainConfig) -> configs.ARTrainConfig:
    """The config with the tokenizer of the package, where it trains on the drawn world by none."""
    if config.tokenizer is not None or config.data.path != "shapes":
        return config
    return dataclasses.replace(config, tokenizer=str(hub.find_model()))


def with_sizes(config: configs.ARTrainConfig) -> configs.ARTrainConfig:
    """The config with the number and width of deep tokens, and the frame size, that are given.

    They are those of the tokenizer, or of the token cache where none is named.

    Raises:
      UserError: There is neither, or the model cannot have these sizes.
    """
    if config.tokenizer is None and config.data.kind == "cache":
        cache = EncodedCache(config.data.path)
        spec = cache.schema.get("tokens")
        if spec is None:
            raise UserError(f"the cache {cache.folder} holds no tokens")
        if len(spec.shape) != 3:
            raise UserError(f"the tokens of the cache {cache.folder} have no shape [k, n, z]")
        (_, num_tokens, token_dim), size = spec.shape, cache.setting("frame_size")
        size = options.named(f"{cache.folder}: frame_size", options.SIDE, size)
    else:
        folder = config.tokenizer_folder
        tokenizer = parts.stored_config(folder / "tokenizer", DeepTokenizerConfig)
        num_tokens, token_dim = tokenizer.num_tokens, tokenizer.token_dim
        size = _frame_size(folder) or config.frame_size
    try:
        model = dataclasses.replace(config.model, num_tokens=num_tokens, token_dim=token_dim)
        return dataclasses.replace(config, model=model, frame_size=size)
    except ValueError as error:
        raise UserError(str(error)) from error


def _frame_size(folder: pathlib.Path) -> int | None:
    """That of a pipeline, or of the run whose `model` the folder is; None where nothing says it."""
    for path in (folder / kinds.CONFIG_FILE, folder.parent / kinds.CONFIG_FILE):
        if path.is_file():
            kind, settings = config_lib.read_json(path)
            size = settings.get("frame_size")
            if kind in (None, "dicode", *kinds.TRAININGS) and isinstance(size, int | float | str):
                return options.named(f"{path}: frame_size", options.SIDE, size)
    return None

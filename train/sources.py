"""What a config names of models elsewhere: folders, or names on the Hugging Face Hub.

`find_sources` puts folders in place of names, before a run notes its config; `prepare_sources`
makes the body besides that a language model starts from, of the original that `body_init` names.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils

from convert.engine.sources import open_source
from convert.parts import gpt2, hugging_face, llama
from dicode_jax.errors import Faults, UserError
from dicode_jax.storage import hub, weights

FAMILIES = {family.name: family for family in (gpt2.FAMILY, llama.FAMILY)}
TEXT = {"patterns": hugging_face.TEXT_FILES, "bare": True}
OPTIONS = {  # of `find_folder`, by the fields that name a folder
    **{field: {} for field in ("tokenizer", "init", "autoencoder", "representation", "vae")},
    **{field: {} for field in ("features", "semantic_tokenizer", "text_encoder", "base")},
    **{field: {} for field in ("lm_text", "dit_text")},
    "body_init": TEXT | {"either": hugging_face.WEIGHTS},
    "text_tokenizer": TEXT,
}
OF_RUN = "the `model` folder of a run of python -m "
WANTED = {
    "tokenizer": f"{OF_RUN}train.tokenizer or train.landiff_tokenizer, or what "
    "python -m convert made",
    "init": "the `model` folder of an earlier run, or what python -m convert --for-dicode made",
    "autoencoder": f"{OF_RUN}train.autoencoder",
    "representation": f"{OF_RUN}train.tokenizer on a representation",
    "vae": f"{OF_RUN}train.ar_diffusion_vae or train.landiff_vae, or a converted VAE",
    "semantic_tokenizer": f"{OF_RUN}train.landiff_tokenizer, or a converted LanDiff",
    "text_encoder": f"{OF_RUN}train.landiff_lm",
    **dict.fromkeys(
        ("lm_text", "dit_text"), "the folder of a T5 encoder with its vocabulary, or of a LanDiff"
    ),
    "base": f"{OF_RUN}train.landiff_diffusion, or a converted LanDiff or CogVideoX-2b",
    "features": "the folder of a frozen image encoder: a vit, a clip_vision or a dicode_tokenizer",
    "body_init": "a GPT-2 or Llama of Hugging Face, or what python -m convert made of one",
    "text_tokenizer": "a tokenizer.json, or the folder of one",
}
BODY = "body"  # what is converted, in the folder of the run


def find_sources(config: Any, faults: Faults | None = None) -> Any:
    """The config with folders in place of names on the Hub, whose files are fetched.

    A folder that is there wins over a name. `body_init` and `text_tokenizer` may be names without
    an owner too, such as `gpt2`. A folder is that of one commit, so that a run that goes on does so
    with what it began with.

    Args:
      faults: Gathers what is not found, in whose place the config gets something that is, so that
        the rest of it can be looked at; whoever gives it tells them.

    Raises:
      UserError: There is no such folder and no such name, or the Hub is not reached.
    """
    found, all_faults = {}, faults or Faults()
    for field in dataclasses.fields(config):
        name = getattr(config, field.name)
        if not isinstance(name, str) or field.name not in OPTIONS:
            continue
        found[field.name] = str(hub.find_model()) if field.name == "tokenizer" else None
        with all_faults.gather():
            found[field.name] = _find(field.name, name)
    if faults is None:
        all_faults.tell()
    return dataclasses.replace(config, **found)


def _find(field: str, name: str) -> str:
    try:
        return str(hub.find_folder(name, **OPTIONS[field]))
    except UserError as error:
        option = field.replace("_", "-")
        raise UserError(f"--{option} {name}: {error}; want {WANTED[field]}") from error


def prepare_sources(config: Any, workdir: pathlib.Path) -> Any:
    """`find_sources`, and a `body_init` of Hugging Face converted once into the run's folder.

    It gets rows for the image tokens, as by `python -m convert gpt2 --for-dicode`. Of several
    processes the first converts, and the others wait.

    Raises:
      UserError: As `find_sources`, or the original cannot be converted.
    """
    config = find_sources(config)
    original, out = getattr(config, "body_init", None), workdir / BODY
    if original is None or (family := _family(pathlib.Path(original))) is None:
        return config
    if jax.process_index() == 0 and not _is_made_from(out, pathlib.Path(original)):
        said = hugging_face.convert_for_dicode(family, pathlib.Path(original), out)
        print(f"{original} is converted:\n{said}", flush=True)
    multihost_utils.sync_global_devices("body")
    return dataclasses.replace(config, body_init=str(out))


def _family(folder: pathlib.Path) -> hugging_face.Family | None:
    """The family of an original folder; None for a body of ours."""
    path = folder / weights.CONFIG_FILE
    if not path.is_file() or "model_type" not in (config := hugging_face.read_config(folder)):
        return None
    if config["model_type"] not in FAMILIES:
        raise UserError(
            f"{folder} holds a model of the type {config['model_type']!r}, no body that is known; "
            f"known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[config["model_type"]]


def _is_made_from(body: pathlib.Path, original: pathlib.Path) -> bool:
    """Whether a body was converted from these very files."""
    if not (body / weights.WEIGHTS_FILE).is_file():
        return False
    return weights.read_sources(weights.read_metadata(body)) == open_source(original).sha256()

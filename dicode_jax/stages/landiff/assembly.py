"""A pipeline's folder of what LanDiff's four trainings leave, written by the last of them."""

import pathlib
import shutil
import warnings
from typing import Any

from dicode_jax import config as config_lib
from dicode_jax.diffusion.samplers.subsampled import subsampled_time_grid
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.features import encoder_config
from dicode_jax.pipelines.landiff import (
    PARTS,
    LanDiffConfig,
    LanDiffPipeline,
    LanDiffSamplingConfig,
)
from dicode_jax.stages import parts
from dicode_jax.stages.landiff.cached import part_folder
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig, LMTrainConfig
from dicode_jax.storage import weights

FILES = (weights.CONFIG_FILE, weights.WEIGHTS_FILE, "tokenizer.json", "spiece.model")
TOKENIZERS = ("semantic_tokenizer", "tokenizer")  # as a pipeline and a run call it


def sources(config: DiffusionTrainConfig) -> dict[str, pathlib.Path]:
    """Where the parts lie that a pipeline has beside its denoiser, by name.

    Without an autoencoder or a text encoder there is no pipeline, and nothing is named.

    Raises:
      UserError: A folder that is named does not hold its part.
    """
    if config.vae is None or config.text_encoder is None or config.semantic_tokenizer is None:
        return {}
    named = {
        "vae": part_folder(config.vae, "vae"),
        "semantic_tokenizer": part_folder(config.semantic_tokenizer, *TOKENIZERS),
    }
    writer = pathlib.Path(config.language_model or config.text_encoder)
    for name in ("language_model", "text_encoder", "painter_text"):
        named[name] = writer / name
    if config.language_model is not None:
        named["painter_text"] = part_folder(config.text_encoder, "text_encoder")
    named["features"] = pathlib.Path(config.semantic_tokenizer) / "features"
    optional = ("painter_text", "features")
    found = {name: at for name, at in named.items() if (at / weights.WEIGHTS_FILE).is_file()}
    if missing := [name for name in named if name not in (*found, *optional)]:
        at = named[missing[0]].parent
        raise UserError(f"no {' and no '.join(missing)} in {at}, which the pipeline needs")
    return found


def check(config: DiffusionTrainConfig) -> None:
    """Refuses parts that would make no pipeline, before the last of them is trained.

    Raises:
      UserError: A part is not there, does not fit the others, or there are no such settings.
    """
    if not (found := sources(config)):
        return
    configs: dict[str, Any] = {"denoiser": config.model}
    for name, folder in found.items():
        if name == "features":  # which may be of several kinds
            configs[name] = encoder_config(folder)
        else:
            configs[name] = parts.stored_config(folder, PARTS[name][1])
    LanDiffPipeline.check_fit(settings(config), configs)


def write(config: DiffusionTrainConfig, folder: pathlib.Path) -> None:
    """Puts all that the config names beside the denoiser, and `config.json`; see `sources`."""
    found = sources(config)
    for name, source in found.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / name / file)
    if found:
        config_lib.to_json(settings(config), folder / weights.CONFIG_FILE)


def settings(config: DiffusionTrainConfig) -> LanDiffConfig:
    """What the pipeline knows: of the denoiser's training, and of the language model's.

    Raises:
      UserError: A pipeline takes no such settings.
    """
    steps, noise = config.sample_steps, config.model.schedule.num_timesteps
    try:
        subsampled_time_grid(steps, noise)
    except ValueError as error:
        raise UserError(f"sample_steps is {steps}: {error}") from error
    return LanDiffConfig(
        fps=config.data.fps or LanDiffConfig.fps,
        prefix_latents=config.num_known or LanDiffConfig.prefix_latents,
        sampling=LanDiffSamplingConfig(
            guidance_scale=config.text_guidance,
            temperature=config.text_temperature,
            motion_score=config.motion_score,
            num_inference_steps=config.sample_steps,
            diffusion_guidance_scale=config.sample_guidance,
            ramp="smooth",
        ),
        **_written_with(pathlib.Path(str(config.language_model or config.text_encoder))),
    )


def _written_with(writer: pathlib.Path) -> dict[str, Any]:
    """How much a language model was trained to read: its run says so, or it is a pipeline's."""
    for folder in (writer, writer.parent):
        path = folder / weights.CONFIG_FILE
        kind = config_lib.read_json(path)[0] if path.is_file() else None
        if kind == "landiff":
            known = config_lib.from_json(LanDiffConfig, path)
            return {"text_length": known.text_length, "max_segments": known.max_segments}
        if kind == "landiff_lm_training":
            lm = config_lib.from_json(LMTrainConfig, path)
            return {"text_length": lm.text_length, "max_segments": lm.segments}
    defaults = LanDiffConfig()
    warnings.warn(
        f"nothing beside {writer} says how its language model was trained, so that the pipeline "
        f"reads {defaults.text_length} text tokens and goes on behind all segments: name its run's "
        "own `model` folder, or set text_length and max_segments in the pipeline's config.json",
        stacklevel=2,
    )
    return {}

"""From a checkpoint of a training to the folder that pipelines, or other trainings, read."""

import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax import kinds
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.pipelines.dicode import DiCoDePipeline, PipelineConfig
from dicode_jax.pipelines.load import PIPELINES, load
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.dicode import configs
from dicode_jax.stages.dicode.vocabulary import with_kept_text
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import hub, weights
from dicode_jax.storage.files import parse_json, short
from dicode_jax.storage.folders import check_folder, new_folder
from dicode_jax.text.gpt import TextTokenizer
from dicode_jax.training.checkpoint import is_checkpoint, read_parameters
from dicode_jax.training.setup import create_model, plan_stage
from dicode_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: of which step, whether a pipeline, and one that makes videos alone."""

    step: int
    is_pipeline: bool
    generates: bool


def export(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    use_ema: bool = True,
    tokenizer: str | os.PathLike | None = None,
    dtype: str = "float32",
    settings: Sequence[str] = (),
) -> Exported:
    """Writes a checkpoint as a folder, whole or not at all.

    A run of the language model makes a pipeline together with the tokenizer and decoder that it
    was trained on, a run of the tokenizer one without a language model, and one of AR-Diffusion's
    or LanDiff's denoiser a pipeline where its config names the other parts. Other runs make the
    parts that trainings read, as in their `model` folder.

    Args:
      checkpoint: Folder of a run, its `checkpoints`, or one of these.
      out: A new folder.
      step: Which checkpoint; None takes the newest.
      use_ema: Take the moving average of the weights when there is one.
      tokenizer: Folder with the `tokenizer` and `decoder` for a language model, or `owner/name` on
        the Hub; None takes the one that its config names.
      dtype: Storage type of a pipeline's weights.
      settings: What a pipeline's config shall say besides, such as `generation.var_scale=0.1`.

    Raises:
      UserError: There is no such checkpoint or setting, a part that the config names is missing, or
        the folder cannot be written.
    """
    workdir, step = _find_run(pathlib.Path(checkpoint), step)
    config = read_run_config(workdir / weights.CONFIG_FILE)
    has_lm = isinstance(config, configs.ARTrainConfig)
    is_dicode = has_lm or isinstance(config, configs.TokenizerTrainConfig)
    if is_dicode:  # before the work
        _with_settings(PipelineConfig(), settings)
    elif getattr(config, "vae", None) is None:
        _refuse_of_parts(workdir, settings, dtype)
    if isinstance(config, configs.ARTrainConfig):
        # All of the language model is in the checkpoint, wherever the run once started.
        named = config.tokenizer if tokenizer is None else str(hub.find_folder(tokenizer))
        config = dataclasses.replace(config, init=None, body_init=None, tokenizer=named)
        config = with_kept_text(config, workdir)
        _check_tokenizer(config)
    elif tokenizer is not None:
        raise UserError(f"{workdir} trained no language model, so that --tokenizer says nothing")
    sources = [workdir / "checkpoints", workdir / weights.CONFIG_FILE]
    if isinstance(config, configs.ARTrainConfig):
        sources += [config.tokenizer_folder / name for name in ("tokenizer", "decoder")]
    target = check_folder(out, sources=sources)
    stage = build_stage(config)
    step, model = load_model(stage, workdir, step=step, use_ema=use_ema)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".{short(target.name)}-"
        ) as parts:
            stage.export(model, pathlib.Path(parts))
            if not is_dicode and not _is_pipeline(parts):
                _refuse_of_parts(workdir, settings, dtype)
                with new_folder(out, sources=sources) as folder:
                    shutil.copytree(parts, folder, dirs_exist_ok=True)
                return Exported(step, False, False)
            pipe = _assemble(config, pathlib.Path(parts)) if is_dicode else load(parts, dtype=None)
            pipe.config = _with_settings(pipe.config, settings)
            pipe.save_pretrained(out, dtype=dtype)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return Exported(step, True, has_lm or not is_dicode)


def _refuse_of_parts(workdir: pathlib.Path, settings: Sequence[str], dtype: str) -> None:
    if settings or dtype != "float32":
        said = "--set" if settings else "--dtype"
        raise UserError(f"{workdir} gives no pipeline, so that {said} says nothing")


def _is_pipeline(folder: str) -> bool:
    path = pathlib.Path(folder) / weights.CONFIG_FILE
    return path.is_file() and config_lib.read_json(path)[0] in PIPELINES


def load_model(
    stage: Stage, workdir: pathlib.Path, *, step: int | None = None, use_ema: bool = True
) -> tuple[int, nnx.Module]:
    """The step and the whole model of a checkpoint, on one device.

    What was trained is read from the checkpoint; the rest is loaded or drawn as at the start of
    the run.

    Raises:
      UserError: There is no such checkpoint, or a folder that the stage loads is missing.
    """
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    plan = plan_stage(stage, mesh)
    places = plan.shardings.state.params
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plan.state.params, places
    )
    step, params = read_parameters(workdir, like, step=step, use_ema=use_ema)
    trained = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    load = lambda: {**stage.load(), **trained}  # noqa: E731
    return step, create_model(dataclasses.replace(stage, load=load), mesh)


def read_run_config(path: pathlib.Path) -> Any:
    """The config of a run, told by its kind; in runs of earlier releases by the fields.

    Raises:
      UserError: The file is missing, or is none that a training wrote.
    """
    kind, settings = config_lib.read_json(path)
    if kind in kinds.TRAININGS:
        return config_lib.from_json(kinds.config_type(kind), path)
    for config_type in map(kinds.config_type, kinds.TRAININGS):
        known = {field.name for field in dataclasses.fields(config_type)}
        if kind is None and settings.keys() <= known | config_type.RETIRED.keys():
            return config_lib.from_json(config_type, path)
    raise UserError(f"{path} is not the configuration of a training")


def _find_run(checkpoint: pathlib.Path, step: int | None) -> tuple[pathlib.Path, int | None]:
    """The run's folder, and the step that the name of a single checkpoint says."""
    folder = checkpoint.resolve()
    if folder.parent.name == "checkpoints" and is_checkpoint(folder):
        if step not in (None, int(folder.name)):
            raise UserError(f"{checkpoint} is not the checkpoint of step {step}")
        folder, step = folder.parent, int(folder.name)
    workdir = folder.parent if folder.name == "checkpoints" else folder
    if not os.path.isdir(workdir / "checkpoints"):
        raise UserError(f"no checkpoints in {workdir}; name the --workdir of a training")
    return workdir, step


def _check_tokenizer(config: configs.ARTrainConfig) -> None:
    if config.tokenizer is None:
        raise UserError(
            "the run read a token cache and names no tokenizer; give the `model` folder of the "
            "tokenizer run that the cache was made with as --tokenizer"
        )
    folder = config.tokenizer_folder
    missing = [name for name in ("tokenizer", "decoder") if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"no {' and no '.join(missing)} in {folder}; give the `model` folder of the tokenizer "
            "run as --tokenizer"
        )


def _assemble(config: Any, exported: pathlib.Path) -> DiCoDePipeline:
    """The pipeline of what a stage wrote."""
    load = functools.partial(weights.load_module, on_host=True)
    language_model = text = None
    folder = exported
    if isinstance(config, configs.ARTrainConfig):
        language_model = load(exported, DiCoDeLM, DiCoDeLMConfig)[0]
        text = TextTokenizer.from_file(exported)
        folder = config.tokenizer_folder
    tokenizer = load(folder / "tokenizer", DeepTokenizer, DeepTokenizerConfig)[0]
    decoder, _ = load(folder / "decoder", ClipDecoder, ClipDecoderConfig)
    return DiCoDePipeline(
        tokenizer=tokenizer,
        decoder=decoder,
        language_model=language_model,
        text=text,
        config=_pipeline_config(config, decoder.cfg),
        metadata={name: weights.read_metadata(folder / name) for name in ("tokenizer", "decoder")},
    )


def _with_settings(config: Any, settings: Sequence[str]) -> Any:
    """A pipeline's config that says this besides."""
    data = config_lib.to_dict(config)
    for setting in settings:
        name, _, value = setting.partition("=")
        *path, field = name.replace("-", "_").split(".")
        try:
            known = functools.reduce(dict.__getitem__, path, data)
            is_name = isinstance(known.get(field), str) and not value.startswith('"')
            known[field] = value if is_name else parse_json(value, setting)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"want settings of a pipeline, such as generation.var-scale=0.1, got {setting!r}"
            ) from error
    return config_lib.from_dict(type(config), data)


def _pipeline_config(config: Any, decoder: ClipDecoderConfig) -> PipelineConfig:
    """Sizes and sampling defaults: those of the training of the decoder, where they are known."""
    if isinstance(config, configs.TokenizerTrainConfig):
        return PipelineConfig(
            frame_size=config.frame_size,
            fps=config.data.fps or PipelineConfig.fps,
            sampling=SamplingConfig(
                num_frames=config.data.num_frames,
                num_inference_steps=config.sample_steps,
                guidance_scale=config.sample_guidance,
                fs=decoder.unet.default_fs if config.fs is None else config.fs,
                batch_guidance=True,
            ),
        )
    folder = config.tokenizer_folder
    if (folder / weights.CONFIG_FILE).is_file():  # a pipeline
        of_decoder = config_lib.from_json(PipelineConfig, folder / weights.CONFIG_FILE)
    elif (folder.parent / weights.CONFIG_FILE).is_file():  # the `model` of a run
        of_decoder = _pipeline_config(read_run_config(folder.parent / weights.CONFIG_FILE), decoder)
    else:
        frames = decoder.unet.temporal_length or SamplingConfig.num_frames
        fs = decoder.unet.default_fs
        scale = SamplingConfig.guidance_scale if decoder.latent_prior is None else 1.0
        sampling = SamplingConfig(
            num_frames=frames, fs=fs, batch_guidance=True, guidance_scale=scale
        )
        of_decoder = PipelineConfig(frame_size=config.frame_size, sampling=sampling)
    generation = of_decoder.generation
    if (temperature := config.logits_temperature) is not None:
        generation = dataclasses.replace(generation, logits_temperature=temperature)
    return dataclasses.replace(of_decoder, text_length=config.text_length, generation=generation)

"""Training of LanDiff's denoiser (arXiv 2503.04606): control of a frozen base, or all at once.

The release has the loss, which is the plain error of v, and trains the control branch, the
upsampler and its last convolution, with a tenth of the texts zeroed; it has no loop. Its code means
to start the control branch as a copy of the base, and does not; here it is one, by name. A clean
prefix is in its loss too, and off; in which share of the windows there is one is ours.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.data.sources.open import kind_of
from dicode_jax.diffusion.losses import diffusion_loss
from dicode_jax.errors import Faults, UserError
from dicode_jax.kinds import kind_of as kind_name
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig, DiTConfig, make_base
from dicode_jax.models.landiff.sampling import WindowSampling, sample_window
from dicode_jax.models.landiff.semantic_tokenizer import (
    SemanticDecoder,
    SemanticTokenizer,
    SemanticTokenizerConfig,
)
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.nn.quantizer import Quantizer
from dicode_jax.nn.resnet import fan_in_uniform
from dicode_jax.nn.rngs import blank, draw, row_keys, split, stream
from dicode_jax.stages import parts
from dicode_jax.stages.landiff import assembly
from dicode_jax.stages.landiff.assembly import TOKENIZERS
from dicode_jax.stages.landiff.cached import part_folder
from dicode_jax.stages.landiff.generation_config import DiffusionTrainConfig
from dicode_jax.stages.landiff.language_model import TEXT_ENCODER
from dicode_jax.stages.landiff.windows import batch_shapes
from dicode_jax.storage import weights
from dicode_jax.text.t5 import T5Tokenizer
from dicode_jax.training.stage import Path, Stage
from dicode_jax.typing import Array, Bool, Float, Int, UInt8

DENOISER = "denoiser"  # as a pipeline calls it
LAST_LAYER = ("dit", "head", "linear")
TRANSFORMER = "transformer"  # as a converted CogVideoX calls a base alone


class CodeReader(nnx.Module):
    """Of the semantic tokenizer what makes features of codes."""

    def __init__(self, cfg: SemanticTokenizerConfig, *, dtype=None, rngs: nnx.Rngs):
        self.decoder = SemanticDecoder(cfg, dtype=dtype, rngs=rngs)
        sizes = {"num_codes": cfg.codebook_size, "code_dim": cfg.code_dim}
        self.quantizer, self.dtype = Quantizer(cfg.token_dim, **sizes, rngs=rngs), dtype

    def __call__(
        self, codes: Int[Array, "b m n"], offset: Int[Array, " b"], num_frames: int
    ) -> Float[Array, "b f y x c"]:
        """Features of frames from `offset` of segments on; the first stands for any before."""
        b = len(codes)
        tokens = self.quantizer.decode(rearrange(codes, "b m n -> (b m) n"))
        x = self.decoder(tokens if self.dtype is None else tokens.astype(self.dtype))
        frames = jnp.maximum(offset[:, None] + jnp.arange(num_frames), 0)
        x = rearrange(x, "(b m) s y x c -> b (m s) y x c", b=b)
        return jnp.take_along_axis(x, frames[:, :, None, None, None], axis=1)


class Painter(nnx.Module):
    """The denoiser that learns, and what makes its conditions: codes to features, ids to text."""

    def __init__(self, config: DiffusionTrainConfig, *, rngs: nnx.Rngs):
        dtype = parts.compute_dtype(config)
        self.denoiser = Denoiser(config.model, dtype=dtype, rngs=rngs)
        if config.control_start == "drawn":
            _draw_control(self.denoiser, rngs)
        self.codes = CodeReader(config.semantic, dtype=dtype, rngs=rngs)
        self.text = config.text and T5Encoder(config.text, dtype=dtype, rngs=rngs)

    def context(self, text: Array) -> Float[Array, "b l e"]:
        """Encoded text; as in the release, padding is encoded and read as if it were words."""
        return text if self.text is None else self.text(self.text.embed_tokens(text))


def _draw_control(denoiser: Denoiser, rngs: nnx.Rngs) -> None:
    """Gives what would start at zero the sizes of other layers."""
    blocks: Any = denoiser.control.blocks
    for block in blocks if isinstance(blocks, nnx.List) else [blocks]:
        kernel = block.zero.kernel
        lead = tuple(range(kernel.ndim - 2))  # of stacked layers
        xavier = nnx.initializers.xavier_uniform(batch_axis=lead)
        kernel[...] = xavier(rngs.params(), kernel.shape, kernel.dtype)
    kernel = denoiser.semantic.to_latents.kernel
    kernel[...] = fan_in_uniform(rngs.params(), kernel.shape, kernel.dtype)


def settle(
    config: DiffusionTrainConfig,
    workdir: pathlib.Path | None = None,
    faults: Faults | None = None,
) -> DiffusionTrainConfig:
    """The config with what it leaves to its data and to the models it names: kind and sizes.

    Raises:
      UserError: The data are no cache, or a model is missing or does not fit; all that is wrong is
        told.
    """
    del workdir
    steps = (_with_kind, _with_tokenizer, _with_text, _with_pipeline)
    return (faults or Faults()).through(config, *steps)


def _with_kind(config: DiffusionTrainConfig) -> DiffusionTrainConfig:
    if kind_of(config.data) != "cache":
        raise UserError(
            f"{config.data.path} is no cache: the denoiser learns latents and reads codes, which "
            "train.encode makes of videos"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, kind="cache"))


def _with_tokenizer(config: DiffusionTrainConfig) -> DiffusionTrainConfig:
    if config.semantic_tokenizer is None:
        raise UserError(
            "codes are read by a semantic tokenizer: name the `model` folder of its training "
            "(--semantic-tokenizer MODEL)"
        )
    folder = part_folder(config.semantic_tokenizer, *TOKENIZERS)
    return _fitting(config, folder, semantic=parts.stored_config(folder, SemanticTokenizerConfig))


def _with_text(config: DiffusionTrainConfig) -> DiffusionTrainConfig:
    if config.text is None:
        return config
    if config.text_encoder is None:
        raise UserError(
            "texts are read by a text encoder: name the `model` folder of the language model's "
            "training (--text-encoder MODEL)"
        )
    folder = part_folder(config.text_encoder, TEXT_ENCODER)
    return _fitting(config, folder, text=parts.stored_config(folder, T5EncoderConfig))


def _with_pipeline(config: DiffusionTrainConfig) -> DiffusionTrainConfig:
    """What is missing or impossible at the end is known at the beginning.

    Raises:
      UserError: A part of the pipeline is not there, does not fit the others, or its settings are
        none.
    """
    assembly.check(config)
    return config


def _fitting(config: DiffusionTrainConfig, folder: pathlib.Path, **sizes) -> DiffusionTrainConfig:
    try:
        return dataclasses.replace(config, **sizes)
    except ValueError as error:
        raise UserError(f"{folder} does not fit the config: {error}") from error


def read_words(config: DiffusionTrainConfig) -> T5Tokenizer | None:
    """The vocabulary of the text encoder; None where a frozen one has read.

    Raises:
      UserError: There is none.
    """
    if config.text is None or config.text_encoder is None:
        return None
    return T5Tokenizer.from_file(part_folder(config.text_encoder, TEXT_ENCODER))


def make_stage(config: DiffusionTrainConfig) -> Stage:
    """Batches are windows as `windows.Windows` describes them."""
    return Stage(
        name="landiff_diffusion",
        config=config,
        create=lambda rngs: Painter(config, rngs=rngs),
        load=functools.partial(load, config),
        is_trained=functools.partial(is_trained, config),
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=functools.partial(batch_shapes, config),
        export=functools.partial(export, config),
    )


def is_trained(config: DiffusionTrainConfig, path: Path, _) -> bool:
    """The denoiser without its tables of positions, or of it all but the base, or its upsampler."""
    if path[0] != "denoiser" or path[-1] == "positions":
        return False
    if not config.denoising_weight:
        return path[1] == "semantic"
    return config.trained == "all" or path[1] != "dit"


def load(config: DiffusionTrainConfig) -> dict[Path, Any]:
    """What the config names: a denoiser or a base, and the frozen encoders.

    Raises:
      UserError: A folder is missing, or holds a model of other sizes than the config's.
    """
    loaded: dict[Path, Any] = {}
    if config.init is not None:
        loaded |= denoiser_arrays(config.init, config.model, upsampler=config.init_upsampler)
    elif config.base is not None:
        loaded |= denoiser_arrays(config.base, config.model, base_alone=True)
    if config.semantic_tokenizer is not None:
        folder = part_folder(config.semantic_tokenizer, *TOKENIZERS)
        read, cfg = weights.load_module(
            folder, SemanticTokenizer, SemanticTokenizerConfig, on_host=True
        )
        _check_same(folder, cfg, config.semantic)
        loaded |= parts.leaves(read.decoder, "codes", "decoder")
        loaded |= parts.leaves(read.quantizer, "codes", "quantizer")
    if config.text is not None and config.text_encoder is not None:
        folder = part_folder(config.text_encoder, TEXT_ENCODER)
        text, cfg = weights.load_module(folder, T5Encoder, T5EncoderConfig, on_host=True)
        _check_same(folder, cfg, config.text)
        loaded |= parts.leaves(text, "text")
    return loaded


def _check_same(folder, stored, wanted) -> None:
    same = {"scan_layers", "remat"}  # what changes no number
    held, asked = (
        {k: x for k, x in vars(cfg).items() if k not in same} for cfg in (stored, wanted)
    )
    if held != asked:
        wrong = next(name for name in held if held[name] != asked[name])
        raise UserError(
            f"{folder} holds a model of other sizes than the config's: {wrong} {held[wrong]}, not "
            f"{asked[wrong]}"
        )


def denoiser_arrays(
    folder: str, wanted: DenoiserConfig, *, base_alone: bool = False, upsampler: bool = True
) -> dict[Path, Any]:
    """Arrays of a stored denoiser by paths of the wanted one, however either keeps its layers.

    Args:
      base_alone: Takes its transformer, which may lie there alone, and the lower layers of that
        for those of the control branch too; what lies between the two and the upsampler are left
        out.
      upsampler: Whether that is taken too.

    The last layer is left out where the two differ in `semantic_prior`: what it said is not what it
    is to say, and at zero it says what the prior knows.

    Raises:
      UserError: It is missing or of other sizes.
    """
    part = part_folder(folder, *((DENOISER, TRANSFORMER) if base_alone else (DENOISER,)))
    kind, _ = config_lib.read_json(part / weights.CONFIG_FILE)
    if base_alone and kind == kind_name(DiTConfig):
        base, dit = weights.load_module(part, make_base, DiTConfig, on_host=True)
        cfg = DenoiserConfig(dit=dit, control_layers=dit.num_layers)
        held = dict(_by_layer(parts.leaves(base, "dit"), cfg))
    else:
        model, cfg = weights.load_module(part, Denoiser, DenoiserConfig, on_host=True)
        held = dict(_by_layer(parts.leaves(model), cfg))
    _check_same(part, cfg.dit, wanted.dit)
    if not base_alone:
        same: dict[str, Any] = {"dit": wanted.dit, "semantic_prior": wanted.semantic_prior}
        if not upsampler:
            same["upsampler"] = wanted.upsampler
        _check_same(part, dataclasses.replace(cfg, **same), wanted)
    keeps_last = cfg.semantic_prior == wanted.semantic_prior
    found: dict[Path, Any] = {}
    state = nnx.state(blank(Denoiser, wanted))
    for path, leaf in nnx.to_flat_state(state):
        if path[:3] == LAST_LAYER and not keeps_last:
            continue
        if path[0] == "semantic" and not upsampler:
            continue
        names = list(_layer_names(path, wanted))
        if base_alone:
            names = [_in_base(name) for name in names]
        if any(name is None for name in names):
            continue
        arrays = [held[name] for name in names if name is not None]
        is_stack = len(leaf.shape) > arrays[0].ndim
        found["denoiser", *path] = np.stack(arrays) if is_stack else arrays[0]
    return found


def _stack_of(path: Path) -> tuple[str, ...] | None:
    stacks = (("dit", "lower_blocks"), ("dit", "upper_blocks"), ("control", "blocks"))
    return next((stack for stack in stacks if path[:2] == stack), None)


def _layer_names(path: Path, cfg: DenoiserConfig) -> Iterator[Path]:
    """What is at a path, as `(part, number of the layer, ...)`: one, or all of a stack."""
    if (stack := _stack_of(path)) is None:
        yield path
        return
    upper = stack[1] == "upper_blocks"
    first = cfg.control_layers if upper else 0
    count = cfg.dit.num_layers - first if upper else cfg.control_layers
    if isinstance(path[2], int):
        yield (stack[0], first + path[2], *path[3:])
    else:
        yield from ((stack[0], first + i, *path[2:]) for i in range(count))


def _by_layer(arrays: dict[Path, Array], cfg: DenoiserConfig) -> Iterator[tuple[Path, Array]]:
    for path, array in arrays.items():
        names = list(_layer_names(path, cfg))
        if _stack_of(path) is None or isinstance(path[2], int):
            yield names[0], array
        else:
            yield from zip(names, array, strict=True)


def _in_base(name: Path) -> Path | None:
    """Of what a part of the denoiser is the copy, None for what the base has not."""
    if name[0] == "dit":
        return name
    if name[0] != "control" or "zero" in name:
        return None
    return ("dit", *(part for part in name[1:] if part != "layer"))


def conditions(
    model: Painter, batch, num_latents: int
) -> tuple[Float[Array, "b l e"], Float[Array, "b f h w c"]]:
    """Text and so many semantic latents of a batch."""
    num_past = model.denoiser.cfg.upsampler.num_past
    seen = model.codes(batch["codes"], batch["offset"] - num_past, num_past + num_latents)
    past, features = seen[:, :num_past], seen[:, num_past:]
    return model.context(batch["text"]), model.denoiser.semantic_latents(features, past)


def loss_fn(
    config: DiffusionTrainConfig, model: Painter, batch, keys: Array, *, deterministic: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Error of v; `last` is that of the last latent, which no prefix holds.

    With a `semantic_weight` the error of the semantic latents counts too, `semantic`; without a
    `denoising_weight` that one alone.

    Args:
      deterministic: Drop no text.
    """
    latents = batch["latents"][:, : config.seen].astype(jnp.float32)
    b, f = latents.shape[:2]
    time_keys, noise_keys, drop_keys, prefix_keys = split(row_keys(keys, b), 4)
    steps = config.model.schedule.num_timesteps
    times = draw(lambda key, shape: jax.random.randint(key, shape, 0, steps), time_keys, (b,))
    noise = draw(jax.random.normal, noise_keys, latents.shape)
    context, semantic = conditions(model, batch, f)
    counts = 1 + config.detail_weight * detail(latents) if config.detail_weight else None
    loss, metrics = jnp.float32(0), {}
    if config.semantic_weight:
        off = jnp.square(semantic.astype(jnp.float32) - latents)
        metrics["semantic"] = off.mean()
        pull = metrics["semantic"] if counts is None else (counts * off).mean()
        loss += config.semantic_weight * pull
    if not config.denoising_weight:
        return loss, metrics
    if config.text_dropout and not deterministic:
        is_dropped = draw(jax.random.uniform, drop_keys, (b,)) < config.text_dropout
        context = jnp.where(is_dropped[:, None, None], 0, context)
    has_prefix = draw(jax.random.uniform, prefix_keys, (b,)) < config.prefix_share
    clean = has_prefix[:, None] & (jnp.arange(f) < config.num_known)
    error, told = denoising_loss(
        model.denoiser, latents, context, semantic, times, noise, clean, weights=counts
    )
    return loss + config.denoising_weight * error, metrics | told


def detail(latents: Float[Array, "b f h w c"]) -> Float[Array, "b f h w 1"]:
    """How much of a frame's detail lies at each place of its latents, 1 on the mean of a frame.

    Detail is the squared distance from the mean of the frame: that of a small object adds up to as
    much as that of a large one. A frame of one colour has none.
    """
    mean = latents.mean((-3, -2), keepdims=True)
    squares = jnp.square(latents - mean).mean(-1, keepdims=True)
    return squares / jnp.maximum(squares.mean((-3, -2), keepdims=True), 1e-6)


def denoising_loss(
    denoiser: Denoiser,
    latents: Float[Array, "b f h w c"],
    context: Float[Array, "b l e"],
    semantic: Float[Array, "b f h w c"],
    timesteps: Int[Array, " b"],
    noise: Float[Array, "b f h w c"],
    clean: Bool[Array, "b f"],
    *,
    weights: Float[Array, "b f h w 1"] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss for given draws; frames that are `clean` are seen so and do not count.

    With a `semantic_prior` the error counts as that of the network's own output, whose target has
    variance 1 where the prior is right.

    Args:
      weights: What errors count at each place; 1 when None.
    """
    prior = denoiser.cfg.prior
    loss, metrics = diffusion_loss(
        lambda x, t: denoiser(x, t, context, semantic),
        denoiser.cfg.schedule,
        latents,
        timesteps,
        noise,
        sample_weights=None if prior is None else prior.output_std(timesteps, 1) ** -2,
        clean=clean,
        element_weights=weights,
    )
    return loss, {"last": metrics["loss_per_frame"][:, -1].mean()}


def paint(config: DiffusionTrainConfig, model: Painter, batch) -> Float[Array, "b f h w c"]:
    """Scaled latents of windows without a prefix, from fixed noise."""
    context, semantic = conditions(model, batch, config.model.dit.num_frames)
    sampling = WindowSampling(
        num_inference_steps=config.sample_steps,
        guidance_scale=config.sample_guidance,
        ramp="smooth",
    )
    keys = row_keys(stream(0, "sheet"), len(context))
    return sample_window(model.denoiser, context, semantic, sampling, keys=keys)[0]


def load_vae(config: DiffusionTrainConfig) -> AutoencoderCausal3D:
    """The frozen autoencoder, in the type of the run.

    Raises:
      UserError: There is none, or the config names none.
    """
    if config.vae is None:
        raise UserError("no autoencoder: name the `model` folder of a run of train.landiff_vae")
    return weights.load_module(
        part_folder(config.vae, "vae"),
        AutoencoderCausal3D,
        AutoencoderCausal3DConfig,
        dtype=parts.compute_dtype(config),
        on_host=True,
    )[0]


def show(vae: AutoencoderCausal3D, latents: Float[Array, "b f h w c"]) -> UInt8[Array, "b f h w 3"]:
    """Frames of scaled latents."""
    frames = vae.decode_latents(latents.astype(jnp.float32)).astype(jnp.float32)
    return jnp.round(127.5 * (jnp.clip(frames, -1, 1) + 1)).astype(jnp.uint8)


def export(config: DiffusionTrainConfig, model: Painter, folder: pathlib.Path) -> None:
    """Writes `denoiser`, and where autoencoder and text encoder are named all of a pipeline."""
    weights.save_module(folder / DENOISER, model.denoiser, config.model)
    assembly.write(config, folder)

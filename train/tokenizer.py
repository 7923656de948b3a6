"""Trains the tokenizer: image tower and resampler by regression, then the clip decoder's UNet.

    python -m train.tokenizer --config configs/shapes_representation.py --workdir runs/repr
    python -m train.tokenizer --config configs/shapes_tokenizer.py --workdir runs/tokenizer
    python -m train.tokenizer --config configs/tokenizer_256.py --workdir runs/tokenizer_256 \
        --init models/start

The first is for small systems that have no pretrained CLIP; the second is the video diffusion
training of the paper, which the third starts from DynamiCrafter's weights.
"""

import dataclasses
import functools
import pathlib
import sys

import jax.numpy as jnp
from flax import nnx

from dicode_jax import weights
from dicode_jax.data import batches
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.representation import (
    RepresentationConfig,
    RepresentationModel,
    probe_loss,
)
from dicode_jax.models.dicode.stages.configs import RepresentationTrainConfig, TokenizerTrainConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import ShapeRngs
from train import decoder, loop
from train.decoder import VideoTokenizer


class _Regression(nnx.Module):
    """The trained representation beside the frozen autoencoder that gives its targets."""

    def __init__(self, model: RepresentationModel, autoencoder: AutoencoderKL):
        self.model, self.autoencoder = model, autoencoder


def load_autoencoder(folder: str) -> AutoencoderKL:
    """The autoencoder that `train.autoencoder` exported."""
    build = lambda cfg: AutoencoderKL(cfg, rngs=ShapeRngs())  # noqa: E731
    return weights.load_module(folder, build, AutoencoderKLConfig)[0]


def load_representation(folder: str) -> RepresentationModel:
    """The representation that an earlier run exported."""
    build = lambda cfg: RepresentationModel(cfg, rngs=ShapeRngs())  # noqa: E731
    return weights.load_module(folder, build, RepresentationConfig)[0]


def regression_loss(config: RepresentationTrainConfig, model: _Regression, batch, rng):
    """Squared (and a little absolute) error of the head's image, plus the probes."""
    images = batches.to_unit_range(batch["image"])
    predicted, logits = model.model(images, rng)
    scale = model.autoencoder.cfg.scale_factor
    target = scale * model.autoencoder.encode(images).mode()
    error = predicted - target
    mse = jnp.mean(jnp.square(error))
    probes, right = probe_loss(logits, batch["labels"])
    loss = mse + 0.1 * jnp.mean(jnp.abs(error)) + config.probe_weight * probes
    metrics = {"mse": mse, "relative_error": mse / jnp.var(target), "probe_loss": probes}
    if config.pixel_weight:
        pixels = model.autoencoder.decode(predicted / scale)
        pixel_mse = jnp.mean(jnp.square(pixels - images))
        loss += config.pixel_weight * pixel_mse
        metrics["psnr"] = 10 * jnp.log10(4.0 / pixel_mse)
    names = batches.FRAME_LABELS
    return loss, metrics | {f"probe_{name}": right[i] for i, name in enumerate(names)}


def build_representation(config: RepresentationTrainConfig) -> loop.Task:
    """Trains image tower and resampler to give keyframes back through the latent head."""
    model = RepresentationModel(config.model, rngs=nnx.Rngs(config.seed))
    if config.init is not None:
        nnx.update(model, nnx.state(load_representation(config.init)))
    whole = _Regression(model, load_autoencoder(config.autoencoder))
    is_trained = lambda path, _: path[0] == "model"  # noqa: E731
    graph, trained, frozen = nnx.split(whole, is_trained, ...)
    source = batches.FrameSource(seed=config.seed, frame_size=config.frame_size)
    held_out = batches.FrameSource(seed=config.seed + 1, split="test", frame_size=config.frame_size)
    images = jnp.stack([held_out[i]["image"] for i in range(12)])

    @nnx.jit
    def reconstruct(whole: _Regression, images):
        predicted, _ = whole.model(batches.to_unit_range(images))
        return whole.autoencoder.decode(predicted / whole.autoencoder.cfg.scale_factor)

    def sample(whole: _Regression, folder: pathlib.Path, step: int) -> dict[str, float]:
        from dicode_jax.data.video import contact_sheet

        pixels = jnp.clip((reconstruct(whole, images) + 1) * 127.5, 0, 255).astype(jnp.uint8)
        rows = [images, pixels]
        contact_sheet(folder / f"{step:06d}.png", rows, labels=["keyframes", "read back"])
        return {"held_out_psnr": batches.psnr(images, pixels)}

    return loop.Task(
        name="representation",
        config=config,
        graph=graph,
        trained=trained,
        frozen=frozen,
        loss_fn=functools.partial(regression_loss, config),
        batches=batches.make_batches(source, config.batch_size),
        sample=sample,
        export=lambda whole, folder: weights.save_module(folder, whole.model, config.model),
    )


def load_start(config: TokenizerTrainConfig) -> VideoTokenizer:
    """The parts in `config.init`, built as this run's config says.

    Raises:
      UserError: A part is missing, or of other sizes than the config's.
    """
    folder = pathlib.Path(config.init)
    tokenizer = lambda _: DeepTokenizer(config.tokenizer, rngs=ShapeRngs())  # noqa: E731
    clip_decoder = lambda stored: ClipDecoder(  # noqa: E731
        dataclasses.replace(config.decoder, autoencoder=stored.autoencoder), rngs=ShapeRngs()
    )
    model = nnx.eval_shape(lambda: VideoTokenizer(config, rngs=ShapeRngs()))
    load = weights.load_module
    model.tokenizer, _ = load(folder / "tokenizer", tokenizer, DeepTokenizerConfig)
    model.decoder, _ = load(folder / "decoder", clip_decoder, ClipDecoderConfig)
    return model


def build_decoder(config: TokenizerTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Puts the parts of earlier runs in place; the rest starts fresh."""
    if config.init is not None:
        return decoder.build(config, load_start(config), workdir)
    decoder_config = config.decoder
    autoencoder = None
    if config.autoencoder is not None:
        autoencoder = load_autoencoder(config.autoencoder)
        decoder_config = dataclasses.replace(decoder_config, autoencoder=autoencoder.cfg)
    model = VideoTokenizer(
        dataclasses.replace(config, decoder=decoder_config), rngs=nnx.Rngs(config.seed)
    )
    if autoencoder is not None:
        nnx.update(model.decoder.autoencoder, nnx.state(autoencoder))
    if config.representation is not None:
        representation = load_representation(config.representation)
        nnx.update(model.tokenizer, nnx.state(representation.tokenizer))
        if decoder_config.latent_head is not None:
            nnx.update(model.decoder.latent_head, nnx.state(representation.head))
    model.decoder.null_tokens[...] = nnx.jit(lambda tokenizer: tokenizer.null_tokens())(
        model.tokenizer
    )
    return decoder.build(config, model, workdir)


def build(
    config: RepresentationTrainConfig | TokenizerTrainConfig, workdir: pathlib.Path
) -> loop.Task:
    """Trains the tokenizer: its representation or its clip decoder, as the config says."""
    if isinstance(config, RepresentationTrainConfig):
        return build_representation(config)
    return build_decoder(config, workdir)


if __name__ == "__main__":
    sys.exit(loop.main("train.tokenizer", build, (RepresentationTrainConfig, TokenizerTrainConfig)))

"""The video diffusion stage of `train.tokenizer`: data, loss and samples of the clip decoder."""

import functools
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax import weights
from dicode_jax.data import batches
from dicode_jax.data.synthetic import SyntheticSource
from dicode_jax.models.dicode import tokenizer_loss
from dicode_jax.models.dicode.decoder import (
    ClipDecoder,
    SamplingConfig,
    decode_clip,
    decode_latents,
    to_uint8,
)
from dicode_jax.models.dicode.stages.configs import TokenizerTrainConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer
from train import loop
from train.cache import Cache


class VideoTokenizer(nnx.Module):
    """Keyframes to deep tokens, and deep tokens to clips."""

    def __init__(self, config: TokenizerTrainConfig, *, rngs: nnx.Rngs):
        self.tokenizer = DeepTokenizer(config.tokenizer, rngs=rngs)
        self.decoder = ClipDecoder(config.decoder, rngs=rngs)


def is_trained(config: TokenizerTrainConfig, path: tuple, _) -> bool:
    """The UNet, and without a ready representation also resampler and latent head."""
    parts = [str(part) for part in path]
    if parts[:2] == ["decoder", "unet"]:
        return True
    trained = (["tokenizer", "resampler"], ["decoder", "latent_head"])
    return config.representation is None and parts[:2] in trained


def loss_fn(config: TokenizerTrainConfig, model: VideoTokenizer, batch, rng):
    """Denoising loss of cached latents, or of a video that is encoded here."""
    draw_key, dropout_key = jax.random.split(rng)
    decoder = model.decoder
    count = config.decoder.schedule.num_timesteps
    options = {"rngs": nnx.Rngs(dropout=dropout_key)}
    options["fs"] = jnp.full((config.batch_size,), config.fs, jnp.int32)
    if config.cached_clips:
        latents, tokens = (batch[name].astype(jnp.float32) for name in ("latents", "tokens"))
        draws = tokenizer_loss.sample_draws(
            draw_key, latents.shape, config.loss, num_timesteps=count
        )
        loss, metrics = tokenizer_loss.decoder_loss(
            decoder, latents, tokens, draws, config.loss, **options
        )
    else:
        video = batches.to_unit_range(batch["video"])[:, 0]  # one clip per sample
        step = decoder.cfg.autoencoder.downsampling
        b, f, h, w, _ = video.shape
        shape = (b, f, h // step, w // step, decoder.cfg.autoencoder.embed_dim)
        draws = tokenizer_loss.sample_draws(draw_key, shape, config.loss, num_timesteps=count)
        loss, metrics = tokenizer_loss.tokenizer_loss(
            model.tokenizer, decoder, video, draws, config.loss, **options
        )
    names = ("loss_simple", "loss_extra", "latent_std")
    return loss, {name: metrics[name] for name in names}


@nnx.jit
def encode(model: VideoTokenizer, video):
    """uint8 clips [b, f, h, w, 3] to scaled latents and the deep tokens of both keyframes."""
    video = batches.to_unit_range(video)
    keyframes = tokenizer_loss.select_keyframes(video, "headrear")
    return model.decoder.autoencoder.encode_latents(video), model.tokenizer(keyframes)


def build(config: TokenizerTrainConfig, model: VideoTokenizer, workdir: pathlib.Path) -> loop.Task:
    """The training task of a model whose frozen parts are already in place."""
    graph, trained, frozen = nnx.split(model, functools.partial(is_trained, config), ...)
    source = SyntheticSource(
        seed=config.seed, last_first_clip=9, frame_size=config.frame_size, length=100_000_000
    )
    if config.cached_clips:

        def encode_clips(examples):
            latents, tokens = encode(model, np.stack([e["video"][0] for e in examples]))
            return {"latents": latents, "tokens": tokens}

        cache = Cache(
            workdir / "cache.npz", source, encode_clips, count=config.cached_clips, batch_size=8
        )
        dataset = grain.MapDataset.source(cache).shuffle(config.seed).repeat()
        data = iter(dataset.batch(config.batch_size).to_iter_dataset())
    else:
        data = batches.make_batches(source, config.batch_size)
    held_out = SyntheticSource(
        seed=config.seed + 1, split="test", last_first_clip=1, frame_size=config.frame_size
    )
    truth = np.stack([held_out[i]["video"][0] for i in range(8)])
    sampling = SamplingConfig(num_inference_steps=25, guidance_scale=1.0, fs=config.fs)

    @nnx.jit
    def reconstruct(model: VideoTokenizer, video):
        keyframes = batches.to_unit_range(video)[:, jnp.array([0, -1])]
        keys = jax.random.split(jax.random.key(0), video.shape[0])
        latents = decode_clip(model.decoder, model.tokenizer(keyframes), keys, sampling)
        return to_uint8(decode_latents(model.decoder, latents))

    def sample(model: VideoTokenizer, folder: pathlib.Path, step: int) -> dict[str, float]:
        from dicode_jax.data.video import contact_sheet

        painted = np.asarray(reconstruct(model, truth))
        rows = [row for pair in zip(truth[:4], painted[:4], strict=True) for row in pair]
        contact_sheet(folder / f"{step:06d}.png", rows, labels=["true", "painted"] * 4)
        return {"held_out_psnr": batches.psnr(truth, painted)}

    def export(model: VideoTokenizer, folder: pathlib.Path) -> None:
        weights.save_module(folder / "tokenizer", model.tokenizer, config.tokenizer)
        weights.save_module(folder / "decoder", model.decoder, model.decoder.cfg)

    return loop.Task(
        name="tokenizer",
        config=config,
        graph=graph,
        trained=trained,
        frozen=frozen,
        loss_fn=functools.partial(loss_fn, config),
        batches=data,
        sample=sample,
        export=export,
    )

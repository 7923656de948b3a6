"""Training of the causal autoencoder of videos that LanDiff paints with.

The release has no training of it; this is ours: what is decoded goes through the same chunks as in
painting, so that norms pool over as much as they will then. The encoder sees the whole clip.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.data.windows import WindowReader
from dicode_jax.media.transforms import to_float
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.nn.rngs import row_keys
from dicode_jax.stages import parts
from dicode_jax.stages.landiff.config import VAE3DTrainConfig
from dicode_jax.stages.latents import means, scaled
from dicode_jax.stages.pixel_losses import edges, psnr
from dicode_jax.storage import weights
from dicode_jax.training.evaluate import jit_local
from dicode_jax.training.stage import Stage
from dicode_jax.typing import Array

CLIPS = 16  # of held-out data, by which latents are scaled


class Trained(nnx.Module):
    """The VAE, and LPIPS or None, which judges it and does not learn."""

    def __init__(self, config: VAE3DTrainConfig, *, rngs: nnx.Rngs):
        self.vae = AutoencoderCausal3D(config.model, dtype=parts.compute_dtype(config), rngs=rngs)
        of_lpips = config.lpips and parts.stored_config(config.lpips, LPIPSConfig)
        self.lpips = LPIPS(of_lpips, rngs=rngs) if of_lpips else None


def make_stage(config: VAE3DTrainConfig) -> Stage:
    """Batches are `video` uint8 [b, f, h, w, 3]."""

    def load():
        loaded = {}
        for name, kind, sizes in (
            ("init", AutoencoderCausal3D, AutoencoderCausal3DConfig),
            ("lpips", LPIPS, LPIPSConfig),
        ):
            if (folder := getattr(config, name)) is not None:
                module, _ = weights.load_module(folder, kind, sizes, on_host=True)
                loaded |= parts.leaves(module, "vae" if name == "init" else name)
        return {path: inflated(x) for path, x in loaded.items()} if config.inflate else loaded

    side = config.crop_size or config.frame_size
    clip = (config.data.num_frames, side, side, 3)
    return Stage(
        name="landiff_vae",
        config=config,
        create=lambda rngs: Trained(config, rngs=rngs),
        load=load,
        is_trained=lambda path, _: (
            path[0] == "vae" and (config.train_encoder or path[1] != "encoder")
        ),
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=lambda b: {"video": jax.ShapeDtypeStruct((b, *clip), jnp.uint8)},
        export=functools.partial(export, config),
    )


def inflated(x: Array) -> Array:
    """A kernel [t, h, w, c, o] of which the present frame has all; another array as it is."""
    if x.ndim != 5:
        return x
    return jnp.concatenate([jnp.zeros_like(x[1:]), x.sum(axis=0, keepdims=True)])


def reader(config: VAE3DTrainConfig, crop_size: int | None = None) -> WindowReader:
    """Reads the clips of a run, or a random square of each."""
    return WindowReader(data=config.data, frame_size=config.frame_size, crop_size=crop_size)


def loss_fn(
    config: VAE3DTrainConfig, model: Trained, batch, keys: Array
) -> tuple[Array, dict[str, Array]]:
    """Error of clips through drawn latents; `psnr` is the mean over clips, in dB."""
    video = to_float(batch["video"])
    posterior = model.vae.encode(video)
    drawn = posterior.sample(row_keys(keys, len(video)))
    made = model.vae.decode(drawn).astype(jnp.float32)
    error = made - video
    images = rearrange(error, "b f h w c -> (b f) h w c")
    metrics = {"l1": jnp.abs(error).mean()}
    loss = metrics["l1"] + config.squared_weight * jnp.square(error).mean()
    if model.lpips is not None:
        pair = (rearrange(x, "b f h w c -> (b f) h w c") for x in (made, video))
        metrics["lpips"] = model.lpips(*pair).mean()
        loss += config.perceptual_weight * metrics["lpips"]
    elif config.edge_weight:
        metrics["edges"] = edges(images)
        loss += config.edge_weight * metrics["edges"]
    kl = posterior.kl().mean() / posterior.mean[0].size
    std = jnp.exp(0.5 * posterior.logvar).mean()
    metrics |= {"psnr": psnr(error, 2.0), "kl": kl, "std": std}
    return loss + config.kl_weight * kl, metrics


def export(config: VAE3DTrainConfig, model: Trained, folder: pathlib.Path) -> None:
    """Writes the VAE; its config holds the scale that gives latents of held-out data variance 1.

    An encoder that stayed as it was keeps its scale too.

    Raises:
      UserError: The data set is not there any more, or all its latents are the same number.
    """
    if config.init is not None and not config.train_encoder:
        stored = parts.stored_config(config.init, AutoencoderCausal3DConfig)
        cfg = dataclasses.replace(config.model, scale_factor=stored.scale_factor)
        weights.save_module(folder, model.vae, cfg)
        return
    run = jit_local(means)

    def encode(batch):  # one after the other, as whole clips take memory
        return np.concatenate([run(model.vae, clip[None]) for clip in batch["video"]])

    cfg = scaled(config, reader(config), encode, count=CLIPS, what="clips")
    weights.save_module(folder, model.vae, cfg)

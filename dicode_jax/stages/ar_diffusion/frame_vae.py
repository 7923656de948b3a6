"""Stage 1 of AR-Diffusion: the frame VAE on single frames, then its temporal decoder on clips."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.lpips import LPIPS, LPIPSConfig
from dicode_jax.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.rngs import row_keys
from dicode_jax.stages import parts, probes
from dicode_jax.stages.ar_diffusion.adversarial import (
    discriminator_loss,
    is_judges_turn,
    make_optimizer,
    scale_at,
)
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.stages.pixel_losses import edges
from dicode_jax.storage import weights
from dicode_jax.training.stage import Path, Stage
from dicode_jax.typing import Array, Float, UInt8

Judge = Literal["nobody", "generator", "discriminator"]
"""What a step of the run is: the VAE's alone, or a turn of either."""


class Trained(nnx.Module):
    """The VAE, what reads its patches and latents, and its judges: None or nothing if not wanted.

    LPIPS and the proxy do not learn, a discriminator does.
    """

    def __init__(self, config: FrameVAETrainConfig, *, rngs: nnx.Rngs):
        dtype = parts.compute_dtype(config)
        self.vae = FrameVAE(config.model, dtype=dtype, rngs=rngs)
        side = config.model.decoder
        of_proxy = (
            None if config.proxy is None else parts.stored_config(config.proxy, AutoencoderKLConfig)
        )
        self.proxy = AutoencoderKL(of_proxy, dtype=dtype, rngs=rngs) if of_proxy else None
        p, c = _patch(config.model, of_proxy)
        read = Linear(side.embed_dim, c * p**2, rngs=rngs) if config.patch_weight else None
        self.patch_head = read
        numbers = config.model.num_tokens * config.model.token_dim
        classes = probes.CLASSES if config.probe_weight else ()
        self.probes = nnx.List([Linear(numbers, n, rngs=rngs) for n in classes])
        of_lpips = config.lpips and parts.stored_config(config.lpips, LPIPSConfig)
        self.lpips = LPIPS(of_lpips, rngs=rngs) if of_lpips else None
        judged = config.disc_start is not None
        self.discriminator = (
            PatchDiscriminator(config.discriminator, dtype=dtype, rngs=rngs) if judged else None
        )


def make_stage(config: FrameVAETrainConfig) -> Stage:
    """Batches are `image` uint8 [b, h, w, 3], or `video` [b, f, h, w, 3] for the temporal part."""
    temporal = config.model.temporal
    name, lead = ("video", (config.data.num_frames,)) if temporal else ("image", ())

    def load():
        loaded = {}
        if config.init is not None:
            vae, of_vae = weights.load_module(config.init, FrameVAE, FrameVAEConfig, on_host=True)
            _check_init(config, of_vae)
            loaded |= parts.leaves(vae, "vae")
        if config.proxy is not None:
            loaded |= parts.leaves(parts.load_autoencoder(config.proxy), "proxy")
        if config.lpips is not None:
            lpips, _ = weights.load_module(config.lpips, LPIPS, LPIPSConfig, on_host=True)
            loaded |= parts.leaves(lpips, "lpips")
        if config.discriminator_init is not None:
            judge, sizes = weights.load_module(
                config.discriminator_init,
                PatchDiscriminator,
                PatchDiscriminatorConfig,
                on_host=True,
            )
            if sizes != config.discriminator:
                raise UserError(
                    f"{config.discriminator_init} holds a discriminator of other sizes than the "
                    f"config's: {sizes}"
                )
            loaded |= parts.leaves(judge, "discriminator")
        return loaded

    adversarial = {}
    if (start := config.disc_start) is not None:
        make = functools.partial(make_optimizer, start)
        adversarial = {"takes_step": True, "make_optimizer": make}
    if config.probe_weight:
        probes.check_labels(config.data)
    if config.proxy is not None:
        latent = parts.stored_config(config.proxy, AutoencoderKLConfig).downsampling
        if config.model.decoder.patch_size % latent:
            raise UserError(
                f"{config.proxy} has a latent for {latent} pixels, of which the decoder's "
                f"patch_size {config.model.decoder.patch_size} is no multiple"
            )

    def batch_shapes(b: int):
        shapes = {name: jax.ShapeDtypeStruct(parts.image_shape(config, b, *lead), jnp.uint8)}
        if config.probe_weight:
            shapes["labels"] = jax.ShapeDtypeStruct((b, len(probes.CLASSES)), jnp.int32)
        return shapes

    return Stage(
        name="ar_diffusion_vae",
        config=config,
        create=lambda rngs: Trained(config, rngs=rngs),
        load=load,
        is_trained=lambda path, _: is_trained(config, path),
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=batch_shapes,
        export=lambda model, folder: weights.save_module(folder, model.vae, config.model),
        **adversarial,
    )


def is_trained(config: FrameVAETrainConfig, path: Path) -> bool:
    """Whether a parameter learns."""
    if config.model.temporal:
        return path[:2] == ("vae", "temporal")
    if not config.train_encoder and path[:2] in (("vae", "encoder"), ("vae", "moments_proj")):
        return False
    return path[0] not in ("lpips", "proxy")


def to_unit(frames: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Grey levels to [0, 1], as the frame VAE wants them."""
    return frames.astype(jnp.float32) / 255


def from_unit(frames: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Pixels in [0, 1] to grey levels; what lies outside is clipped."""
    return jnp.round(255 * jnp.clip(frames, 0, 1)).astype(jnp.uint8)


def loss_fn(
    config: FrameVAETrainConfig, model: Trained, batch, keys: Array, step: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Error of frames through drawn latents; `psnr` is the mean over frames, in dB.

    Args:
      step: With a discriminator: which of them it is. The loss then holds what the frames are to
        it, or in its own turns how well it tells them apart, which has no gradient in the other.
        Without a step neither counts.
    """
    if config.disc_start is None or step is None:
        return _loss(config, model, batch, keys)
    graph, state = nnx.split(model)

    def of(judge: Judge | None):
        return lambda state: _loss(config, nnx.merge(graph, state), batch, keys, judge)

    turn = jnp.where(step < config.disc_start, 0, jnp.where(is_judges_turn(step), 2, 1))
    return jax.lax.switch(turn, [of("nobody"), of("generator"), of("discriminator")], state)


def _loss(config, model, batch, keys, judge: Judge | None = None) -> tuple[Array, dict[str, Any]]:
    video = to_unit(batch["video"] if "video" in batch else batch["image"][:, None])
    (b, f), vae = video.shape[:2], model.vae
    if judge == "discriminator":
        vae = _still(vae)
    each = jax.vmap(lambda key: row_keys(key, f))(row_keys(keys, b)).reshape(-1)
    frames = rearrange(video, "b f h w c -> (b f) h w c")
    posterior = vae.posterior(frames)
    drawn = posterior if config.token_noise is None else posterior.around(config.token_noise)
    latents = drawn.sample(each)
    patches = vae.patches(rearrange(latents, "(b f) l c -> b f l c", b=b))
    if config.pixel_weight:
        logits = vae.logits(patches)
        features = vae.pixel_decoder.features(vae.soft_codes(logits))
        last = vae.pixel_decoder.conv_out
        made = last(features)

    def error_of(made):
        metrics, error = {}, made.astype(jnp.float32) - frames
        metrics["l1"] = jnp.abs(error).mean()
        squares = jnp.square(error).mean((1, 2, 3))
        loss = metrics["l1"] + config.squared_weight * squares.mean()
        if model.lpips is not None:
            metrics["lpips"] = model.lpips(2 * made - 1, 2 * frames - 1).mean()
            loss += config.perceptual_weight * metrics["lpips"]
        elif config.edge_weight:
            metrics["edges"] = edges(error)
            loss += config.edge_weight * metrics["edges"]
        metrics["psnr"] = -10 * jnp.log10(jnp.maximum(squares, 1e-10)).mean()
        return loss, metrics

    loss, metrics = error_of(made) if config.pixel_weight else (jnp.zeros(()), {})
    loss *= config.pixel_weight
    if model.patch_head is not None:
        read = _on_grid(model, model.patch_head(patches).astype(jnp.float32))
        metrics["patches"] = jnp.square(read - _to_read(model, frames)).mean()
        loss += config.patch_weight * metrics["patches"]
    if config.probe_weight:
        flat = unit(latents).reshape(len(latents), -1)
        logits_of = [probe(flat) for probe in model.probes]
        unsure, right = probes.probe_loss(logits_of, batch["labels"])
        loss += config.probe_weight * unsure
        metrics |= right
    if config.pixel_weight and config.logit_weight:
        centred = logits.astype(jnp.float32) - logits.mean(-1, keepdims=True)
        metrics["logits"] = jnp.square(centred).mean()
        loss += config.logit_weight * metrics["logits"]
    kl = posterior.kl().mean() / posterior.gaussian.mean[0].size
    metrics |= {"kl": kl, "std": jnp.exp(0.5 * posterior.gaussian.logvar).mean()}
    loss += config.kl_weight * kl
    if judge is None:
        return loss, metrics
    none = jnp.full((), jnp.nan)  # of what does not count in a turn; logs leave it out
    told: dict[str, Any] = dict.fromkeys(("hinge", "logits_real", "logits_made", "scale"), none)
    if judge == "discriminator":
        own, (of_judge, _) = discriminator_loss(
            model.discriminator, model.discriminator.statistics(), frames, made
        )
        loss += own
        told |= {"hinge": own, **of_judge}
    elif judge == "generator":
        still = _still(model.discriminator)

        def judged(made):
            seen, statistics = still(made, still.statistics(), train=True)
            return -seen.astype(jnp.float32).mean(), statistics

        scale = config.disc_weight * scale_at(last, features, lambda x: error_of(x)[0], judged)
        term = judged(made)[0]
        loss += scale * term
        told |= {"logits_made": -term, "scale": scale}
    return loss, metrics | told


def _to_read(model: Trained, frames: Float[Array, "n h w 3"]) -> Float[Array, "n y x c"]:
    """What the patches are to tell: the proxy's latents, of unit variance, or pixels."""
    if model.proxy is None:
        return frames
    latents = model.proxy.encode(2 * frames - 1).mode().astype(jnp.float32)
    return jax.lax.stop_gradient(model.proxy.cfg.scale_factor * latents)


def _patch(vae: FrameVAEConfig, proxy: AutoencoderKLConfig | None) -> tuple[int, int]:
    """Sides and channels of what is read off a patch: pixels, or the proxy's latents."""
    side = vae.decoder.patch_size
    return (side // proxy.downsampling, proxy.z_channels) if proxy else (side, 3)


def _on_grid(model: Trained, read: Float[Array, "n y x d"]) -> Float[Array, "n v u c"]:
    """What was read off the patches, on the grid of `_to_read`."""
    p, c = _patch(model.vae.cfg, model.proxy and model.proxy.cfg)
    return rearrange(read, "n y x (p q c) -> n (y p) (x q) c", p=p, q=p, c=c)


def _still(module: Any) -> Any:
    """The module, in which nothing has a gradient."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.lax.stop_gradient(state))


def reconstruct(model: Trained, frames: UInt8[Array, "b ... 3"]) -> UInt8[Array, "b ... 3"]:
    """Images or clips through the directions of the means."""
    video = to_unit(frames[:, None] if frames.ndim == 4 else frames)
    return from_unit(model.vae(video)[0]).reshape(frames.shape)


def _check_init(config: FrameVAETrainConfig, stored: FrameVAEConfig) -> None:
    """Refuses a start that would lose something, or that is another model."""
    same = {**vars(stored), "temporal": config.model.temporal} == vars(config.model)
    if not same or (stored.temporal and not config.model.temporal):
        raise UserError(
            f"{config.init} holds a VAE of other sizes than the config's, or one "
            "with a temporal part: start from the model that the config describes"
        )

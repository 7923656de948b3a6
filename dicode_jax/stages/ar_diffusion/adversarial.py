"""The two losses of AR-Diffusion's first stage with a discriminator (`LPIPSWithDiscriminator`).

Errors are sums over the numbers of a frame here, as in the original; which of the two is stepped is
the caller's choice (the original alternates: odd steps the discriminator, even ones the generator).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE
from dicode_jax.models.patch_discriminator import PatchDiscriminator, Statistics
from dicode_jax.typing import Array, Float

MAX_WEIGHT = 1e4
Perceptual = Callable[[Array, Array], Float[Array, " n"]]


def generator_loss(
    vae: FrameVAE,
    discriminator: PatchDiscriminator | None,
    statistics: Statistics,
    video: Float[Array, "b f h w 3"],
    *,
    noise: Float[Array, "n l c"],
    kl_weight: float = 0.0,
    weight: float = 1.0,
    perceptual: Perceptual | None = None,
) -> tuple[Array, tuple[dict[str, Array], Statistics]]:
    """Absolute error, divergence and, with a discriminator, what it thinks of the frames.

    Args:
      discriminator: None before its start.
      video: In [0, 1].
      noise: Of the latents.
      weight: Of the adversarial term, which is first scaled to the gradient of the error at the
        last convolution.
      perceptual: Distance of pairs of images, which counts at every number of a frame.

    Returns:
      The loss, and the metrics with the discriminator's statistics, which saw these frames.
    """
    frames = rearrange(video, "b f h w c -> (b f) h w c")
    posterior = vae.posterior(frames)
    latents = rearrange(posterior.sample(noise=noise), "(b f) l c -> b f l c", b=len(video))
    features = vae.pixel_decoder.features(vae.soft_codes(vae.logits(latents)))
    graph, last = nnx.split(vae.pixel_decoder.conv_out)

    def error_of(made):
        total = jnp.abs(made - frames).sum((1, 2, 3))
        if perceptual is not None:
            total += perceptual(made, frames) * made[0].size
        return total.mean()

    def judged(made):
        assert discriminator is not None
        logits, seen = discriminator(made, statistics, train=True)
        return -logits.mean(), seen

    made = nnx.merge(graph, last)(features)
    error, kl = error_of(made), posterior.kl().mean()
    metrics = {"l1": jnp.abs(made - frames).mean(), "nll": error, "kl": kl}
    if discriminator is None:
        return error + kl_weight * kl, (metrics, statistics)

    def at_last(function, kernel):
        conv = nnx.merge(graph, last)
        conv.kernel = nnx.Param(kernel)
        return function(conv(jax.lax.stop_gradient(features)))

    kernel = jax.lax.stop_gradient(vae.pixel_decoder.conv_out.kernel[...])
    of_error = jax.grad(functools.partial(at_last, error_of))(kernel)
    of_judged = jax.grad(functools.partial(at_last, lambda made: judged(made)[0]))(kernel)
    scale = adaptive_weight(of_error, of_judged)
    adversarial, seen = judged(made)
    loss = error + kl_weight * kl + weight * scale * adversarial
    return loss, (metrics | {"adversarial": adversarial, "scale": weight * scale}, seen)


def adaptive_weight(of_error: Array, of_judged: Array) -> Float[Array, ""]:
    """The ratio of two gradients' lengths, at most 1e4; it has no gradient itself."""
    lengths = (jnp.sqrt(jnp.square(x).sum()) for x in (of_error, of_judged))
    ratio = next(lengths) / (next(lengths) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, MAX_WEIGHT))


def discriminator_loss(
    discriminator: PatchDiscriminator,
    statistics: Statistics,
    real: Float[Array, "n h w 3"],
    made: Float[Array, "n h w 3"],
) -> tuple[Array, tuple[dict[str, Array], Statistics]]:
    """Hinge loss: real patches above 1, made ones below -1; real frames are seen first."""
    of_real, statistics = discriminator(real, statistics, train=True)
    of_made, statistics = discriminator(jax.lax.stop_gradient(made), statistics, train=True)
    loss = 0.5 * (jax.nn.relu(1 - of_real).mean() + jax.nn.relu(1 + of_made).mean())
    return loss, ({"logits_real": of_real.mean(), "logits_made": of_made.mean()}, statistics)

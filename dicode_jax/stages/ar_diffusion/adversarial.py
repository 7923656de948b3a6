"""The two losses of AR-Diffusion's first stage with a discriminator (`LPIPSWithDiscriminator`).

`generator_loss` has errors as sums over the numbers of a frame, as in the original; the training
has means, to which the adversarial term is scaled as well. Which of VAE and discriminator is
stepped is the original's choice: odd steps the discriminator, even ones the generator.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE
from dicode_jax.models.patch_discriminator import PatchDiscriminator, Statistics
from dicode_jax.runtime.sharding import dotted_path
from dicode_jax.training import optim
from dicode_jax.training.optim import OptimConfig
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
    features = vae.pixel_decoder.features(vae.soft_codes(vae.logits(vae.patches(latents))))
    made = vae.pixel_decoder.conv_out(features)

    def error_of(made):
        total = jnp.abs(made - frames).sum((1, 2, 3))
        if perceptual is not None:
            total += perceptual(made, frames) * made[0].size
        return total.mean()

    error, kl = error_of(made), posterior.kl().mean()
    metrics = {"l1": jnp.abs(made - frames).mean(), "nll": error, "kl": kl}
    if discriminator is None:
        return error + kl_weight * kl, (metrics, statistics)

    def judged(made):
        logits, seen = discriminator(made, statistics, train=True)
        return -logits.mean(), seen

    scale = weight * scale_at(vae.pixel_decoder.conv_out, features, error_of, judged)
    adversarial, seen = judged(made)
    loss = error + kl_weight * kl + scale * adversarial
    return loss, (metrics | {"adversarial": adversarial, "scale": scale}, seen)


def scale_at(
    last: nnx.Conv,
    features: Float[Array, "n h w c"],
    error_of: Callable[[Array], Array],
    judged: Callable[[Array], tuple[Array, Statistics]],
) -> Float[Array, ""]:
    """What the adversarial term is multiplied by to move the last convolution as errors do.

    Args:
      last: It makes frames of the features.
      error_of: Frames to the error.
      judged: Frames to the adversarial term, and something else.
    """
    graph, state = nnx.split(last)
    features = jax.lax.stop_gradient(features)

    def at(function, kernel):
        conv = nnx.merge(graph, jax.lax.stop_gradient(state))
        conv.kernel = nnx.Param(kernel)
        return function(conv(features))

    kernel = jax.lax.stop_gradient(last.kernel[...])
    of_error = jax.grad(lambda kernel: at(error_of, kernel))(kernel)
    of_judged = jax.grad(lambda kernel: at(lambda made: judged(made)[0], kernel))(kernel)
    return adaptive_weight(of_error, of_judged)


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
    of_real, of_made = of_real.astype(jnp.float32), of_made.astype(jnp.float32)
    loss = 0.5 * (jax.nn.relu(1 - of_real).mean() + jax.nn.relu(1 + of_made).mean())
    return loss, ({"logits_real": of_real.mean(), "logits_made": of_made.mean()}, statistics)


def is_judges_turn(step: Array) -> Array:
    """Whether a step is the discriminator's, once it has begun; else it is the VAE's."""
    return step % 2 == 1


def make_optimizer(start: int, config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Two optimisers, of the VAE and of the parameters in `discriminator`, that take turns.

    From step `start` on; before it the VAE alone is stepped. Gradients of the discriminator are not
    clipped, as in the original.
    """

    def masked(config: OptimConfig, of_judge: bool) -> optax.GradientTransformation:
        def has_turn(step, **_):
            is_judges = (step >= start) & is_judges_turn(step)
            return is_judges if of_judge else ~is_judges

        return optax.conditionally_mask(optim.make_optimizer(config, num_steps), has_turn)

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: dotted_path(path).partition(".")[0] == "discriminator", params
        )

    unclipped = dataclasses.replace(config, clip_norm=0.0)
    return optax.partition({False: masked(config, False), True: masked(unclipped, True)}, label)

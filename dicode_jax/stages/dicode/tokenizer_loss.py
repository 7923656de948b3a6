"""Training losses of the tokenizer and clip decoder: denoising a clip given its keyframes' tokens.

DiCoDe (arXiv 2412.04446), section 3.1, with the switches of the original's training module. All
randomness can be injected (`Draws`), or comes from one key.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.diffusion.losses import LOSS_TYPES, diffusion_loss, sample_noise
from dicode_jax.models.dicode.decoder import ClipDecoder
from dicode_jax.models.dicode.tokenizer import DeepTokenizer
from dicode_jax.nn.rngs import draw, split
from dicode_jax.typing import Array, Float, Int, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Settings of the training loss; the defaults are those of the release.

    Attributes:
        uncond_prob: drops text alone, keyframes alone and both, each with this probability.
        no_text: every sample sees the empty prompt, whatever r is.
        offset_noise: strength of the offset noise.
        loss_type: "l2" or "l1".
        simple_weight, elbo_weight: see `dicode_jax.diffusion.losses.diffusion_loss`.
    """

    uncond_prob: float = 0.05
    no_text: bool = True
    offset_noise: float = 0.0
    loss_type: str = "l2"
    simple_weight: float = 1.0
    elbo_weight: float = 0.0

    RETIRED: ClassVar = {
        "extra": ("none", "the denoising loss alone"),
        "extra_weight": (1e-4, "the denoising loss alone"),
        "extra_scheduler": ("constant", "the denoising loss alone"),
        "extra_steps": (1, "the denoising loss alone"),
    }

    def __post_init__(self):
        if not 0 <= self.uncond_prob <= 1 / 3:
            raise ValueError(f"uncond_prob must be in 0..1/3, got {self.uncond_prob}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {self.loss_type!r}")
        if self.offset_noise < 0:
            raise ValueError(f"offset_noise must not be negative, got {self.offset_noise}")


class Draws(NamedTuple):
    """Everything random in one training step (dropout aside).

    Attributes:
        timesteps: int ``[b]`` (or ``[b, f]``), uniform over the schedule.
        noise: of the latents, offset noise included, ``[b, f, h, w, c]``.
        uniform_drop: r of the conditioning dropout, ``[b]`` in [0, 1); ones drop nothing.
        posterior_noise: of the autoencoder's posterior, shaped as the latents; None for its mean.
    """

    timesteps: Int[Array, " b"]
    noise: Float[Array, "b f h w c"]
    uniform_drop: Float[Array, " b"]
    posterior_noise: Float[Array, "b f h w c"] | None = None


def sample_draws(
    key: Array,
    latent_shape: tuple[int, ...],
    cfg: TokenizerLossConfig,
    *,
    num_timesteps: int,
) -> Draws:
    """Draw a step's randomness.

    Args:
        key: one for the batch, or ``[b]``, one for each sample.
        latent_shape: ``(b, f, h, w, c)``.
        cfg: decides the offset noise.
        num_timesteps: length of the noise schedule.
    """
    t_key, noise_key, drop_key, posterior_key = split(key, 4)
    b = latent_shape[0]
    uniform_step = functools.partial(jax.random.randint, minval=0, maxval=num_timesteps)
    return Draws(
        timesteps=draw(uniform_step, t_key, (b,)),
        noise=sample_noise(noise_key, latent_shape, offset_strength=cfg.offset_noise),
        uniform_drop=draw(jax.random.uniform, drop_key, (b,)),
        posterior_noise=draw(jax.random.normal, posterior_key, latent_shape),
    )


def drop_masks(uniform_drop: Float[Array, " b"], uncond_prob: float) -> tuple[Array, Array]:
    """Which samples lose their text (r < 2p) and which their keyframes (p <= r < 3p), bool [b]."""
    drop_text = uniform_drop < 2 * uncond_prob
    drop_image = (uniform_drop >= uncond_prob) & (uniform_drop < 3 * uncond_prob)
    return drop_text, drop_image


def select_keyframes(video: Float[Array, "b f h w c"]) -> Float[Array, "b 2 h w c"]:
    """The frames whose deep tokens a clip is decoded from: first and last."""
    return video[:, jnp.array([0, -1])]


def decoder_loss(
    decoder: ClipDecoder,
    latents: Float[Array, "b f h w c"],
    tokens: Float[Array, "b k n d"],
    draws: Draws,
    cfg: TokenizerLossConfig,
    **options: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`denoising_loss` of the deep tokens of a frozen tokenizer.

    Where the draw says so, the tokens of a sample are replaced by the decoder's null tokens, the
    tokens of a zero image, so that both branches of guidance are trained.
    """
    _, drop_image = drop_masks(draws.uniform_drop, cfg.uncond_prob)
    null_tokens = decoder.null_tokens[...].astype(tokens.dtype)
    tokens = jnp.where(drop_image[:, None, None, None], null_tokens, tokens)
    return denoising_loss(decoder, latents, tokens, draws, cfg, **options)


@typechecked
def denoising_loss(
    decoder: ClipDecoder,
    latents: Float[Array, "b f h w c"],
    tokens: Float[Array, "b k n d"],
    draws: Draws,
    cfg: TokenizerLossConfig,
    *,
    fs: Int[Array, " b"] | None = None,
    text_context: Float[Array, "b l d"] | None = None,
    deterministic: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss once latents and (already dropped) deep tokens are known.

    With a ``latent_prior`` the error counts as that of the UNet's own output, whose target
    has variance 1 where the prior is right.

    Args:
        decoder: trained here: its UNet and latent head.
        latents: clean scaled latents.
        tokens: deep tokens of the keyframes, ``[b, 2, n, d]``.
        draws: timesteps, noise and dropout of this step; posterior noise is not used.
        cfg: loss settings.
        fs: frame-stride condition, ``[b]``; None for the UNet's default.
        text_context: text tokens; dropped samples, and all with ``no_text``, see the empty prompt.
        deterministic: turns dropout off.
        rngs: dropout randomness.

    Returns:
        The scalar loss and metrics: ``loss``, ``loss_simple``, ``loss_vlb``, ``latent_mean``,
        ``latent_std``, ``latent_norm`` (of the tokens each frame sees), ``loss_per_sample``
        ``[b]``; and the arrays ``x_t``, ``target``, ``prediction``.
    """
    num_frames = latents.shape[1]
    context = training_text(decoder, text_context, draws.uniform_drop, cfg)
    condition = decoder.condition(tokens, num_frames, text_context=context)
    weights = None
    if (prior := decoder.cfg.prior) is not None:
        assert draws.timesteps.ndim == 1
        weights = prior.output_std(draws.timesteps, 1) ** -(2 if cfg.loss_type == "l2" else 1)
    loss, metrics = diffusion_loss(
        lambda x, t: decoder.denoise(x, t, condition, fs, deterministic=deterministic, rngs=rngs),
        decoder.cfg.schedule,
        latents,
        draws.timesteps,
        draws.noise,
        loss_type=cfg.loss_type,
        simple_weight=cfg.simple_weight,
        elbo_weight=cfg.elbo_weight,
        sample_weights=weights,
    )
    # Statistics of the tokens as every frame sees them, as the original logs them.
    seen = condition.context[:, -num_frames * tokens.shape[2] :].astype(jnp.float32)
    metrics |= {
        "loss": loss,
        "latent_mean": seen.mean(),
        "latent_std": seen.std(ddof=1),
        "latent_norm": jnp.linalg.norm(seen, axis=-1).mean(),
    }
    return loss, metrics


def training_text(
    decoder: ClipDecoder,
    text_context: Float[Array, "b l d"] | None,
    uniform_drop: Float[Array, " b"],
    cfg: TokenizerLossConfig,
) -> Array | None:
    """Text tokens after dropping, ``[b, l, d]``; None for the empty prompt everywhere."""
    if cfg.no_text or text_context is None:
        return None
    drop_text, _ = drop_masks(uniform_drop, cfg.uncond_prob)
    empty = decoder.text_context[...].astype(text_context.dtype)
    return jnp.where(drop_text[:, None, None], empty, jax.lax.stop_gradient(text_context))


def tokenizer_loss(
    tokenizer: DeepTokenizer,
    decoder: ClipDecoder,
    video: Float[Array, "b f h w c"],
    draws: Draws,
    cfg: TokenizerLossConfig,
    *,
    per_frame: bool = True,
    **options: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The whole training loss from pixels: tokenizer and decoder learn together.

    Args:
        tokenizer: keyframes ``[b, k, h, w, 3]`` -> deep tokens ``[b, k, n, d]``.
        decoder: its autoencoder encodes the video without a gradient.
        video: pixels in [-1, 1].
        draws: this step's randomness.
        cfg: loss settings.
        per_frame: encode the video frame by frame, to save memory.
        options: as in `denoising_loss`.

    Returns:
        The scalar loss and metrics of `denoising_loss`, with ``latents`` and ``tokens``.
    """
    latents = jax.lax.stop_gradient(
        decoder.autoencoder.encode_latents(video, noise=draws.posterior_noise, per_frame=per_frame)
    )
    keyframes = select_keyframes(video)
    loss, metrics = keyframe_loss(tokenizer, decoder, latents, keyframes, draws, cfg, **options)
    return loss, metrics | {"latents": latents}


def keyframe_loss(
    tokenizer: DeepTokenizer,
    decoder: ClipDecoder,
    latents: Float[Array, "b f h w c"],
    keyframes: Float[Array, "b k y x 3"],
    draws: Draws,
    cfg: TokenizerLossConfig,
    **options: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`tokenizer_loss` on clean scaled latents and the keyframes that are read, in [-1, 1]."""
    _, drop_image = drop_masks(draws.uniform_drop, cfg.uncond_prob)
    # A zeroed keyframe is mid-grey; its tokens are what guidance calls unconditional.
    tokens = tokenizer(jnp.where(drop_image[:, None, None, None, None], 0.0, keyframes))
    loss, metrics = denoising_loss(decoder, latents, tokens, draws, cfg, **options)
    return loss, metrics | {"tokens": tokens}

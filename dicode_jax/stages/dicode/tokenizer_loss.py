"""Training losses of the tokenizer and clip decoder: denoising a clip given its keyframes' tokens.

DiCoDe (arXiv 2412.04446), section 3.1, with the switches of the original's training module. All
randomness can be injected (`Draws`), or comes from one key.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.diffusion.losses import LOSS_TYPES, diffusion_loss, sample_noise
from dicode_jax.models.dicode.decoder import ClipDecoder
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, sample_posterior
from dicode_jax.nn.rngs import draw, split
from dicode_jax.typing import Array, Float, Int, typechecked

EXTRA_TERMS = ("none", "vae", "kl_on_latent", "second_moment", "second_moment_per_channel")
BETA_SCHEDULERS = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Settings of the training loss; the defaults are those of the release.

    Attributes:
        uncond_prob: p. One uniform number r per sample drops the text where r < 2p and zeroes the
            keyframes where p <= r < 3p: text only, both, keyframes only, each with probability p.
        no_text: every sample sees the empty prompt, whatever r is.
        extra: regulariser on the deep tokens: "none"; "vae" (divergence of the token posterior);
            "kl_on_latent" (the same with unit variance); "second_moment" (|mean^2 + var - 1| of
            all tokens together); "second_moment_per_channel" (the same per channel, averaged).
        extra_weight: full weight of that term.
        extra_scheduler: how its weight grows, see `schedule_beta`.
        extra_steps: step at which the full weight is reached.
        offset_noise: strength of the offset noise.
        loss_type: "l2" or "l1".
        simple_weight, elbo_weight: see `dicode_jax.diffusion.losses.diffusion_loss`.
    """

    uncond_prob: float = 0.05
    no_text: bool = True
    extra: str = "none"
    extra_weight: float = 1e-4
    extra_scheduler: str = "constant"
    extra_steps: int = 1
    offset_noise: float = 0.0
    loss_type: str = "l2"
    simple_weight: float = 1.0
    elbo_weight: float = 0.0

    def __post_init__(self):
        if not 0 <= self.uncond_prob <= 1 / 3:
            raise ValueError(f"uncond_prob must be in 0..1/3, got {self.uncond_prob}")
        if self.extra not in EXTRA_TERMS:
            raise ValueError(f"extra must be one of {EXTRA_TERMS}, got {self.extra!r}")
        if self.extra_scheduler not in BETA_SCHEDULERS:
            raise ValueError(
                f"extra_scheduler must be one of {BETA_SCHEDULERS}, got {self.extra_scheduler!r}"
            )
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
        token_noise: of a token posterior (``extra`` "vae"), ``[b, k, n, d]``; None for its mean.
    """

    timesteps: Int[Array, " b"]
    noise: Float[Array, "b f h w c"]
    uniform_drop: Float[Array, " b"]
    posterior_noise: Float[Array, "b f h w c"] | None = None
    token_noise: Float[Array, "b k n d"] | None = None


def sample_draws(
    key: Array,
    latent_shape: tuple[int, ...],
    cfg: TokenizerLossConfig,
    *,
    num_timesteps: int,
    token_shape: tuple[int, ...] | None = None,
) -> Draws:
    """Draw a step's randomness.

    Args:
        key: one for the batch, or ``[b]``, one for each sample.
        latent_shape: ``(b, f, h, w, c)``.
        cfg: decides the offset noise.
        num_timesteps: length of the noise schedule.
        token_shape: ``(b, k, n, d)`` when the tokens are sampled too.
    """
    t_key, noise_key, drop_key, posterior_key, token_key = split(key, 5)
    b = latent_shape[0]
    uniform_step = functools.partial(jax.random.randint, minval=0, maxval=num_timesteps)
    return Draws(
        timesteps=draw(uniform_step, t_key, (b,)),
        noise=sample_noise(noise_key, latent_shape, offset_strength=cfg.offset_noise),
        uniform_drop=draw(jax.random.uniform, drop_key, (b,)),
        posterior_noise=draw(jax.random.normal, posterior_key, latent_shape),
        token_noise=(
            None if token_shape is None else draw(jax.random.normal, token_key, token_shape)
        ),
    )


def drop_masks(uniform_drop: Float[Array, " b"], uncond_prob: float) -> tuple[Array, Array]:
    """Which samples lose their text (r < 2p) and which their keyframes (p <= r < 3p), bool [b]."""
    drop_text = uniform_drop < 2 * uncond_prob
    drop_image = (uniform_drop >= uncond_prob) & (uniform_drop < 3 * uncond_prob)
    return drop_text, drop_image


def schedule_beta(
    step: int | Array, target_step: int, max_value: float, scheduler: str = "constant"
) -> float | Array:
    """Weight of a regulariser that grows over training.

    Args:
        step: training step, 0 first; may be traced.
        target_step: N, at least 1 (smaller is read as 1); from step N on the weight is full.
        max_value: the full weight.
        scheduler: "constant", "linear" (step / N) or "cosine" ((1 - cos(pi step / N)) / 2).

    Raises:
        ValueError: unknown scheduler.
    """
    if scheduler not in BETA_SCHEDULERS:
        raise ValueError(f"scheduler must be one of {BETA_SCHEDULERS}, got {scheduler!r}")
    if scheduler == "constant":
        return max_value
    progress = jnp.minimum(jnp.asarray(step) / max(target_step, 1), 1.0)
    if scheduler == "cosine":
        progress = (1 - jnp.cos(math.pi * progress)) / 2
    return max_value * progress


def token_kl(mean: Float[Array, "... d"], logvar: Float[Array, "... d"]) -> Float[Array, ""]:
    """Divergence of N(mean, exp(logvar)) from the standard normal: summed over d, then averaged."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return -0.5 * (1 + logvar - jnp.square(mean) - jnp.exp(logvar)).sum(-1).mean()


def second_moment(tokens: Float[Array, "... d"]) -> Float[Array, ""]:
    """|mean^2 + variance - 1| of all numbers together (biased variance)."""
    tokens = tokens.astype(jnp.float32)
    return jnp.abs(jnp.square(tokens.mean()) + tokens.var() - 1)


def second_moment_per_channel(tokens: Float[Array, "... d"]) -> Float[Array, ""]:
    """|mean^2 + variance - 1| of each channel, averaged over channels (biased variance)."""
    tokens = tokens.astype(jnp.float32).reshape(-1, tokens.shape[-1])
    return jnp.abs(jnp.square(tokens.mean(0)) + tokens.var(0) - 1).mean()


def extra_term(
    tokens: Float[Array, "b k n d"],
    extra: str,
    *,
    logvar: Float[Array, "b k n d"] | None = None,
) -> Float[Array, ""]:
    """The regulariser ``extra`` of `TokenizerLossConfig` on deep tokens.

    Args:
        tokens: deep tokens; for "vae" the mean of their posterior.
        extra: which term.
        logvar: log-variance of the token posterior, for "vae".

    Raises:
        ValueError: unknown term, or "vae" without ``logvar``.
    """
    if extra == "none":
        return jnp.zeros(())
    if extra == "vae":
        if logvar is None:
            raise ValueError("the 'vae' term needs the log-variance of the token posterior")
        return token_kl(tokens, logvar)
    if extra == "kl_on_latent":
        return token_kl(tokens, jnp.zeros_like(tokens))
    if extra == "second_moment":
        return second_moment(tokens)
    if extra == "second_moment_per_channel":
        return second_moment_per_channel(tokens)
    raise ValueError(f"extra must be one of {EXTRA_TERMS}, got {extra!r}")


def select_keyframes(
    video: Float[Array, "b f h w c"], image_proj_type: str
) -> Float[Array, "b k h w c"]:
    """The frames whose deep tokens a clip is decoded from: first and last, or all ("fullseq")."""
    if image_proj_type == "fullseq":
        return video
    return video[:, jnp.array([0, -1])]


@typechecked
def decoder_loss(
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
    """Denoising loss on cached latents with given deep tokens (frozen tokenizer).

    Where the draw says so, the tokens of a sample are replaced by the decoder's null tokens, the
    tokens of a zero image, so that both branches of guidance are trained.

    Args:
        decoder: trained here: its UNet and latent head.
        latents: clean scaled latents.
        tokens: deep tokens of the keyframes, ``[b, 2, n, d]`` (``[b, f, n, d]`` with "fullseq").
        draws: timesteps, noise and dropout of this step; posterior and token noise are not used.
        cfg: loss settings.
        fs: frame-stride condition, ``[b]``; None for the UNet's default.
        text_context: text tokens; dropped samples, and all with ``no_text``, see the empty prompt.
        deterministic: turns dropout off.
        rngs: dropout randomness.

    Returns:
        The scalar loss and metrics, see `denoising_loss`.
    """
    _, drop_image = drop_masks(draws.uniform_drop, cfg.uncond_prob)
    null_tokens = decoder.null_tokens[...].astype(tokens.dtype)
    tokens = jnp.where(drop_image[:, None, None, None], null_tokens, tokens)
    extra = extra_term(tokens, cfg.extra) if cfg.extra != "vae" else jnp.zeros(())
    return denoising_loss(
        decoder,
        latents,
        tokens,
        draws,
        cfg,
        fs=fs,
        text_context=text_context,
        extra=extra,
        deterministic=deterministic,
        rngs=rngs,
    )


@typechecked
def denoising_loss(
    decoder: ClipDecoder,
    latents: Float[Array, "b f h w c"],
    tokens: Float[Array, "b k n d"],
    draws: Draws,
    cfg: TokenizerLossConfig,
    *,
    step: int | Array = 0,
    fs: Int[Array, " b"] | None = None,
    text_context: Float[Array, "b l d"] | None = None,
    extra: Float[Array, ""] | None = None,
    deterministic: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss once latents and (already dropped) deep tokens are known.

    Args:
        decoder, latents, tokens, draws, cfg, fs, text_context, deterministic, rngs: as in
            `decoder_loss`.
        step: training step, for the weight of ``extra``.
        extra: value of the regulariser on the tokens.

    Returns:
        The scalar loss and metrics: ``loss``, ``loss_simple``, ``loss_vlb``, ``loss_extra``,
        ``extra_weight``, ``latent_mean``, ``latent_std``, ``latent_norm`` (of the tokens each frame
        sees), ``loss_per_sample`` ``[b]``; and the arrays ``x_t``, ``target``, ``prediction``.
    """
    num_frames = latents.shape[1]
    context = training_text(decoder, text_context, draws.uniform_drop, cfg)
    condition = decoder.condition(tokens, num_frames, text_context=context)
    loss, metrics = diffusion_loss(
        lambda x, t: decoder.denoise(x, t, condition, fs, deterministic=deterministic, rngs=rngs),
        decoder.cfg.schedule,
        latents,
        draws.timesteps,
        draws.noise,
        loss_type=cfg.loss_type,
        simple_weight=cfg.simple_weight,
        elbo_weight=cfg.elbo_weight,
    )
    weight = schedule_beta(step, cfg.extra_steps, cfg.extra_weight, cfg.extra_scheduler)
    extra = jnp.zeros(()) if extra is None else extra
    loss = loss + weight * extra
    # Statistics of the tokens as every frame sees them, as the original logs them.
    seen = condition.context[:, -num_frames * tokens.shape[2] :].astype(jnp.float32)
    metrics |= {
        "loss": loss,
        "loss_extra": extra,
        "extra_weight": jnp.asarray(weight, jnp.float32),
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
    step: int | Array = 0,
    fs: Int[Array, " b"] | None = None,
    text_context: Float[Array, "b l d"] | None = None,
    per_frame: bool = True,
    deterministic: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The whole training loss from pixels: tokenizer and decoder learn together.

    Args:
        tokenizer: keyframes ``[b, k, h, w, 3]`` -> deep tokens ``[b, k, n, d]``; ``extra`` "vae"
            needs one with a posterior.
        decoder: its autoencoder encodes the video without a gradient.
        video: pixels in [-1, 1].
        draws: this step's randomness.
        cfg: loss settings.
        step: training step, for the weight of the regulariser.
        fs, text_context, deterministic, rngs: as in `decoder_loss`.
        per_frame: encode the video frame by frame, to save memory.

    Returns:
        The scalar loss and metrics of `denoising_loss`, with ``latents`` and ``tokens``.
    """
    latents = jax.lax.stop_gradient(
        decoder.autoencoder.encode_latents(video, noise=draws.posterior_noise, per_frame=per_frame)
    )
    keyframes = select_keyframes(video, decoder.cfg.image_proj_type)
    loss, metrics = keyframe_loss(
        tokenizer,
        decoder,
        latents,
        keyframes,
        draws,
        cfg,
        step=step,
        fs=fs,
        text_context=text_context,
        deterministic=deterministic,
        rngs=rngs,
    )
    return loss, metrics | {"latents": latents}


def keyframe_loss(
    tokenizer: DeepTokenizer,
    decoder: ClipDecoder,
    latents: Float[Array, "b f h w c"],
    keyframes: Float[Array, "b k y x 3"],
    draws: Draws,
    cfg: TokenizerLossConfig,
    *,
    step: int | Array = 0,
    fs: Int[Array, " b"] | None = None,
    text_context: Float[Array, "b l d"] | None = None,
    deterministic: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`tokenizer_loss` on clean scaled latents and the keyframes that are read, in [-1, 1]."""
    _, drop_image = drop_masks(draws.uniform_drop, cfg.uncond_prob)
    # A zeroed keyframe is mid-grey; its tokens are what guidance calls unconditional.
    keyframes = jnp.where(drop_image[:, None, None, None, None], 0.0, keyframes)
    if cfg.extra == "vae":
        mean, logvar = tokenizer.posterior(tokenizer(keyframes))
        latent = mean
        if draws.token_noise is not None:
            latent = sample_posterior(mean, logvar, draws.token_noise)
        tokens = tokenizer.decode_posterior(latent)
        extra = extra_term(mean, "vae", logvar=logvar)
    else:
        tokens = tokenizer(keyframes)
        extra = extra_term(tokens, cfg.extra)
    loss, metrics = denoising_loss(
        decoder,
        latents,
        tokens,
        draws,
        cfg,
        step=step,
        fs=fs,
        text_context=text_context,
        extra=extra,
        deterministic=deterministic,
        rngs=rngs,
    )
    return loss, metrics | {"tokens": tokens}

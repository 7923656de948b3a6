"""Clip decoder: a latent video diffusion model that paints a clip from its keyframes' tokens.

DiCoDe (arXiv 2412.04446), section 3.1; DynamiCrafter (arXiv 2310.12190) is the backbone. The text
prompt of the backbone is always the empty one, so its embedding is stored as a constant beside the
weights, as are the deep tokens of an all-zero (mid-grey) image, the unconditional condition:
decoding a clip needs no CLIP.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.diffusion.guided import SamplingConfig, first_state, guided_steps, starting_noise
from dicode_jax.diffusion.prior import GaussianPrior
from dicode_jax.diffusion.samplers.base import Steps, run_steps
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.media.transforms import to_uint8 as to_uint8
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.dicode.token_path import TokenPath, check_path
from dicode_jax.models.dicode.tokenizer import mask_leading_tokens, tokens_between
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.ready import with_ready_kernels
from dicode_jax.nn.resampler import Resampler, ResamplerConfig
from dicode_jax.nn.spatiotemporal import repeat_rows
from dicode_jax.typing import Array, Float, Int, typechecked


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipDecoderConfig:
    """Parts and conditioning of a `ClipDecoder`.

    Attributes:
        unet: the denoiser; `context_dim` is the width of the deep tokens.
        autoencoder: latents <-> pixels.
        schedule: training noise schedule and parameterization.
        num_tokens: deep tokens per keyframe. The first half of the frames sees those of the first
            keyframe, the second half those of the second.
        latent_head: makes a latent image of a keyframe's tokens, which is concatenated to the
            noisy latents on channels (the original's `hybrid_concat`). None for off.
        latent_view: which latent image a frame sees: "nearest", that of the keyframe whose half of
            the clip it is in (the original), or "between", that of tokens as far between those of
            the keyframes as the frame is, and its place, from 0 to 1, on a channel behind it (ours;
            see `RepresentationTrainConfig.between_weight`). Read with a `latent_head`.
        token_path: bends the way between the tokens of two keyframes (ours; see `TokenPath`), for
            "between". None for a line.
        latent_prior: standard deviation of latents about the latent image that their frame sees:
            the UNet then only says what a Gaussian so wide about that image leaves open (ours; see
            `ClipDecoder.denoise`). None for a UNet that says everything, as the original's. There
            is no guidance then, as null tokens show nothing that latents are about.
        latent_size: rows and columns of latents; None for the autoencoder's resolution.
    """

    unet: UNet3DConfig = dataclasses.field(default_factory=UNet3DConfig)
    autoencoder: AutoencoderKLConfig = dataclasses.field(default_factory=AutoencoderKLConfig)
    schedule: NoiseSchedule = dataclasses.field(
        default_factory=lambda: NoiseSchedule(zero_terminal_snr=True, parameterization="v")
    )
    num_tokens: int = 16
    latent_head: ResamplerConfig | None = None
    latent_view: Literal["nearest", "between"] = "nearest"
    token_path: ResamplerConfig | None = None
    latent_prior: float | None = None
    latent_size: tuple[int, int] | None = None

    RETIRED: ClassVar = {
        "image_proj_type": ("headrear", "headrear, the tokens of two keyframes,"),
        "null_text": ("empty", "the empty prompt"),
    }

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")
        if self.latent_view not in ("nearest", "between"):
            raise ValueError(f"latent_view must be nearest or between, got {self.latent_view!r}")
        latent_channels = self.autoencoder.embed_dim
        if self.unet.out_channels != latent_channels:
            raise ValueError(
                f"the UNet must give the autoencoder's {latent_channels} latent channels, "
                f"its out_channels is {self.unet.out_channels}"
            )
        if self.unet.context_dim is None:
            raise ValueError("the UNet must read deep tokens: set its context_dim")
        extra = 0
        if self.latent_head is not None:
            if self.latent_head.output_shape is None:
                raise ValueError("latent_head needs output_shape (h, w, c) of the latent image")
            if self.latent_head.embed_dim != self.token_dim:
                raise ValueError(
                    f"latent_head reads deep tokens of width {self.token_dim} (unet.context_dim), "
                    f"its embed_dim is {self.latent_head.embed_dim}"
                )
            extra = self.latent_head.output_shape[-1]
            if self.latent_view == "between":
                extra += 1
        if self.token_path is not None:
            if self.latent_view != "between" or self.latent_head is None:
                raise ValueError('token_path needs a latent_head and latent_view "between"')
            check_path(self.token_path, self.num_tokens, self.token_dim)
        if self.latent_prior is not None:
            self._check_prior()
        if self.unet.in_channels != latent_channels + extra:
            raise ValueError(
                f"the UNet must take {latent_channels} latent and {extra} conditioning channels, "
                f"its in_channels is {self.unet.in_channels}"
            )

    def _check_prior(self):
        try:
            _ = self.prior
        except ValueError as error:
            raise ValueError(f"latent_prior: {error}") from error
        shape = self.latent_head.output_shape if self.latent_head else None
        if shape is None or shape[-1] != self.autoencoder.embed_dim:
            raise ValueError(
                "latent_prior needs a latent_head that makes images of the autoencoder's "
                f"{self.autoencoder.embed_dim} latent channels, its output_shape is {shape}"
            )

    @property
    def prior(self) -> GaussianPrior | None:
        """What is known of latents before the UNet says anything, where there is a latent_prior."""
        if self.latent_prior is None:
            return None
        return GaussianPrior(schedule=self.schedule, std=self.latent_prior)

    @property
    def token_dim(self) -> int:
        """Width of a deep token, the UNet's context width."""
        assert self.unet.context_dim is not None  # checked above
        return self.unet.context_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latents of a frame that sampling makes by default."""
        if self.latent_size is not None:
            h, w = self.latent_size
        else:
            h = w = self.autoencoder.resolution // self.autoencoder.downsampling
        return h, w, self.autoencoder.embed_dim


class Condition(NamedTuple):
    """What the UNet is told besides the noisy latents and the time.

    Attributes:
        context: text tokens, then the deep tokens of every frame, ``[b, l + f n, d]``.
        concat: latent image of every frame, ``[b, f, h, w, c]``, or None.
    """

    context: Array
    concat: Array | None


class ClipDecoder(nnx.Module):
    """UNet, autoencoder, optional latent head, and two constants.

    ``text_context`` ``[l, d]`` and ``null_tokens`` ``[n, d]`` are parameters only in that they are
    stored with the weights; `is_constant` names them so that training leaves them alone. They
    start as zeros and are set from a tokenizer (or a checkpoint).
    """

    def __init__(
        self, cfg: ClipDecoderConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.cfg = cfg
        self.unet = UNet3D(cfg.unet, **options)
        self.autoencoder = AutoencoderKL(cfg.autoencoder, **options)
        if cfg.latent_head is not None:
            self.latent_head = Resampler(cfg.latent_head, **options)
        if cfg.token_path is not None:
            self.token_path = TokenPath(cfg.token_path, **options)
        self.text_context = nnx.Param(
            jnp.zeros((cfg.unet.text_context_len, cfg.token_dim), param_dtype)
        )
        self.null_tokens = nnx.Param(jnp.zeros((cfg.num_tokens, cfg.token_dim), param_dtype))

    @typechecked
    def condition(
        self,
        tokens: Float[Array, "b k n d"],
        num_frames: int,
        *,
        text_context: Float[Array, "b l d"] | None = None,
    ) -> Condition:
        """Spread deep tokens (and the latent images they stand for) over the frames of a clip.

        Args:
            tokens: of the clip's first and last frame, ``[b, 2, n, d]``.
            num_frames: frames of the clip, an even number.
            text_context: text tokens instead of the stored empty prompt.

        Raises:
            ValueError: there are not two keyframes, or an odd number of frames.
        """
        cfg = self.cfg
        b, k, n, d = tokens.shape
        if k != 2:
            raise ValueError(f"a clip needs the deep tokens of 2 keyframes, got {k}")
        if (n, d) != (cfg.num_tokens, cfg.token_dim):
            raise ValueError(
                f"a keyframe has {cfg.num_tokens} deep tokens of width {cfg.token_dim}, "
                f"got {n} of width {d}"
            )
        if num_frames % k:
            raise ValueError(f"the number of frames must be a multiple of {k}, got {num_frames}")
        if text_context is None:
            text_context = jnp.broadcast_to(self.text_context[...], (b, *self.text_context.shape))
        per_frame = jnp.repeat(tokens, num_frames // k, axis=1)
        image_context = rearrange(per_frame, "b f n d -> b (f n) d").astype(text_context.dtype)
        concat = None
        if cfg.latent_head is not None:
            if cfg.latent_view == "between":
                concat = self._images_between(tokens, num_frames)
            else:
                concat = jnp.repeat(self.latent_images(tokens), num_frames // k, axis=1)
        return Condition(jnp.concatenate([text_context, image_context], axis=1), concat)

    @typechecked
    def latent_images(self, tokens: Float[Array, "b k n d"]) -> Float[Array, "b k h w c"]:
        """The latent head's image of each keyframe.

        Raises:
            ValueError: this decoder has no latent head.
        """
        if self.cfg.latent_head is None:
            raise ValueError("this decoder has no latent head (cfg.latent_head is None)")
        images = self.latent_head(rearrange(tokens, "b k n d -> (b k) n d"))
        return rearrange(images, "(b k) h w c -> b k h w c", b=len(tokens))

    def _images_between(
        self, tokens: Float[Array, "b 2 n d"], num_frames: int
    ) -> Float[Array, "b f h w c"]:
        """The latent head's image at every frame's place, and that place on one more channel."""
        place = jnp.linspace(0, 1, num_frames, dtype=tokens.dtype)
        way = tokens_between if self.cfg.token_path is None else self.token_path
        images = self.latent_images(way(tokens, place))
        place = jnp.broadcast_to(place[:, None, None, None], (*images.shape[:-1], 1))
        return jnp.concatenate([images, place.astype(images.dtype)], axis=-1)

    def null_condition(
        self,
        batch: int,
        num_frames: int,
        *,
        null_tokens: Float[Array, "n d"] | None = None,
        text_context: Float[Array, "b l d"] | None = None,
        concat: Float[Array, "b f h w c"] | None = None,
    ) -> Condition:
        """The unconditional condition: null tokens at every frame.

        Args:
            batch: number of samples.
            num_frames: frames of the clip.
            null_tokens: instead of the stored ones.
            text_context: text tokens instead of the stored empty prompt.
            concat: latent images to keep; the original gives the unconditional branch the
                conditional ones. None makes them from the null tokens where there is a latent head.
        """
        if null_tokens is None:
            null_tokens = self.null_tokens[...]
        tokens = jnp.broadcast_to(null_tokens, (batch, 2, *null_tokens.shape))
        if concat is None:
            return self.condition(tokens, num_frames, text_context=text_context)
        if text_context is None:
            text_context = jnp.broadcast_to(
                self.text_context[...], (batch, *self.text_context.shape)
            )
        image_context = jnp.tile(null_tokens.astype(text_context.dtype), (num_frames, 1))
        image_context = jnp.broadcast_to(image_context, (batch, *image_context.shape))
        return Condition(jnp.concatenate([text_context, image_context], axis=1), concat)

    def denoise(
        self,
        x: Float[Array, "b f h w c"],
        timesteps: Int[Array, " b"] | Int[Array, "b f"],
        condition: Condition,
        fs: Int[Array, " m"] | None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "m f h w c"]:
        """One network evaluation; concatenates the latent images to ``x`` where there are any.

        A condition may have more rows, of several branches of guidance whose latent images are the
        same: first one for each of ``x``, and so on. So has the result then.

        With a ``latent_prior`` latents lie about their frame's latent image, see `GaussianPrior`:
        the UNet reads them and gives v, both less their mean and over their deviation.
        """
        seen, fs = self._seen(x, timesteps, condition, fs)
        out = self.unet(
            seen, timesteps, condition.context, fs, deterministic=deterministic, rngs=rngs
        )
        return self._told(out, x, timesteps, condition)

    def denoise_deep(
        self, x: Array, timesteps: Array, condition: Condition, fs: Array | None, deep: Array | None
    ) -> tuple[Array, Array]:
        """`denoise` with the UNet's deep features, old or new; see `UNet3D.with_deep`."""
        seen, fs = self._seen(x, timesteps, condition, fs)
        out, deep = self.unet.with_deep(seen, timesteps, condition.context, fs, deep=deep)
        return self._told(out, x, timesteps, condition), deep

    def _seen(self, x: Array, timesteps: Array, condition: Condition, fs: Array | None):
        """What the UNet reads of the latents, and their strides: a row for each of ``x``."""
        if self.cfg.prior is not None:
            x = self.cfg.prior.whiten(x, self._prior_mean(condition)[: len(x)], timesteps)
        if condition.concat is not None:
            x = jnp.concatenate([x, condition.concat[: len(x)].astype(x.dtype)], axis=-1)
        return x, None if fs is None else fs[: len(x)]

    def _told(self, out: Array, x: Array, timesteps: Array, condition: Condition) -> Array:
        """What the output of the UNet says of v."""
        if self.cfg.prior is None:
            return out
        x, timesteps = (repeat_rows(y, len(out) // len(y)) for y in (x, timesteps))
        return self.cfg.prior.velocity(out, x, self._prior_mean(condition), timesteps)

    def _prior_mean(self, condition: Condition) -> Array:
        assert condition.concat is not None
        return condition.concat[..., : self.cfg.autoencoder.embed_dim].astype(jnp.float32)


def is_constant(path: tuple) -> bool:
    """Whether a path in the state of a `ClipDecoder` is one of its stored constants."""
    return any(str(part) in ("text_context", "null_tokens") for part in path)


def clip_conditions(
    decoder: ClipDecoder,
    tokens: Float[Array, "b k n d"],
    cfg: SamplingConfig,
    *,
    null_tokens: Float[Array, "n d"] | None = None,
) -> list[Condition]:
    """Condition of a clip, and the null condition where ``cfg`` is guided.

    Args:
        decoder: gives the constants and the latent head.
        tokens: deep tokens, ``[b, 2, n, d]``.
        cfg: sampling settings.
        null_tokens: deep tokens of the unconditional branch instead of the stored ones.
    """
    if cfg.drop_tokens is not None:
        tokens = mask_leading_tokens(tokens, cfg.drop_tokens)
    cond = decoder.condition(tokens, cfg.num_frames)
    if not cfg.is_guided:
        return [cond]
    uncond = decoder.null_condition(
        tokens.shape[0], cfg.num_frames, null_tokens=null_tokens, concat=cond.concat
    )
    return [cond, uncond]


def first_latents(decoder: ClipDecoder, keys: Array, cfg: SamplingConfig) -> Array:
    """The noise that a clip begins with, float32 ``[b, f, h, w, c]``; of a key for each sample."""
    return starting_noise(keys, (cfg.num_frames, *decoder.cfg.latent_shape))


def clip_steps(
    decoder: ClipDecoder,
    conditions: list[Condition],
    keys: Array | None,
    cfg: SamplingConfig,
    *,
    latent_shape: tuple[int, ...] | None = None,
    noise: Float[Array, "s b f h w c"] | None = None,
) -> Steps:
    """The steps of `decode_clip`, to be taken some at a time.

    Args:
        decoder, keys, cfg, noise: see `decode_clip`.
        conditions: of `clip_conditions`.
        latent_shape: height, width and channels of the latents; None for the decoder's own.

    Raises:
        ValueError: see `decode_clip`.
    """
    denoiser = with_ready_kernels(decoder)
    size = decoder.cfg.latent_shape if latent_shape is None else latent_shape
    return guided_steps(
        denoiser.denoise,
        conditions,
        decoder.cfg.schedule,
        cfg,
        (conditions[0].context.shape[0], cfg.num_frames, *size),
        keys=keys,
        noise=noise,
        predict_deep=denoiser.denoise_deep,
        spreads=True,
    )


@typechecked
def decode_clip(
    decoder: ClipDecoder,
    tokens: Float[Array, "b k n d"],
    keys: Array | None,
    cfg: SamplingConfig,
    *,
    x_init: Float[Array, "b f h w c"] | None = None,
    noise: Float[Array, "s b f h w c"] | None = None,
    null_tokens: Float[Array, "n d"] | None = None,
) -> Float[Array, "b f h w c"]:
    """Sample the latents of a clip from deep tokens. Pure: jit it with ``cfg`` as an argument.

    Args:
        decoder: the model.
        tokens: deep tokens of the first and last frame, ``[b, 2, n, d]``.
        keys: one key per sample, ``[b]``; a sample depends on its key alone, not on the batch.
            None when ``x_init`` (and, with eta > 0, ``noise``) are given.
        cfg: sampling settings.
        x_init: starting noise instead of the keys'.
        noise: noise of every step instead of the keys'.
        null_tokens: see `clip_conditions`.

    Returns:
        Scaled latents ``[b, f, h, w, c]``, float32; see `decode_latents`.

    Raises:
        ValueError: neither keys nor noise, or shapes that do not fit the config.
    """
    if x_init is not None and x_init.shape[1] != cfg.num_frames:
        raise ValueError(f"x_init has {x_init.shape[1]} frames, the config {cfg.num_frames}")
    conditions = clip_conditions(decoder, tokens, cfg, null_tokens=null_tokens)
    x_init = first_state(x_init, keys, (cfg.num_frames, *decoder.cfg.latent_shape))
    steps = clip_steps(decoder, conditions, keys, cfg, latent_shape=x_init.shape[2:], noise=noise)
    return run_steps(steps, steps.begin(x_init))[0]


@typechecked
def decode_latents(
    decoder: ClipDecoder, latents: Float[Array, "b f h w c"], *, per_frame: bool = False
) -> Float[Array, "b f y x 3"]:
    """Scaled latents to pixels, about [-1, 1] and not clipped, float32.

    Args:
        decoder: holds the autoencoder.
        latents: ``[b, f, h, w, c]``.
        per_frame: one frame after the other, to save memory; equal results.
    """
    return decoder.autoencoder.decode_latents(latents, per_frame=per_frame).astype(jnp.float32)

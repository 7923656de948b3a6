"""AR-Diffusion's frame VAE: 32 tokens of 4 numbers for each frame (arXiv 2503.07418, section 3.1).

Follows `TiTok_KL`, and with `temporal` `TiTok_KL_wT`. Tokens are unit vectors: the decoder scales
whatever it gets to length one. Pixels lie in [0, 1] here, as they did in the original's training.
Shape letters: b videos, f frames, n images, h w pixels, y x patches, l tokens, c their channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.distributions.projected_gaussian import ProjectedGaussian, unit
from dicode_jax.models.ar_diffusion.temporal_decoder import TemporalMix
from dicode_jax.models.maskgit_decoder import MaskGITDecoder, MaskGITDecoderConfig
from dicode_jax.models.query_tokenizer import QueryDecoder, QueryEncoder, QueryTransformerConfig
from dicode_jax.nn.linear import Linear
from dicode_jax.typing import Array, Float, typechecked

SHARP = nnx.initializers.variance_scaling(4.0, "fan_in", "normal")
START_LOGVAR = -5.0


def _quiet(key, shape, dtype):
    """Biases of the means, zero, and of the log-variances."""
    return jnp.zeros(shape, dtype).at[shape[0] // 2 :].set(START_LOGVAR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameVAEConfig:
    """Sizes; the defaults are those of the release, 640,993,547 parameters.

    Attributes:
        image_size: height and width in pixels.
        num_tokens: tokens of a frame.
        token_dim: numbers of a token.
        codebook_size: rows of the soft codebook between transformer and pixel decoder.
        encoder, decoder: the transformers.
        pixel_decoder: from what the codebook gives for each patch to pixels.
        temporal: the decoder looks at frames before, see `temporal_decoder`.
    """

    image_size: int = 256
    num_tokens: int = 32
    token_dim: int = 4
    codebook_size: int = 1024
    encoder: QueryTransformerConfig = QueryTransformerConfig()
    decoder: QueryTransformerConfig = QueryTransformerConfig()
    pixel_decoder: MaskGITDecoderConfig = MaskGITDecoderConfig()
    temporal: bool = False

    def __post_init__(self):
        check_counts(self, image_size=65536)
        for name in ("image_size", "num_tokens", "token_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for side in (self.encoder, self.decoder):
            if self.image_size % side.patch_size:
                raise ValueError(
                    f"image_size must be a multiple of patch_size, got {self.image_size} and "
                    f"{side.patch_size}"
                )
        if self.decoder.patch_size != self.pixel_decoder.upsampling:
            raise ValueError(
                f"the pixel decoder makes {self.pixel_decoder.upsampling} pixels of a patch (2 for "
                f"each level after the first), but the decoder's patch_size is "
                f"{self.decoder.patch_size}"
            )


class FrameVAE(nnx.Module):
    """Frames [b, f, h, w, 3] in [0, 1] to latents [b, f, l, c], and back."""

    def __init__(self, cfg: FrameVAEConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sizes = {"image_size": cfg.image_size, "num_tokens": cfg.num_tokens}
        width, codes = cfg.decoder.embed_dim, cfg.codebook_size
        self.cfg = cfg
        self.encoder = QueryEncoder(cfg.encoder, **sizes, **options)
        # Draws start near the mean: behind noise as large as a token nothing is learned for long.
        self.moments_proj = Linear(
            cfg.encoder.embed_dim, 2 * cfg.token_dim, bias_init=_quiet, **options
        )
        self.decoder = QueryDecoder(cfg.decoder, **sizes, token_dim=cfg.token_dim, **options)
        self.temporal = TemporalMix(cfg.decoder, **options) if cfg.temporal else None
        # The original starts from trained codes. At its own initial values all patches would get
        # the mean of the codebook, to six digits.
        self.code_up = Linear(width, 2 * width, **options)
        self.code_logits = Linear(2 * width, codes, kernel_init=SHARP, **options)
        self.codebook = Linear(
            codes,
            cfg.pixel_decoder.z_channels,
            kernel_init=nnx.initializers.normal(1.0),
            **options,
        )
        self.pixel_decoder = MaskGITDecoder(cfg.pixel_decoder, **options)

    @typechecked
    def moments(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n l c2"]:
        """Mean and unclamped log-variance, side by side on the last axis.

        The numbers of all tokens of an image are dealt out anew, in the order in which they lie,
        before they are projected: the original reads `[l, d]` as `[d, l]` without turning it.
        """
        x = self.encoder(images)
        return self.moments_proj(x.reshape(len(x), -1, self.cfg.num_tokens).swapaxes(1, 2))

    def posterior(self, images: Float[Array, "n h w 3"]) -> ProjectedGaussian:
        """Unit vectors [n, l, c] as they are drawn while the VAE is trained."""
        return ProjectedGaussian(DiagonalGaussian.from_moments(self.moments(images)))

    @typechecked
    def encode(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b f l c"]:
        """Means of the latents, float32, of any length: what is stored for the diffusion model."""
        moments = self.moments(rearrange(video, "b f h w c -> (b f) h w c"))
        mean = DiagonalGaussian.from_moments(moments).mean
        return rearrange(mean, "(b f) l c -> b f l c", b=len(video))

    @typechecked
    def decode(
        self, latents: Float[Array, "b f l c"], only: Array | None = None
    ) -> Float[Array, "b g h w 3"]:
        """Frames, not clipped to [0, 1]; only the directions of the latents count.

        A frame does not depend on later ones, nor without `temporal` on any other.

        Args:
            only: number of the one frame that is painted, which may be traced; None for all.

        Raises:
            ValueError: the latents are of another number or width of tokens than the config's.
        """
        cfg = self.cfg
        if latents.shape[2:] != (cfg.num_tokens, cfg.token_dim):
            raise ValueError(
                f"latents must have {cfg.num_tokens} tokens of {cfg.token_dim} channels, got "
                f"{latents.shape[2]} of {latents.shape[3]}"
            )
        patches = rearrange(self.patches(latents), "(b f) y x d -> b f y x d", b=len(latents))
        if only is not None:
            patches = jax.lax.dynamic_slice_in_dim(patches, only, 1, axis=1)
        codes = self.soft_codes(self.logits(rearrange(patches, "b f y x d -> (b f) y x d")))
        images = self.pixel_decoder(codes)
        return rearrange(images, "(b f) h w c -> b f h w c", b=len(latents))

    def patches(self, latents: Float[Array, "b f l c"]) -> Float[Array, "n y x d"]:
        """What the transformer makes of the latents' directions, one vector for each patch."""
        mix = None
        if self.temporal is not None:
            sizes = {"num_frames": latents.shape[1], "num_tokens": latents.shape[2]}
            mix = functools.partial(self.temporal, **sizes)
        tokens = unit(rearrange(latents, "b f l c -> (b f) l c"))
        return self.decoder(tokens, mix)

    def logits(self, patches: Float[Array, "n y x d"]) -> Float[Array, "n y x k"]:
        """Which codes each patch is made of."""
        return self.code_logits(jnp.tanh(self.code_up(patches)))

    def soft_codes(self, logits: Float[Array, "n y x k"]) -> Float[Array, "n y x z"]:
        """What the pixel decoder gets: for each patch a mean of codes."""
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return self.codebook(weights.astype(logits.dtype))

    def __call__(
        self,
        video: Float[Array, "b f h w 3"],
        key: Array | None = None,
        *,
        noise: Float[Array, "n l c"] | None = None,
    ) -> tuple[Float[Array, "b f h w 3"], ProjectedGaussian]:
        """Frames through drawn latents, or through the directions of the means, and the posterior.

        Args:
            key: one, or keys [b f], one for each frame; without key and noise nothing is drawn.
            noise: standard normal numbers in place of a key.
        """
        posterior = self.posterior(rearrange(video, "b f h w c -> (b f) h w c"))
        draw = key is not None or noise is not None
        latents = posterior.sample(key, noise=noise) if draw else posterior.mode()
        return self.decode(rearrange(latents, "(b f) l c -> b f l c", b=len(video))), posterior

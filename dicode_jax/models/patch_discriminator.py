"""PatchGAN's discriminator with batch norm (Isola et al., 2017), as taming-transformers has it.

Running statistics are no parameters: they come in and go out as a pytree, so that a step under jit
is pure. In training, statistics are those of the whole batch, over all devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dicode_jax.config import check_counts
from dicode_jax.typing import Array, Float, typechecked

NORM_EPS, MOMENTUM = 1e-5, 0.1
INIT = nnx.initializers.normal(0.02)

Statistics = tuple[dict[str, Array], ...]  # `mean` and `variance` [c] of each norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchDiscriminatorConfig:
    """Sizes; the defaults are AR-Diffusion's, 2,765,633 parameters.

    Attributes:
        channels: width of the first layer; doubled by each layer, up to eight times.
        num_layers: layers of stride 2.
    """

    channels: int = 64
    num_layers: int = 3

    def __post_init__(self):
        check_counts(self, num_layers=20)
        if self.channels < 1 or self.num_layers < 1:
            raise ValueError("channels and num_layers must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels behind each layer but the last one."""
        return tuple(self.channels * min(2**i, 8) for i in range(self.num_layers + 1))

    @property
    def least_size(self) -> int:
        """Height and width of the smallest images that it judges."""
        return 3 * 2**self.num_layers


class BatchNorm(nnx.Module):
    """Scale and bias of a batch norm over `[n, h, w, c]`; statistics in float32."""

    def __init__(self, channels: int, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        drawn = 1.0 + 0.02 * jax.random.normal(rngs.params(), (channels,), param_dtype)
        self.scale = nnx.Param(drawn)
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(
        self, x: Float[Array, "n h w c"], running: dict[str, Array], train: bool
    ) -> tuple[Float[Array, "n h w c"], dict[str, Array]]:
        dtype, x = x.dtype, x.astype(jnp.float32)
        mean, variance = running["mean"], running["variance"]
        if train:
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            count = x.size // x.shape[-1]
            unbiased = variance * (count / max(count - 1, 1))
            blend = lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * jax.lax.stop_gradient(new)  # noqa: E731
            running = {
                "mean": blend(running["mean"], mean),
                "variance": blend(running["variance"], unbiased),
            }
        y = (x - mean) * jax.lax.rsqrt(variance + NORM_EPS) * self.scale[...] + self.bias[...]
        return y.astype(dtype), running


class PatchDiscriminator(nnx.Module):
    """Images to one logit for each patch: high where they look real."""

    def __init__(
        self,
        cfg: PatchDiscriminatorConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        convs, norms, width = [], [], 3
        for i, out in enumerate((*cfg.widths, 1)):
            is_edge = i in (0, cfg.num_layers + 1)
            convs.append(
                nnx.Conv(
                    width,
                    out,
                    kernel_size=(4, 4),
                    strides=2 if i < cfg.num_layers else 1,
                    padding=1,
                    use_bias=is_edge,
                    kernel_init=INIT,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
            )
            if not is_edge:
                norms.append(BatchNorm(out, param_dtype=param_dtype, rngs=rngs))
            width = out
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)

    def statistics(self) -> Statistics:
        """Running statistics before the first step."""
        return tuple(
            {"mean": jnp.zeros(width), "variance": jnp.ones(width)} for width in self.cfg.widths[1:]
        )

    @typechecked
    def __call__(
        self, images: Float[Array, "n h w 3"], statistics: Statistics, *, train: bool
    ) -> tuple[Float[Array, "n y x"], Statistics]:
        """Logits and the new statistics.

        Args:
            train: normalise by the batch and blend its statistics in; else by the given ones.
        """
        x, out = jax.nn.leaky_relu(self.convs[0](images), 0.2), []
        for conv, norm, running in zip(list(self.convs)[1:-1], self.norms, statistics, strict=True):
            x, running = norm(conv(x), running, train)
            x = jax.nn.leaky_relu(x, 0.2)
            out.append(running)
        return self.convs[-1](x)[..., 0], tuple(out)

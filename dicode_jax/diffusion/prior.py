"""What a network need not say where clean latents are known roughly before it is asked.

They are taken to lie about a mean c as N(c, r^2). With a and s of the schedule noisy latents
x = a z + s e are then N(a c, a^2 r^2 + s^2), and v = a e - s z given x has the mean
s (a (1 - r^2) x - c) / (a^2 r^2 + s^2) and the standard deviation r / (a^2 r^2 + s^2)^0.5. A
network reads x and gives v, both less their mean and over their deviation. With c = 0 these are the
preconditions of Karras et al. (arXiv 2206.00364, table 1) in terms of v.
"""

import dataclasses

import jax.numpy as jnp

from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianPrior:
    """The prior and its two changes of variables, float32.

    Attributes:
        schedule: of the noise; must predict v, without dynamic rescale.
        std: standard deviation r of clean latents about their mean.

    Raises:
        ValueError: ``std`` is not positive and finite, or the schedule is another.
    """

    schedule: NoiseSchedule
    std: float

    def __post_init__(self):
        if not 0 < self.std < float("inf"):
            raise ValueError(f"std must be positive and finite, got {self.std}")
        if self.schedule.parameterization != "v" or self.schedule.base_scale is not None:
            raise ValueError(
                'a prior needs a schedule with parameterization "v" and base_scale None'
            )

    def whiten(
        self,
        x: Float[Array, "b f *rest"],
        mean: Float[Array, "b f *rest"],
        timesteps: Int[Array, " b"] | Int[Array, "b f"],
    ) -> Float[Array, "b f *rest"]:
        """Noisy latents as a network reads them: of mean 0 and variance 1."""
        a, _, variance = self._variance(timesteps, x.ndim)
        return (x - a * mean) / jnp.sqrt(variance)

    def velocity(
        self,
        out: Float[Array, "b f *rest"],
        x: Float[Array, "b f *rest"],
        mean: Float[Array, "b f *rest"],
        timesteps: Int[Array, " b"] | Int[Array, "b f"],
    ) -> Float[Array, "b f *rest"]:
        """v, of what the network gave for noisy latents ``x``."""
        a, s, variance = self._variance(timesteps, x.ndim)
        center = s * (a * (1 - self.std**2) * x - mean) / variance
        return center + self.output_std(timesteps, x.ndim) * out

    def output_std(self, timesteps: Int[Array, " b"] | Int[Array, "b f"], ndim: int) -> Array:
        """Standard deviation of v given x, by which a network's output is multiplied.

        Args:
            timesteps: in 0..num_timesteps-1.
            ndim: rank of the array that it is for.

        Returns:
            float32 ``[b, 1, ...]`` or ``[b, f, 1, ...]`` of rank ``ndim``.
        """
        return self.std / jnp.sqrt(self._variance(timesteps, ndim)[2])

    def _variance(self, timesteps: Array, ndim: int) -> tuple[Array, Array, Array]:
        """Schedule values a and s, and the variance of noisy latents about their mean."""
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        a, s = (self.schedule.gather(name, timesteps, ndim) for name in names)
        return a, s, jnp.square(a * self.std) + jnp.square(s)

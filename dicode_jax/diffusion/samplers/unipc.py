"""UniPC-2, multistep, B2, for clean estimates (Zhao et al., arXiv 2302.04867, algorithms 5 and 7).

The predictor, UniP-2, is DPM-Solver++(2M), whose letters are used here. The corrector, UniC-2,
takes no evaluation of its own: when the network sees the predicted x', its estimate x0' there
corrects the step that led to it, in front of the next,

    x' <- x' + alpha' phi ((2 w1 - 1) r (x0 - x0_last) + w2 (x0' - x0))

    phi = 1 - e^(-h),  r = h / (2 h_last),  w1 = (b1 - b2) / (1 + 1 / (2 r)),  w2 = b1 - w1
    b1 = (phi / h - 1) / -phi,  b2 = 2 ((phi / h - 1) / -h - 1 / 2) / -phi

which makes the whole of order 3. The last step is not corrected. Where there is no x0_last (the
first step, and the second where the first is from zero SNR and so without end), w1 = 0 and w2 is
1/2, as in the authors' code: exact for an estimate that moves as alpha does.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dicode_jax.diffusion.parameterization import x0_and_eps
from dicode_jax.diffusion.samplers.checks import split_grid
from dicode_jax.diffusion.samplers.dpm import DPMSolver, log_snr_steps
from dicode_jax.diffusion.schedules import NoiseSchedule, expand
from dicode_jax.typing import Array


class UniPCState(NamedTuple):
    """What UniPC remembers; all ``[b, ...]``.

    Attributes:
        x: the predicted sample.
        x0: the last clean-sample estimate, float32; zeros before the first step.
        last_x0: the one before, float32; zeros before the second.
    """

    x: Array
    x0: Array
    last_x0: Array


class UniPCCoefficients(NamedTuple):
    """Factors of one update, float64 ``[steps, ...]``.

    ``signal``, ``spread``, ``x0_scale``, ``history``, ``x``, ``x0``: as of `DPMCoefficients`;
    ``correction``, ``last_correction``: what the corrector adds of the change of the estimate over
    the step that led here, and over the one before.
    """

    signal: Array
    spread: Array
    x0_scale: Array
    history: Array
    x: Array
    x0: Array
    correction: Array
    last_correction: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC:
    """The multistep predictor and corrector of order 2; solves the probability-flow ODE.

    Attributes:
        schedule: the training schedule; decides the parameterization and the dynamic rescale.
        lower_order_final: predict the last step with order 1, for few steps.
    """

    schedule: NoiseSchedule
    lower_order_final: bool = False

    @property
    def is_stochastic(self) -> bool:
        """Never."""
        return False

    def coefficients(self, time_grid: np.ndarray) -> tuple[np.ndarray, UniPCCoefficients]:
        """Visited timesteps, int ``[steps, ...]``, and the factors of every step.

        Raises:
            ValueError: the grid leaves the schedule or ascends, or a visited step has
                alphas_cumprod 0 and the network predicts noise.
        """
        predictor = DPMSolver(schedule=self.schedule, lower_order_final=self.lower_order_final)
        times, c = predictor.coefficients(time_grid)
        h = log_snr_steps(self.schedule, *split_grid(time_grid, self.schedule))
        twice = 2 * np.asarray(c.history)
        h = np.where(twice > 0, h, 1.0)  # where the weights are others
        phi = -np.expm1(-h)
        b1, b2 = (phi / h - 1) / -phi, 2 * ((phi / h - 1) / -h - 0.5) / -phi
        w1 = (b1 - b2) * twice / (1 + twice)
        w2 = np.where(twice > 0, b1 - w1, 0.5)
        correct = np.stack([c.x0 * w2, c.x0 * (w1 - 0.5) * twice])
        # A step's corrector comes with the next evaluation.
        correct = np.concatenate([np.zeros_like(correct[:, :1]), correct[:, :-1]], axis=1)
        shared: dict[str, Any] = c._asdict()
        del shared["noise"]
        return times, UniPCCoefficients(**shared, correction=correct[0], last_correction=correct[1])

    def init(self, x: Array) -> UniPCState:
        """The starting sample; estimates that are not there yet have the weight 0."""
        none = jnp.zeros(x.shape, jnp.float32)
        return UniPCState(x, none, none)

    def step(
        self,
        state: UniPCState,
        prediction: Array,
        coefficients: UniPCCoefficients,
        noise: Array | None,
    ) -> UniPCState:
        """Corrects the step that led here, and predicts the next.

        Args:
            state: the predicted sample ``[b, ...]`` and the last two clean estimates.
            prediction: guided network output there, the shape of the sample.
            coefficients: one step's factors, each a scalar or ``[b, f]``.
            noise: not used.

        Returns:
            The next sample, and the last clean estimates without dynamic rescale, float32.
        """
        del noise
        x, prediction = state.x.astype(jnp.float32), prediction.astype(jnp.float32)
        c = UniPCCoefficients(*(expand(value, x.ndim) for value in coefficients))
        x0, _ = x0_and_eps(self.schedule.parameterization, x, prediction, c.signal, c.spread)
        x0 = x0 * c.x0_scale
        change, last_change = x0 - state.x0, state.x0 - state.last_x0
        x = x + c.correction * change + c.last_correction * last_change
        return UniPCState(c.x * x + c.x0 * (x0 + c.history * change), x0, state.x0)

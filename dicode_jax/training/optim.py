"""Optimisers and learning-rate schedules from Optax, chosen by a config."""

import dataclasses
from typing import Literal

import jax
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, or Muon beside it, with warm-up and a schedule.

    Attributes:
      optimizer: `adamw`, or `muon`: kernels of linear layers and convolutions take orthogonalised
        steps (with the size of Adam's, so that `lr` means the same), everything else Adam's with
        Nesterov's momentum.
      lr: Peak learning rate.
      warmup_steps: Steps of linear warm-up from 0.
      schedule: After the warm-up `constant`, or `cosine` down to `final_lr_ratio` at the end.
      final_lr_ratio: Last learning rate over the peak.
      b1: Decay of AdamW's first moment.
      b2: Decay of AdamW's second moment.
      weight_decay: Decoupled weight decay: under `adamw` on arrays of two or more axes, under
        `muon` on what it steps itself.
      clip_norm: Largest global norm of the gradients; 0 turns clipping off.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr_ratio: float = 0.02
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.warmup_steps < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, clip_norm and weight_decay must not be negative")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step for a run of `num_steps`."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    else:
        after = optax.cosine_decay_schedule(
            config.lr, max(num_steps - warmup, 1), alpha=config.final_lr_ratio
        )
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), after], [warmup])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon."""
    schedule = make_schedule(config, num_steps)
    if config.optimizer == "muon":
        tx = optax.contrib.muon(
            schedule,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_kernels,
        )
    else:
        tx = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
        )
    if config.clip_norm == 0:
        return tx
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)


def _kernels(params):
    """Muon's table of axes: kernels as matrices, None (Adam) for the rest.

    Linear layers are [in, out], stacked ones [layers, in, out], convolutions [h, w, in, out].
    """

    def choose(path, x):
        if x.ndim < 2 or "kernel" not in jax.tree_util.keystr(path[-2:]):
            return None
        inputs = (1,) if x.ndim == 3 else tuple(range(x.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, (x.ndim - 1,))

    return jax.tree_util.tree_map_with_path(choose, params)

"""Optimisers and learning-rate schedules from Optax, chosen by a config."""

import dataclasses
from typing import Literal

import jax
import optax

from dicode_jax.nn import lora
from dicode_jax.runtime.sharding import dotted_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimiser with clipping before it, warm-up and a schedule.

    Attributes:
      optimizer: `muon`: orthogonalised steps of kernels, the size of Adam's; `lion` wants a
        tenth of Adam's `lr`.
      lr: Peak learning rate.
      warmup_steps: Steps of linear warm-up; the first is at `lr / warmup_steps`, the last at `lr`.
      schedule: `wsd` is constant, then linear over the last `decay_steps`.
      final_lr_ratio: Last learning rate over the peak.
      decay_steps: Length of the last part of `wsd`; None takes a tenth of the run.
      b1: Decay of the first moment; the momentum of `sgd`. Not read by `adafactor`.
      b2: Decay of the second moment. Not read by `sgd` and `adafactor`.
      weight_decay: Times the learning rate, on kernels and low-rank additions alone.
      clip_norm: Largest global norm of the gradients; 0 turns clipping off.
      accumulate_steps: Parts that a batch is worked off in; divides the batch size.
    """

    optimizer: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    lr: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    final_lr_ratio: float = 0.02
    decay_steps: int | None = None
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulate_steps: int = 1

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.warmup_steps < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, clip_norm and weight_decay must not be negative")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio must be in 0..1, got {self.final_lr_ratio}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1 and b2 must be in [0, 1), got {self.b1} and {self.b2}")
        if self.decay_steps is not None and self.decay_steps < 0:
            raise ValueError(f"decay_steps must not be negative, got {self.decay_steps}")
        if self.accumulate_steps < 1:
            raise ValueError(f"accumulate_steps must be at least 1, got {self.accumulate_steps}")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step for a run of `num_steps`; from there on it stays what it is then."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    steps = max(num_steps - warmup, 1)  # after the warm-up
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, steps, alpha=config.final_lr_ratio)
    else:
        decay = num_steps // 10 if config.decay_steps is None else config.decay_steps
        decay = max(min(decay, steps), 1)
        last = config.lr * config.final_lr_ratio
        after = optax.linear_schedule(config.lr, last, decay, transition_begin=steps - decay)
    if warmup == 0:
        return after
    rise = lambda step: config.lr * (step + 1) / warmup  # noqa: E731 - no step at rate 0
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then the optimiser."""
    tx = _make_steps(config, make_schedule(config, num_steps))
    if config.clip_norm == 0:
        return tx
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)


def _make_steps(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = config.weight_decay
    if config.optimizer == "muon":
        return optax.contrib.muon(
            schedule,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_kernels,
        )
    if config.optimizer in ("adamw", "lion"):
        make = optax.adamw if config.optimizer == "adamw" else optax.lion
        return make(schedule, b1=config.b1, b2=config.b2, weight_decay=decay, mask=_decayed)
    # Optax's own `adafactor` does not multiply the decay by the learning rate, and its `sgd` has
    # none: both are put together here, so that `weight_decay` means the same everywhere.
    if config.optimizer == "adafactor":
        direction = _by_layer(
            optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        )
    else:
        direction = optax.trace(config.b1, nesterov=True)
    return optax.chain(
        direction,
        optax.add_decayed_weights(decay, mask=_decayed),
        optax.scale_by_learning_rate(schedule),
    )


# What a parameter is for says how it is stepped, never its number of axes: a stack of layers has
# one more axis than a layer. Linear kernels are [in, out], those of convolutions [h, w, in, out].
_AXES_OF_ONE_LAYER = {"bias": 1, "scale": 1, "kernel": 2, **dict.fromkeys(lora.NAMES, 2)}


def _name(path) -> str:
    """The last word of a parameter's path: `kernel`, `bias`, `scale`, `embedding` ..."""
    return dotted_path(path).rpartition(".")[2]


def _is_stacked(path, x) -> bool:
    """Whether the first axis runs over layers."""
    return x.ndim - 1 == _AXES_OF_ONE_LAYER.get(_name(path))


def _decayed(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) in ("kernel", *lora.NAMES), params
    )


def _kernels(params):
    """Muon's table of axes: kernels as matrices, None (Adam) for the rest."""

    def choose(path, x):
        if _name(path) != "kernel":
            return None
        inputs = (1,) if _is_stacked(path, x) else tuple(range(x.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, (x.ndim - 1,))

    return jax.tree_util.tree_map_with_path(choose, params)


def _by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Steps each layer of a stack by itself, for a `tx` that looks at whole arrays."""

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.shape[0] if _is_stacked(path, x) else 0, params
        )

    def of_stack(count: int) -> optax.GradientTransformation:
        def update(updates, state, params=None):
            return jax.vmap(tx.update)(updates, state, params)

        return optax.GradientTransformation(jax.vmap(tx.init, axis_size=count), update)

    def by_label(params):
        counts = set(jax.tree.leaves(label(params)))
        return optax.partition({n: of_stack(n) if n else tx for n in counts}, label)

    return optax.GradientTransformation(
        lambda params: by_label(params).init(params),
        lambda updates, state, params=None: by_label(params).update(updates, state, params),
    )

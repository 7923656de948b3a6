"""Linear probes that keep what a scene of the drawn world shows readable in its tokens."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from dicode_jax.data.sources.open import kind_of
from dicode_jax.data.sources.shapes import FRAME_LABELS
from dicode_jax.errors import UserError
from dicode_jax.typing import Array, Float, Int

CLASSES = tuple(map(len, FRAME_LABELS.values()))


def check_labels(data: Any) -> None:
    """Refuses data of which nobody knows what they show.

    Raises:
      UserError: They are not the drawn world.
    """
    if kind_of(data) != "shapes":
        raise UserError(
            "the probes know the synthetic world only: with other data give --probe-weight 0"
        )


def probe_loss(
    logits: Sequence[Float[Array, "b v"]], labels: Int[Array, "b p"]
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of all probes, and the share of right answers of each by name."""
    losses, right = [], {}
    for i, (name, row) in enumerate(zip(FRAME_LABELS, logits, strict=True)):
        target = labels[:, i]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(row, target).mean())
        right[f"probe_{name}"] = jnp.mean(jnp.argmax(row, axis=-1) == target)
    loss = jnp.stack(losses).mean()
    return loss, {"probe_loss": loss, **right}

"""Low-rank additions to linear layers (Hu et al., "LoRA", arXiv 2106.09685).

`add` puts them beside the layers of a model, under paths that leave those of the weights as they
were; `fold` adds them into the weights, which gives back a model of the original form.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from dicode_jax.nn.linear import Linear
from dicode_jax.typing import Array

NAMES = ("lora_down", "lora_up")


class LoRALinear(nnx.Module):
    """`linear(x) + (alpha / rank) * x @ lora_down @ lora_up`; the addition starts at 0.

    Attributes:
      kernel, bias: Those of the layer that it stands for.
      lora_down: `[..., in, rank]`, normal with variance 1 / in.
      lora_up: `[..., rank, out]`, zeros.
    """

    def __init__(self, linear: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        *lead, in_dim, out_dim = linear.kernel.shape
        self.kernel, self.bias = linear.kernel, linear.bias
        self.in_features, self.out_features = in_dim, out_dim
        self.dtype, self.param_dtype = linear.dtype, linear.param_dtype
        self.scale = alpha / rank
        init = nnx.initializers.normal(in_dim**-0.5)
        self.lora_down = nnx.Param(init(rngs.params(), (*lead, in_dim, rank), self.param_dtype))
        self.lora_up = nnx.Param(jnp.zeros((*lead, rank, out_dim), self.param_dtype))

    def __call__(self, x: Array) -> Array:
        """Maps [..., in] to [..., out]."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        values = [self.kernel[...], self.lora_down[...], self.lora_up[...]]
        x, kernel, down, up = promote_dtype((x, *values), dtype=self.dtype)
        y = x @ kernel + self.scale * ((x @ down) @ up)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)[None]
        return y.reshape(*shape, -1)

    def folded(self) -> Array:
        """The kernel with the addition in it."""
        return self.kernel[...] + self.scale * (self.lora_down[...] @ self.lora_up[...])


def add(
    model: nnx.Module,
    select: Callable[[tuple], bool],
    *,
    rank: int,
    alpha: float,
    rngs: nnx.Rngs,
) -> None:
    """Replaces, in place, every linear layer whose path `select` takes.

    Raises:
      ValueError: There is none.
    """
    chosen = [p for p, node in _find(model, nnx.Linear) if select(p)]
    if not chosen:
        raise ValueError("no linear layer was selected for low-rank additions")
    for path in chosen:
        _replace(model, path, lambda node: LoRALinear(node, rank, alpha, rngs=rngs))


def fold(model: nnx.Module) -> None:
    """Adds all additions into their weights, in place; a model without any stays as it is."""

    def plain(node: LoRALinear) -> Linear:
        linear = nnx.eval_shape(
            lambda: Linear(
                node.in_features,
                node.out_features,
                use_bias=node.bias is not None,
                dtype=node.dtype,
                param_dtype=node.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        linear.kernel, linear.bias = nnx.Param(node.folded()), node.bias
        return linear

    for path, _ in _find(model, LoRALinear):
        _replace(model, path, plain)


def _find(model: nnx.Module, kind: type) -> list[tuple[tuple, Any]]:
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, kind)]


def _replace(model: nnx.Module, path: tuple, make: Callable[[Any], nnx.Module]) -> None:
    *parents, name = path
    node: Any = model
    for part in parents:
        node = node[part] if isinstance(node, nnx.List) else getattr(node, part)
    if isinstance(node, nnx.List):
        node[name] = make(node[name])
    else:
        setattr(node, name, make(getattr(node, name)))

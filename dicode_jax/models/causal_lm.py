"""Bodies of language models, one interface: GPT-2 and Llama 3.

A body knows neither its head nor what its embeddings stand for. Its configuration says by its type
(and, when stored, by its `kind`) which one it is.
"""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.typing import Array

BodyConfig = GPT2Config | LlamaConfig
_BODIES: dict[type, type] = {GPT2Config: GPT2, LlamaConfig: Llama}
_HOW_TO_RUN = {"scan_layers", "remat", "dropout"}  # fields that change no weight's meaning


class LanguageModelBody(Protocol):
    """What is asked of a transformer: embeddings in, final hidden states out."""

    @property
    def embed_dim(self) -> int:
        """Width of embeddings and hidden states."""

    @property
    def max_seq_len(self) -> int:
        """Longest sequence that has positions."""

    def embed_tokens(self, ids: Array) -> Array:
        """`[b, t]` ids to `[b, t, d]` embeddings, without positions."""

    def init_cache(self, *, batch: int, size: int, dtype: Any = None) -> Any:
        """An empty cache: a pytree of static shape."""

    def __call__(
        self,
        embeds: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Any = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Array, Any]:
        """`[b, t, d]` embeddings to final hidden states and the extended cache."""


def build_body(
    cfg: BodyConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
) -> LanguageModelBody:
    """The body that a configuration describes."""
    return _BODIES[type(cfg)](cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def compare_bodies(one: BodyConfig, other: BodyConfig) -> str | None:
    """Where two bodies differ in what they compute, in words; None when weights can be exchanged.

    How they are run (`scan_layers`, `remat`, `dropout`) may differ.
    """
    if one.kind != other.kind:
        return f"{one.kind}, not {other.kind}"
    faults = [
        f"{field.name} {getattr(one, field.name)}, not {getattr(other, field.name)}"
        for field in dataclasses.fields(one)
        if field.name not in _HOW_TO_RUN and getattr(one, field.name) != getattr(other, field.name)
    ]
    return "; ".join(faults) or None

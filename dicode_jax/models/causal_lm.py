"""Bodies of language models, one interface: GPT-2 and Llama 3.

A body knows neither its head nor what its embeddings stand for. Its configuration says by its type
(and, when stored, by its `kind`) which one it is.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.models.llama import Llama, LlamaConfig
from dicode_jax.nn.causal_body import CausalBody

BodyConfig = GPT2Config | LlamaConfig
_BODIES: dict[type, type] = {GPT2Config: GPT2, LlamaConfig: Llama}
# Fields that change no weight's meaning.
_HOW_TO_RUN = {"scan_layers", "remat", "dropout", "attention_dropout"}


def build_body(
    cfg: BodyConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
) -> CausalBody:
    """The body that a configuration describes."""
    return _BODIES[type(cfg)](cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def compare_bodies(one: BodyConfig, other: BodyConfig) -> str | None:
    """Where two bodies differ in what they compute, in words; None when weights can be exchanged.

    How they are run (`scan_layers`, `remat`, dropout) may differ.
    """
    if one.kind != other.kind:
        return f"{one.kind}, not {other.kind}"
    faults = [
        f"{field.name} {getattr(one, field.name)}, not {getattr(other, field.name)}"
        for field in dataclasses.fields(one)
        if field.name not in _HOW_TO_RUN and getattr(one, field.name) != getattr(other, field.name)
    ]
    return "; ".join(faults) or None

"""What programs are traced for: the platform and its type, and a form of attention that is wanted.

Platform and form are read while a program is traced and are no part of its key in jax's caches:
change them before the first call, or by `tracing_for`, which forgets what was traced.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

ATTENTION = ("auto", "xla", "mapped", "cudnn")
"""Forms of `nn.attention`: what suits, one large product, a loop over heads, NVIDIA's kernels."""


_APART = "--xla_gpu_dot_merger_threshold_mb"


@dataclasses.dataclass
class _Wanted:
    platform: str | None = None
    attention: str = "auto"


_wanted = _Wanted()


def platform() -> str:
    """Of the three "cpu", "gpu" and "tpu": the default backend, or what `tracing_for` says."""
    return _wanted.platform or jax.default_backend()


def is_before_ampere() -> bool:
    """Whether the default device is a GPU of NVIDIA of compute capability below 8.0, such as a T4.

    Those have no bfloat16, and cuDNN has no fused attention for them, which jax does not ask.
    """
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return re.fullmatch(r"[1-7]\.\d", capability) is not None


def keep_products_apart() -> None:
    """Has XLA for NVIDIA's GPUs compute products of one operand one by one, as they are written.

    Joined ones copy their weights together in every step of a loop. XLA reads its flags once, with
    the first program of a process, so that this does nothing behind that; a user's own flag stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    has_cuda = any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))
    if has_cuda and _APART not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_APART}=0".strip()


def auto_dtype() -> Any:
    """The type that suits the default device: float32 on a CPU, bfloat16 where it is computed in.

    GPUs of NVIDIA before compute capability 8.0 have no bfloat16 and get float16.
    """
    if jax.devices()[0].platform == "cpu":
        return jnp.float32
    return jnp.float16 if is_before_ampere() else jnp.bfloat16


def attention() -> str:
    """The form that is wanted, one of `ATTENTION`."""
    return _wanted.attention


@contextlib.contextmanager
def tracing_for(*, platform: str | None = None, attention: str = "auto") -> Iterator[None]:
    """What is traced inside is for this platform and with this form of attention.

    Args:
      platform: "cpu", "gpu" or "tpu"; None for the default backend.
      attention: One of `ATTENTION`. A form that cannot do a call leaves it to "xla".

    Raises:
      ValueError: No form has that name.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    before = dataclasses.replace(_wanted)
    jax.clear_caches()
    _wanted.platform, _wanted.attention = platform, attention
    try:
        yield
    finally:
        vars(_wanted).update(vars(before))
        jax.clear_caches()

"""Compiled programs kept between processes: one place that decides where, for all that compile.

jax's own settings win: `JAX_COMPILATION_CACHE_DIR` names another folder, and
`JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dicode_jax.storage.files import cache_folder

__all__ = ["cpu", "folder", "in_use", "off", "use"]


def use() -> None:
    """Keeps compiled programs from now on, where the environment says or the user has a place.

    Small ones too, so that a second start compiles nothing. Without a place it warns once in a
    process, and work goes on.
    """
    if _setting("jax_compilation_cache_dir") or not _setting("jax_enable_compilation_cache"):
        return
    place, why = folder(), "there is no home folder"
    if place is not None:
        why = f"{place} cannot be written"
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
    if place is None or not os.access(place, os.W_OK | os.X_OK):  # jax would warn of each program
        _warn(why)
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # or what was compiled before has settled that there is none


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, compiled programs are neither read nor kept."""
    before = _setting("jax_enable_compilation_cache")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def in_use() -> str | None:
    """The folder that programs are kept in now; None where they are not kept."""
    return _setting("jax_enable_compilation_cache") and _setting("jax_compilation_cache_dir")


def folder() -> pathlib.Path | None:
    """Where this user's programs for this kind of CPU are kept; None for a user without a home.

    A home that machines share may hold programs of a CPU with other instructions.
    """
    cache = cache_folder()
    return None if cache is None else cache / "programs" / f"{platform.machine()}-{cpu()}"


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


@functools.cache
def cpu() -> str:
    """A name of what this CPU can do."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    found = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    return hashlib.sha256((found[1] if found else text).encode()).hexdigest()[:8]


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(
        f"compiled programs are not kept, {why}: every start compiles anew; "
        "JAX_COMPILATION_CACHE_DIR can name a folder",
        stacklevel=3,
    )

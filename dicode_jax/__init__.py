"""DiCoDe in JAX: text to video through compressed deep tokens (arXiv 2412.04446).

The public names load on first use, so that ``import dicode_jax`` imports neither jax nor a model.
"""

from typing import TYPE_CHECKING, Any

from dicode_jax import (
    _begun,  # noqa: F401  before any other source of the package is read
    _moved,
)

if TYPE_CHECKING:
    from dicode_jax.pipelines.dicode import DiCoDePipeline
    from dicode_jax.pipelines.load import load

    __version__: str

__all__ = ["DiCoDePipeline", "__version__", "load"]

_moved.install()

_LAZY = {"DiCoDePipeline": "dicode_jax.pipelines.dicode", "load": "dicode_jax.pipelines.load"}


def _version() -> str:
    """The installed version, or ``"0+unknown"`` when the package runs from an uninstalled tree."""
    import importlib.metadata

    try:
        return importlib.metadata.version("dicode-jax")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""`dicode doctor`: what is there of all that this package needs, and whether it works."""

import argparse
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import tempfile
from collections.abc import Callable

import dicode_jax
from dicode_jax.errors import UserError, printable

_SHOWN = ("jax", "flax", "orbax-checkpoint", "grain", "numpy", "av", "pillow", "safetensors")
# What is not there without an extra. Accelerators are told of with the devices.
_USES = {
    "convert": "reading of PyTorch's checkpoints and CLIP's vocabulary",
    "data": "`dicode data cut` and `dicode data filter`",
    "wandb": "metrics to Weights & Biases",
    "app": "page of `dicode app`",
    "bench": "benchmarks beside Hugging Face's GPT-2",
    "test": "tests",
    "docs": "`make docs` and `make notebooks`",
}
_NVIDIA = "/dev/nvidiactl"  # there with every driver of NVIDIA


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `doctor` to the parser of `dicode`."""
    sub = command(
        "doctor",
        "check what this machine has and what works",
        "The exit status is 2 when something does not. Nothing is asked of the network.",
    )
    sub.add_argument("--network", action="store_true", help="also see whether the Hub answers")


def doctor(args: argparse.Namespace) -> None:
    """Prints a line for each check.

    Raises:
      UserError: Something does not work; names what.
    """
    checks: dict[str, Callable[[], str]] = {
        "version": _version,
        "packages": _packages,
        **{f"[{extra}]": functools.partial(_extra, extra) for extra in _USES},
        "devices": _devices,
        "memory": _memory,
        "video": _video,
        "cache": _cache,
        "models": _models,
        "hub": lambda: _hub(args.network),
    }
    broken = []
    for name, check in checks.items():
        try:
            text = check()
        except Exception as error:  # whatever a broken install raises is what we are asked for
            broken.append(name)
            text = f"does not work: {error or type(error).__name__}"
        print(f"{name:<16} {printable(text, 300)}", flush=True)
    if broken:
        raise UserError(f"{', '.join(broken)}: see above")


def _version() -> str:
    system = f"{platform.system()} {platform.machine()}"
    return f"dicode {dicode_jax.__version__}, Python {platform.python_version()}, {system}"


def _packages() -> str:
    """Versions, of which none may be older than what this package was tried with."""
    old = [
        f"{name} is {has or 'absent'}, want {least} or later"
        for name, least, extra in _requirements()
        if not extra and _numbers(has := _installed(name)) < _numbers(least)
    ]
    if old:
        raise UserError("; ".join(old))
    return ", ".join(f"{name} {_installed(name) or 'absent'}" for name in _SHOWN)


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _extra(extra: str) -> str:
    """Which of an extra's packages are there, and what is missing without the others."""
    wanted = [(name, least) for name, least, of in _requirements() if of == extra]
    if not wanted:
        return f"not known to this install; is for {_USES[extra]}"
    found = {name: _installed(name) for name, _ in wanted}
    lacks = [
        f"{name} is {found[name]}, want {least}" if found[name] else name
        for name, least in wanted
        if _numbers(found[name]) < _numbers(least)
    ]
    if not lacks:
        return ", ".join(f"{name} {version}" for name, version in found.items())
    return f'without {", ".join(lacks)}: no {_USES[extra]}; pip install "dicode-jax[{extra}]"'


def _requirements() -> list[tuple[str, str, str]]:
    """Name, least version and extra (empty for the core) of what an install wants."""
    try:
        lines = importlib.metadata.requires("dicode-jax") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = []
    form = r"""([\w.-]+)(?:\[[\w,-]+\])?[>~=]=([\d.]+)(?:\s*;\s*extra == ["'](\w+)["'])?"""
    found = [match for line in lines if (match := re.fullmatch(form, line))]
    return [(match[1], match[2], match[3] or "") for match in found]


def _devices() -> str:
    """Devices, once one of them has computed something."""
    import jax
    import jax.numpy as jnp

    devices = jax.devices()
    if float(jnp.sum(jnp.ones((8, 8)) @ jnp.ones((8, 8)))) != 512:
        raise UserError(f"{devices[0]} does not compute as it should")
    unused = ""
    if devices[0].platform == "cpu" and os.path.exists(_NVIDIA):
        unused = '; a GPU of NVIDIA is not used: pip install "dicode-jax[cuda]"'
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){unused}"


def _memory() -> str:
    import jax

    from dicode_jax.training.memory import available

    found = available(jax.devices()[0])
    return "not known" if found is None else f"{found[0] / 1e9:.1f} of {found[1] / 1e9:.1f} GB free"


def _video() -> str:
    """Writes and reads a video of each kind."""
    import numpy as np

    from dicode_jax.media import video
    from dicode_jax.media.writer import VIDEO_SUFFIXES

    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in VIDEO_SUFFIXES:
            path = pathlib.Path(folder, f"trial{suffix}")
            video.write_video(path, frames)
            if len(video.read_video(path).frames) != len(frames):
                raise UserError(f"a {suffix} of two frames does not hold two")
    return f"{', '.join(VIDEO_SUFFIXES)} are written and read"


def _cache() -> str:
    from dicode_jax.runtime import compile_cache

    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return f"{given}, by JAX_COMPILATION_CACHE_DIR{_size(given)}"
    folder = compile_cache.folder()
    if folder is None:
        return "none, as there is no home folder: programs are compiled afresh by every command"
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not os.access(there, os.W_OK):
        return f"none, as {there} cannot be written"
    return f"{folder}{_size(folder)}"


def _size(folder: str | os.PathLike) -> str:
    """How much is in a folder, as an end of a sentence."""
    try:
        sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()]
    except OSError:  # it is not there yet, or another process tidies up
        return "; empty"
    return f"; {len(sizes):,} files, {sum(sizes) / 1e9:.2f} GB"


def _models() -> str:
    from dicode_jax.storage import packaged

    counts = {name: packaged.check(name) for name in (*packaged.models(), *packaged.parts())}
    return ", ".join(f"{name} ({count} files as packaged)" for name, count in counts.items())


def _hub(ask: bool) -> str:
    """Where downloads are kept, and whether the Hub may be asked and answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    kept = f"downloads in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"{kept}; offline, by HF_HUB_OFFLINE"
    if not ask:
        return f"{kept}; not asked (--network does)"
    answer = get_session().head(constants.ENDPOINT, timeout=10)
    if answer.status_code >= 500:
        raise UserError(f"{constants.ENDPOINT} answers with {answer.status_code}")
    return f"{kept}; {constants.ENDPOINT} answers"

"""`dicode doctor`: what is there of all that this package needs, and whether it works."""

import argparse
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
_EXTRAS = {"convert": ("torch", "open_clip_torch", "pyyaml"), "wandb": ("wandb",)}
_USES = {"convert": "reads checkpoints of PyTorch", "wandb": "sends metrics to Weights & Biases"}
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
        "extras": _extras,
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
    old = []
    try:
        wanted = importlib.metadata.requires("dicode-jax") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        wanted = []
    for line in wanted:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", line)
        if match and _numbers(has := _installed(match[1])) < _numbers(match[2]):
            old.append(f"{match[1]} is {has or 'absent'}, want {match[2]} or later")
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


def _extras() -> str:
    """Which extras are installed, by the packages that they bring."""
    parts = []
    for extra, names in _EXTRAS.items():
        found = [f"{name} {version}" for name in names if (version := _installed(name))]
        missing = f'not installed; pip install "dicode-jax[{extra}]" {_USES[extra]}'
        parts.append(f"{extra}: {', '.join(found) or missing}")
    return "; ".join(parts)


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
        return f"{given}, by JAX_COMPILATION_CACHE_DIR"
    folder = compile_cache.folder()
    if folder is None:
        return "none, as there is no home folder: programs are compiled afresh by every command"
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    return f"{folder}" if os.access(there, os.W_OK) else f"none, as {there} cannot be written"


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

"""The models that the page offers, and what each may be asked for. No weights are read for it."""

import dataclasses
import inspect
import os
import pathlib

from dicode_jax import config as config_lib
from dicode_jax.errors import UserError, printable
from dicode_jax.kinds import CONFIG_FILE
from dicode_jax.pipelines import load, options
from dicode_jax.storage import hub, packaged
from dicode_jax.storage.files import read_small

__all__ = ["Model", "describe", "installed"]

PROMPTS_FILE = "prompts.txt"  # of a model folder: what it knows how to paint, one on each line
_SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One of the picker.

    Attributes:
      name: What the picker calls it.
      folder: Where it lies.
      takes: What its calls may ask for besides prompt and seed, see `pipelines.calls.COMMON`.
      has_presets: Whether `pipelines.options.QUALITIES` mean something to its sampling.
      is_batched: Whether a call can say how many clips are painted at once.
      num_frames: Of a clip, or of a video where it has no clips.
      fps: Frames per second.
      examples: Prompts to begin with.
    """

    name: str
    folder: pathlib.Path
    takes: frozenset[str]
    has_presets: bool
    is_batched: bool
    num_frames: int
    fps: float
    examples: tuple[str, ...]

    @property
    def has_clips(self) -> bool:
        return "num_clips" in self.takes

    @property
    def has_frames(self) -> bool:
        """Whether its length is a number of frames."""
        return "num_frames" in self.takes and not self.has_clips


def installed(*named: str) -> dict[str, Model]:
    """The models that are asked for, and behind them those of the package; the first is shown.

    Args:
      named: Folders, packaged names or names on the Hub.

    Raises:
      UserError: One of those asked for is no model, or none that paints prompts.
    """
    found: dict[str, Model] = {}
    folders = set()
    for asked in named:
        folder = hub.find_model(asked)
        # The page is also for others: of a path it shows the last part alone.
        name = printable(folder.name if os.path.isdir(asked) else asked, 60)
        while name in found:
            name = f"{name} (2)"
        found[name] = describe(name, folder)
        folders.add(folder.resolve())
    ours = packaged.models()
    for name in sorted(ours, key=lambda name: (name != hub.DEFAULT_MODEL, name)):
        if ours[name].resolve() not in folders and name not in found:
            found[name] = describe(name, ours[name])
    return found


def describe(name: str, folder: pathlib.Path) -> Model:
    """What a model folder says of itself.

    Raises:
      UserError: It is no model, or none that paints prompts.
    """
    kind = load.pipeline_class(load.pipeline_kind(folder))
    config = config_lib.from_json(kind.config_type, folder / CONFIG_FILE)
    if not kind.takes:
        raise UserError(f"{name} paints no prompts, so the app has no use for it")
    parameters = inspect.signature(getattr(kind, "stream", kind)).parameters
    preset_fields = {field for preset in options.QUALITIES.values() for field in preset}
    return Model(
        name=name,
        folder=folder,
        takes=kind.takes,
        has_presets=preset_fields <= vars(config.sampling).keys(),
        is_batched="clips_per_batch" in parameters,
        num_frames=getattr(config.sampling, "num_frames", 0),
        fps=float(config.fps),
        examples=_examples(folder, config),
    )


def _examples(folder: pathlib.Path, config: object) -> tuple[str, ...]:
    """Classes of a model that has them, else the lines of its own list of prompts."""
    lines = getattr(config, "class_names", ())
    if not lines and (folder / PROMPTS_FILE).is_file():
        lines = read_small(folder / PROMPTS_FILE).decode("utf-8", "replace").splitlines()
    return tuple(printable(line, 200) for line in lines if line.strip())[:_SHOWN]

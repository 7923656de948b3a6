"""What all pipelines share: parts and a config, in memory and as a folder.

A folder holds `config.json` with the sampling defaults, one sub-folder a part (safetensors and a
config), and `text` where there is a text tokenizer. A pipeline says what its parts are and adds
what they do together.
"""

import functools
import importlib.metadata
import inspect
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dicode_jax import config as config_lib
from dicode_jax.diffusion.guided import make_grid
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.diffusion.watching import Watch
from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines import calls, checks, painting
from dicode_jax.pipelines import progress as progress_lib
from dicode_jax.pipelines.load import check_kind
from dicode_jax.runtime import compile_cache, sharding
from dicode_jax.runtime.platform import auto_dtype, keep_products_apart
from dicode_jax.storage import hub, model_card, weights
from dicode_jax.storage.folders import new_folder
from dicode_jax.typing import PyTree

TEXT_FOLDER = "text"


class Pipeline:
    """Named modules, a text tokenizer and a config; abstract.

    Attributes:
      kind: What `config.json` calls it.
      part_types: Part -> classes of the module and of its config.
      optional: Parts that a pipeline may lack.
      config_type: Class of its config, which holds `sampling`.
      takes: What a call may ask for besides prompt and seed, of `calls.COMMON`.
      overflows: Whether float16 lacks the range for it.
      name: What it was loaded as; None for one that was made in memory.
      devices: Clips and prompts are split over these, each with all weights; None for local ones.
    """

    kind: ClassVar[str]
    part_types: ClassVar[Mapping[str, tuple[type, type]]]
    optional: ClassVar[frozenset[str]] = frozenset()
    config_type: ClassVar[type]
    takes: ClassVar[frozenset[str]] = frozenset()
    overflows: ClassVar[bool] = False
    name: str | None = None
    devices: Sequence[Any] | None = None

    def __init__(
        self,
        parts: Mapping[str, Any],
        *,
        config: Any,
        text: Any = None,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.parts, self.config, self.text = dict(parts), config, text
        self.metadata = dict(metadata or {})
        there = {name: x for name, x in self.parts.items() if x is not None}
        self.check_fit(config, {name: x.cfg for name, x in there.items()})
        self._split = {name: nnx.split(x) for name, x in there.items()}
        self._copies: dict[tuple[str, Mesh], PyTree] = {}

    def __call__(
        self,
        prompt: Any = None,
        *,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        num_clips: int = 1,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "np",
        callback_on_step_end: calls.OnStep | None = None,
        callback_on_clip_end: calls.OnClip | None = None,
        progress: Any = True,
        **options: Any,
    ) -> Any:
        """Paints a video for each prompt. All families are called so, and say what they cannot do.

        Args:
          prompt: What to show, or a list; what a prompt is, the family says.
          image: The first frame: a picture of Pillow, a path, or uint8 `[h, w, 3]` of any size; or
            one for each prompt.
          last_image: The last frame, of a video between two images; likewise.
          video: What to go on from: a `Video`, a path, which is read at the pipeline's rate, or
            uint8 `[f, h, w, 3]`. Its frames come first in the result, in the pipeline's size.
          num_clips: Clips of each video that are painted; neighbours share a keyframe.
          num_frames: Frames of a clip; None for the model's own.
          num_videos_per_prompt: Videos of each prompt, which differ in their seeds.
          seed: Of all randomness, 0 to 2**32 - 1. Video i of the call, counted prompt by prompt,
            has `seed + i`, and is what it is alone with that seed, within one grey level, as sums
            run in another order in another batch. Or a seed for each video.
          negative_prompt: What guidance moves away from.
          num_inference_steps, guidance_scale: None for the model's own.
          temperature: Below 1 what is drawn keeps closer to what is likely.
          height, width: Of the frames; models paint their own size alone.
          output_type: "np" for `Videos`; "pil" for lists of pictures; "latent" and "tokens" for
            arrays of what the frames, or the keyframes, are painted from.
          callback_on_step_end: Called after each sampling step as `(pipe, step, timestep,
            {"latents": latents})`, steps counting from 0; of clips that are painted together, once
            for all of them. Latents are noisy ones, float32 `[b, f, y, x, c]`. It may return
            `{"latents": others}` of their shape, with which the next step goes on; what a sampler
            remembers of earlier steps stays. What it raises ends the call.
          callback_on_clip_end: Called after each clip as `(pipe, done, total, clip)`; what it
            raises ends the call.
          progress: A bar of steps on a terminal and in a notebook; False for none, or a function
            that is called as `(what, done, total)` of "steps", "clips" and "keyframes". Where
            nobody looks or is called back, a clip's steps are taken at once, to the same bits.
          options: More of the family: see its `stream`, and `options.SamplingOptions`.

        Returns:
          `Videos`, a sequence of `Video` that is also an array uint8 `[b, f, h, w, 3]`; one of a
          single video can be saved and shown as that video.

        Raises:
          UserError: An argument is impossible, or nothing that this family does.
        """
        with progress_lib.shown(progress) as tell:
            call = calls.read(
                self,
                prompt,
                image=image,
                last_image=last_image,
                video=video,
                num_clips=num_clips,
                num_videos_per_prompt=num_videos_per_prompt,
                seed=seed,
                height=height,
                width=width,
                output_type=output_type,
                on_clip=callback_on_clip_end,
                on_step=callback_on_step_end,
                tell=tell,
                num_frames=num_frames,
                negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                temperature=temperature,
                **options,
            )
            return calls.result(self, call, self._answer(call), self.record())

    def _answer(self, call: calls.Call) -> calls.Answer:
        """What the family makes of a call: what its `stream` gives, gathered.

        Raises:
          UserError: An option is not of the stream, or images differ, of which it takes one.
        """
        stream = cast(Any, self).stream
        given = dict(call.options)
        if "num_clips" in self.takes:
            given["num_clips"] = call.num_clips
        known = inspect.signature(stream).parameters
        given |= {name: x for name, x in call.listeners.items() if name in known}
        is_open = any(one.kind is one.VAR_KEYWORD for one in known.values())
        if not is_open and (unknown := sorted(given.keys() - known.keys())):
            raise UserError(f"there is no option {unknown[0]}; there are {', '.join(known)}")
        image = None if call.images is None else call.images[0]
        if any(other is not image for other in call.images or []):
            raise UserError("this model goes on from one image for all prompts; give one")
        clips = stream(call.prompts, image=image, video=call.video, seed=call.seeds, **given)
        count = given.get("num_frames") or given.get("num_clips", 0)
        return calls.Answer(frames=call.gather(clips, count * len(call.seeds)))

    def record(self, **told: Any) -> dict[str, Any]:
        """What a file says of a video of this pipeline, see `media.record`, and what is told."""
        return {
            "dicode_jax": _version(),
            "jax": jax.__version__,
            "kind": self.kind,
            "model": self.name,
            "device": jax.devices()[0].platform,
            "dtype": ", ".join(
                sorted({name for part in self._sizes().values() for name in part[1]})
            ),
        } | told

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of its videos."""
        size = self.config.frame_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _sizes(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Parameters of each part, and their types."""
        found = {}
        for name, (_, state) in self._split.items():
            leaves = jax.tree.leaves(state)
            types = tuple(sorted({leaf.dtype.name for leaf in leaves}))
            found[name] = sum(leaf.size for leaf in leaves), types
        return found

    def __repr__(self) -> str:
        """Its parts and their sizes, a line each."""
        height, width = self.frame_size
        head = f"{type(self).__name__}{'' if self.name is None else f' {printable(self.name, 80)}'}"
        lines = [f"{head}: {width} x {height} pixels at {self.config.fps:g} frames a second"]
        for name, (count, types) in self._sizes().items():
            lines.append(f"  {name:<16} {count:>13,} parameters, {', '.join(types)}")
        return "\n".join(lines)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike | None = None,
        revision: str | None = None,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **how: Any,
    ) -> Self:
        """Loads a pipeline folder, a model that lies in the package, or one of the Hub.

        Programs that are compiled from now on are kept, see `runtime.compile_cache`.

        Args:
          path_or_name: A folder, the name of a packaged model, or `owner/name` on the Hugging Face
            Hub, which is downloaded once; None for the packaged default.
          revision: Branch, tag or commit on the Hub.
          dtype: Computing type; None for that of the parameters and inputs, "auto" for
            `auto_dtype()` in weights and computing, or float32 where a model overflows in float16.
          param_dtype: Type of the weights in memory.
          cache_dir: Where downloads are kept; None for the Hub's usual cache.
          local_files_only: Do not reach for the Hub; `HF_HUB_OFFLINE=1` does the same for all.
          token: Access token of the Hub; None for the one that `hf auth login` stored.
          how: What a kind of pipeline takes besides.

        Raises:
          UserError: There is no such model, it is of another kind, or its files are broken or do
            not fit together.
        """
        compile_cache.use()
        keep_products_apart()
        folder = hub.find_model(
            path_or_name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        if isinstance(dtype, str) and dtype == "auto":
            dtype = auto_dtype()
            if cls.overflows and dtype == jnp.float16:
                dtype = jnp.float32
            param_dtype = dtype
        config = cls._read_config(folder)
        parts, known = cls._load_parts(folder, dtype=dtype, param_dtype=param_dtype, **how)
        text = cls._read_text(folder, {name: part.cfg for name, part in parts.items()})
        metadata = {name: weights.read_metadata(folder / name) for name in parts}
        pipe = cls._assemble(parts, config=config, text=text, metadata=metadata, **known)
        pipe.name = hub.called(path_or_name, revision, folder)
        return pipe

    @classmethod
    def _load_parts(
        cls, folder: pathlib.Path, *, dtype: Any, param_dtype: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The modules of a folder, and what else the pipeline is told; takes `how` as well."""
        types = {"dtype": dtype, "param_dtype": param_dtype}
        return {name: cls._load_part(folder, name, **types) for name in cls._stored(folder)}, {}

    @classmethod
    def _load_part(cls, folder: pathlib.Path, name: str, **options: Any) -> nnx.Module:
        """One of the modules; options are those of `weights.load_module`."""
        options["skip"] = cls._skipped(folder, name)
        module, _ = weights.load_module(folder / name, *cls._types(folder, name), **options)
        checks.check_weights(name, module)
        return module

    @classmethod
    def _types(cls, folder: pathlib.Path, name: str) -> tuple[Any, type]:
        """Classes of a part's module and config; a part may have those that its config says."""
        return cls.part_types[name]

    @classmethod
    def _skipped(cls, folder: pathlib.Path, name: str) -> tuple[str, ...]:
        """Beginnings of the names of stored arrays for which a pipeline has no use."""
        return ()

    @classmethod
    def check_folder(cls, folder: str | os.PathLike) -> Any:
        """The config of a folder that `from_pretrained` would load; no weights are read.

        Raises:
          UserError: A part or the vocabulary is missing, or weights do not fit their config.
        """
        folder = pathlib.Path(folder)
        config, configs = cls._read_config(folder), {}
        for name in cls._stored(folder):
            configs[name] = weights.check_module(
                folder / name, *cls._types(folder, name), skip=cls._skipped(folder, name)
            )
        cls.check_fit(config, configs)
        cls._read_text(folder, configs)
        return config

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: Any = None) -> None:
        """Writes the pipeline as a folder, with a model card if it has none.

        Args:
          folder: Made if need be; a model that was written here is replaced, but for its card.
          dtype: Storage type of the weights; as they are by default.

        Raises:
          UserError: The folder holds anything but a model that was written here.
        """
        with new_folder(folder, overwrite=True, keep=[model_card.CARD_FILE]) as fresh:
            self._write(fresh, dtype)
            model_card.write(fresh, name=pathlib.Path(folder).resolve().name)

    def push_to_hub(
        self,
        name: str,
        *,
        dtype: Any = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Saves the pipeline to the Hugging Face Hub, with a model card; returns its address.

        Args:
          name: `owner/name`; the repository is made if need be.
          dtype: Storage type of the weights; as they are by default.
          private: Whether a new repository is private; None for the owner's default.
          revision: Branch to commit to; None for the main one.
          token: Access token; None for the one that `hf auth login` stored.
          commit_message: What the commit says.

        Raises:
          UserError: The name is not of that form, or the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write(pathlib.Path(folder), dtype)
            model_card.write(folder, name=name)
            return hub.upload(
                folder,
                name,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
            )

    def _write(self, folder: pathlib.Path, dtype: Any) -> None:
        for name, module in self.parts.items():
            if module is not None:
                metadata = self.metadata.get(name)
                weights.save_module(
                    folder / name, module, module.cfg, dtype=dtype, metadata=metadata
                )
        self._write_text(folder)
        config_lib.to_json(self.config, folder / weights.CONFIG_FILE)

    def _write_text(self, folder: pathlib.Path) -> None:
        if self.text is not None:
            self.text.save(folder / TEXT_FOLDER)

    @classmethod
    def _read_config(cls, folder: pathlib.Path) -> Any:
        check_kind(folder, cls.kind)
        return config_lib.from_json(cls.config_type, folder / weights.CONFIG_FILE)

    @classmethod
    def _stored(cls, folder: pathlib.Path) -> list[str]:
        """Parts that a folder has or must have."""
        return [n for n in cls.part_types if n not in cls.optional or (folder / n).is_dir()]

    @classmethod
    def check_fit(cls, config: Any, configs: Mapping[str, Any]) -> None:
        """Raises UserError when parts of these configs do not work together as `config` says."""

    @classmethod
    def _read_text(cls, folder: pathlib.Path, configs: Mapping[str, Any]) -> Any:
        """The text tokenizer of parts of these configs."""
        return None

    @classmethod
    def _assemble(cls, parts: Mapping[str, Any], **known: Any) -> Self:
        return cls(parts, **known)

    @property
    def _schedule(self) -> NoiseSchedule:
        return self.config.schedule

    def _sampling(self, **changes: Any) -> Any:
        """The sampling defaults with the options that are not None in place of their own."""
        return checks.sampling_of(self.config.sampling, self._schedule, **changes)

    def _mesh(self, count: int) -> Mesh | None:
        """Where `count` rows that know nothing of each other are computed; None for one device."""
        return sharding.row_mesh(self.devices) if count > 1 else None

    def _of(self, *names: str, mesh: Mesh | None = None) -> tuple[tuple, tuple]:
        """Graphs and states of some parts, the states on all devices of a mesh."""
        graphs, states = zip(*(self._split[name] for name in names), strict=True)
        if mesh is None:
            return graphs, states
        for name, state in zip(names, states, strict=True):
            if (name, mesh) not in self._copies:
                self._copies[name, mesh] = jax.device_put(state, sharding.replicated(mesh))
        return graphs, tuple(self._copies[name, mesh] for name in names)

    def _watch(self, progress: Any, callback_on_step_end: calls.OnStep | None) -> Watch:
        """Who listens to the steps of a call."""
        callback = callback_on_step_end
        told = None if callback is None else functools.partial(callback, self)
        return Watch(progress_lib.heard(progress), told)

    def _paint(
        self,
        programs: painting.Programs,
        parts: Sequence[str],
        rows: Iterable[PyTree],
        count: int,
        sampling: Any,
        shared: tuple = (),
        *,
        watch: Watch,
        clips: int = 1,
        clips_per_batch: int | None,
        blame: str,
        **static: Any,
    ) -> Iterator[np.ndarray]:
        """What programs make of each row, whose other result is whether it is good.

        Args:
          programs: Take modules, rows, sampling and what is shared.
          parts: Modules that they take.
          rows: One for each clip.
          count: How many there are.
          sampling: Settings.
          shared: What they begin with besides.
          watch: Who listens.
          clips: Of each sample, which come one after the other.
          clips_per_batch: On each device; None for what fits.
          blame: Parts that an error names.
          static: Settings that are compiled in.

        Raises:
          UserError: A clip is not finite.
        """
        rows, rest = iter(rows), {"shared": (sampling, *shared), "static": tuple(static.items())}
        first = next(rows)
        modules, mesh, size = self._batches(programs, parts, first, count, clips_per_batch, **rest)
        rows = itertools.chain([first], rows)
        place = None if mesh is None else NamedSharding(mesh, sharding.ROWS)
        timesteps = make_grid(self._schedule, sampling)[:-1]
        watch.expect(count * len(timesteps))

        def run(batch, clips):
            options = {"static": rest["static"], "mesh": mesh}
            return programs.run(modules, batch, rest["shared"], timesteps, watch, clips, **options)

        painted = painting.paint(run, rows, size, place, watch, watch.ahead(len(timesteps)))
        for i, (pixels, is_finite) in enumerate(painted):
            checks.check_painted(is_finite, i // clips, blame, sampling)
            yield pixels

    def _batches(
        self,
        run: Any,
        parts: Sequence[str],
        row: PyTree,
        count: int,
        clips_per_batch: int | None,
        **rest: Any,
    ) -> tuple[tuple[tuple, tuple], Mesh | None, int]:
        """The modules of a program, where they lie, and the rows of a micro-batch on all devices.

        Args:
          run, parts, clips_per_batch: As for `_paint`.
          row: One of the rows.
          count: How many there are.
          rest: What the program takes besides.
        """
        mesh = self._mesh(count)
        if clips_per_batch is None:
            device = jax.local_devices()[0] if self.devices is None else self.devices[0]
            clips_per_batch = painting.clips_that_fit(run, row, self._of(*parts), device, **rest)
        num_devices = 1 if mesh is None else mesh.size
        size = min(clips_per_batch, -(-count // num_devices)) * num_devices
        return self._of(*parts, mesh=mesh), mesh, size


def _version() -> str:
    try:
        return importlib.metadata.version("dicode-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

"""AR-Diffusion (arXiv 2503.07418): videos whose frames are done one after the other.

    pipe = ARDiffusionPipeline.from_pretrained("models/ucf101")
    video = pipe("Archery", num_frames=32, lag=5, seed=0)
    for frame in pipe.stream("Archery", num_frames=128, lag=5):
        ...  # each is there as soon as it has taken its last step

A model without classes is called without a prompt.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dicode_jax.diffusion.asynchronous import row_tables, run_rows
from dicode_jax.diffusion.frame_schedule import FrameSchedule, frame_schedule
from dicode_jax.diffusion.guided import guided_frames
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import per_sample_normal
from dicode_jax.diffusion.time_grid import ddim_timesteps
from dicode_jax.diffusion.watching import Taken, Watch
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import UserError
from dicode_jax.media.given import read_frames
from dicode_jax.media.resize import resize_square
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines import base, calls, checks, options, painting
from dicode_jax.pipelines.painting import Clip
from dicode_jax.pipelines.progress import Progress
from dicode_jax.runtime.sharding import ROWS
from dicode_jax.typing import Array, Float, UInt8

PARTS: dict[str, tuple[type, type]] = {
    "denoiser": (Denoiser, DenoiserConfig),
    "vae": (FrameVAE, FrameVAEConfig),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSamplingConfig:
    """How frames are sampled; the defaults are those of the release's command.

    Attributes:
      num_frames: Of a video.
      num_inference_steps: Of each frame.
      guidance_scale: Strength of classifier-free guidance; with 1 only the conditional branch runs.
      guidance_interval: Shares of a frame's steps, from the noisiest, where guidance begins and
        ends; ours (arXiv 2404.07724), the release guides all of them.
      lag: Rows, of one call each, between the starts of neighbouring frames.
      history_noise: Timestep of the noise under which frames that are done are seen; 0 for none.
    """

    num_frames: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    lag: int = 5
    history_noise: int = 0

    def __post_init__(self):
        rest = {name: value for name, value in vars(self).items() if name != "num_frames"}
        options.check(**rest)
        options.named("num_frames", options.Whole(1, options.MAX_STREAM), self.num_frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARDiffusionConfig:
    """What a pipeline knows besides its parts.

    Attributes:
      fps: Frames per second of the videos it makes.
      class_names: Names of the classes, in order; empty where they have none.
      sampling: Sampling defaults.
      prompt_windows: Windows of a video that read its prompt: "all", or the "first" where a prompt
        says how a video begins; those behind the first frame then follow the frames before them
        alone, without guidance.
    """

    fps: float = 25.0
    class_names: tuple[str, ...] = ()
    sampling: FrameSamplingConfig = FrameSamplingConfig()
    prompt_windows: Literal["all", "first"] = "all"

    def __post_init__(self):
        options.check(fps=self.fps)
        if self.prompt_windows not in ("all", "first"):
            raise ValueError(f"prompt_windows must be all or first, got {self.prompt_windows!r}")


class ARDiffusionPipeline(base.Pipeline):
    """Holds the denoiser and the VAE, which makes latents of single frames.

    Args:
      parts: A module for each name in `PARTS`.
      config: Names and sampling defaults.
      metadata: Where the weights of each part come from (see `weights.read_metadata`).
    """

    kind = "ar_diffusion"
    part_types = PARTS
    config_type = ARDiffusionConfig
    takes = calls.COMMON - {
        "last_image", "num_clips", "negative_prompt", "temperature", "latent", "tokens",
    }  # fmt: skip

    @classmethod
    def check_fit(cls, config: ARDiffusionConfig, configs: Mapping[str, Any]) -> None:
        denoiser, vae = configs["denoiser"], configs["vae"]
        ours, theirs = (
            (denoiser.dit.num_tokens, denoiser.dit.channels),
            (vae.num_tokens, vae.token_dim),
        )
        if ours != theirs:
            raise UserError(
                f"the denoiser makes {ours[0]} tokens of {ours[1]} numbers for a frame, the VAE "
                f"reads {theirs[0]} of {theirs[1]}"
            )
        if config.class_names and len(config.class_names) != denoiser.num_classes:
            raise UserError(
                f"class_names has {len(config.class_names)} names for "
                f"{denoiser.num_classes} classes"
            )

    def _answer(self, call: calls.Call) -> calls.Answer:
        """As many new frames as a video has follow one that is given, unless told otherwise."""
        behind = 0 if call.video is None else len(call.video)
        count = call.options.get("num_frames", self.config.sampling.num_frames + behind)
        return super()._answer(
            dataclasses.replace(call, options={**call.options, "num_frames": count})
        )

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of its videos."""
        return (self.parts["vae"].cfg.image_size,) * 2

    def stream(
        self,
        prompt: Any = None,
        *,
        num_frames: int | None = None,
        lag: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        video: UInt8[np.ndarray, "f h w 3"] | None = None,
        history_noise: int | None = None,
        seed: int | Sequence[int] = 0,
        clips_per_batch: int | str = "auto",
        progress: Progress | None = None,
        callback_on_step_end: calls.OnStep | None = None,
    ) -> Iterator[Clip]:
        """The frames of the videos, each as soon as it is done.

        Frame f is done after `num_inference_steps + f * lag` calls of the network. Videos that are
        painted together come side by side, frame by frame; memory on host and devices does not grow
        with their length. Video i of a call with `seed=s` is what it is alone with `seed=s + i`, to
        one grey level, as sums run in another order in another batch.

        Args:
          prompt: A class by its name or number, or a list of them; None or "" where the model has
            no classes, or a list of these for several videos.
          num_frames: Of a video, given ones among them, up to a million.
          lag: Calls between the starts of neighbouring frames: 0 makes all at once, as many as
            there are steps one after the other. A video longer than the window of the model needs
            `window * lag` to reach the steps.
          num_inference_steps, guidance_scale: None for the model's default.
          guidance_interval: Shares of a frame's steps, from the noisiest, where guidance begins and
            ends; None for the model's default.
          image: The first frame; its middle square is taken.
          video: The first frames, instead of an image. Given frames come back as they were, in
            the model's size.
          history_noise: Timestep of the noise under which the network sees frames that are done,
            given ones among them, which keeps long videos from clinging to their faults; 0 for
            none.
          seed: Of all randomness, 0 to 2**32 - 1; or a seed for each video.
          clips_per_batch: Videos that each device paints at once; "auto" for as many as are fast
            and fit in the memory that is free.
          progress: Called as `("steps", done, total)`. A step is a call of the network, in which
            each frame of the window takes one of its own.
          callback_on_step_end: As for the pipeline; the timestep is an array, of each frame that is
            held, and so are the latents, `[b, f, n, c]`.

        Raises:
          UserError: No such class, or an option is impossible.
        """
        classes = self._read_classes(prompt)
        seeds = options.check_seeds(seed, len(classes))
        at_once = painting.check_clips(clips_per_batch)
        sampling = self._sampling(
            num_frames=num_frames,
            lag=lag,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            history_noise=history_noise,
        )
        given = self._read_given(image, video)
        frames = frame_schedule(
            sampling.num_frames,
            len(self._sampler(sampling).timesteps),
            sampling.lag,
            window=self.parts["denoiser"].cfg.dit.num_frames,
            num_given=len(given),
        ).check()
        watch = self._watch(progress, callback_on_step_end)
        return self._videos(classes, seeds, sampling, frames, given, at_once, watch)

    def reconstruct(self, video: Any) -> UInt8[np.ndarray, "f s s 3"]:
        """Every frame through the VAE and back, which is what its latents hold of a video.

        Args:
          video: uint8 `[f, h, w, 3]`, a `Video`, or the path of a file, which is read at `fps`.

        Raises:
          UserError: It is no video.
        """
        vae = self._of("vae")
        (graph,), (state,) = vae
        of_vae, frames = self.parts["vae"].cfg, []
        room = self.parts["denoiser"].cfg.dit.num_frames if of_vae.temporal else 0
        past = np.zeros((1, room, of_vae.num_tokens, of_vae.token_dim), np.float32)
        given = read_frames(video, fps=self.config.fps)
        for number, frame in enumerate(map(self.fit_frame, given)):
            rows = {"x": _encode(graph, state, frame[None])[None], "past": past}
            pixels, _, past = _decode(*vae, rows, (np.int32(0), np.int32(min(number, room))))
            frames.append(np.asarray(pixels)[0, 0])
        return np.stack(frames)

    @property
    def _schedule(self):
        return self.parts["denoiser"].cfg.schedule

    def _sampler(self, sampling: FrameSamplingConfig) -> AsynchronousDDIM:
        steps = ddim_timesteps(
            "uniform", sampling.num_inference_steps, self._schedule.num_timesteps
        )
        return AsynchronousDDIM(schedule=self._schedule, timesteps=tuple(map(int, steps)))

    def _sampling(self, *, num_frames: Any = None, **changes: Any) -> FrameSamplingConfig:
        changes = options.check(**changes)
        if num_frames is not None:
            changes["num_frames"] = num_frames
        try:
            sampling = dataclasses.replace(self.config.sampling, **changes)
            ddim_timesteps("uniform", sampling.num_inference_steps, self._schedule.num_timesteps)
        except ValueError as error:
            raise UserError(str(error)) from error
        if "guidance_interval" in changes and sampling.guidance_scale == 1:
            raise UserError(checks.UNGUIDED)
        if sampling.history_noise >= self._schedule.num_timesteps:
            raise UserError(
                f"history_noise must be below the {self._schedule.num_timesteps} timesteps, got "
                f"{sampling.history_noise}"
            )
        return sampling

    def _read_classes(self, prompt: Any) -> list[int]:
        """Numbers of classes, 0 where there are none."""
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not prompts:
            raise UserError("the list of prompts is empty; give one at least")
        return [self._read_class(one) for one in prompts]

    def _read_class(self, prompt: Any) -> int:
        count, names = self.parts["denoiser"].cfg.num_classes, self.config.class_names
        if not count:
            if prompt not in (None, ""):
                raise UserError(
                    f"this model has no classes and takes no prompt, got {options.shown(prompt)}"
                )
            return 0
        if isinstance(prompt, str):
            folded = [name.casefold() for name in names]
            if (name := prompt.strip().casefold()) in folded:
                return folded.index(name)
            prompt = int(name) if name.isdecimal() and len(name) < 10 else prompt
        try:
            return options.Whole(0, count - 1)(prompt)
        except ValueError:
            known = f" or a name, such as {', '.join(names[:3])}" if names else ""
            raise UserError(
                f"a prompt is the number of a class from 0 to {count - 1}{known}, got "
                f"{options.shown(prompt)}"
            ) from None

    def _read_given(self, image: Any, video: Any) -> UInt8[np.ndarray, "g h w 3"]:
        """Given frames in the size of the model."""
        array = checks.given_frames(image, video)
        if array is None:
            size = self.parts["vae"].cfg.image_size
            return np.zeros((0, size, size, 3), np.uint8)
        return np.stack([self.fit_frame(frame) for frame in array])

    def fit_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """The middle square in the size of the model; a frame of that size as it is."""
        size, (h, w) = self.parts["vae"].cfg.image_size, frame.shape[:2]
        if (h, w) == (size, size):
            return frame
        side = min(h, w)
        left, top = (w - side) / 2, (h - side) / 2
        box = (left, top, left + side, top + side)
        small = resize_square(frame, size, box, antialias=True)
        return np.clip(np.round(small), 0, 255).astype(np.uint8)

    def _videos(
        self,
        classes: Sequence[int],
        seeds: Sequence[int],
        sampling: FrameSamplingConfig,
        frames: FrameSchedule,
        given: np.ndarray,
        clips_per_batch: int | None,
        watch: Watch,
    ) -> Iterator[Clip]:
        dit, is_temporal = self.parts["denoiser"].cfg.dit, self.parts["vae"].cfg.temporal
        # One frame more than the window, as it may move on while one of its frames ends.
        held = frames.window + (frames.window == dit.num_frames)
        rows = [
            {
                "label": np.int32(label),
                "seed": np.uint32(seed),
                "x": np.zeros((held, dit.num_tokens, dit.channels), np.float32),
            }
            for label, seed in zip(classes, seeds, strict=True)
        ]
        forgets = self.config.prompt_windows == "first"
        run = _Run(self._sampler(sampling), frames, held, sampling, forgets)
        whole = run.call(run.row_options((0, 1)), 0, 1)
        modules, mesh, size = self._batches(
            _advance, ["denoiser"], rows[0], len(rows), clips_per_batch, **whole
        )
        watch.expect(len(rows) * frames.num_rows)
        place = None if mesh is None else NamedSharding(mesh, ROWS)
        known = self._encode(given[run.first(0) :], held)
        past = self._encode(given[-dit.num_frames :], dit.num_frames if is_temporal else 0)
        for batch in painting.batched(enumerate(rows), size):
            samples, videos = zip(*batch, strict=True)
            for i, frame in enumerate(given):
                yield from (Clip(sample, i, frame[None]) for sample in samples)
            state = painting.stacked(list(videos), size, place)
            vae = self._of("vae", mesh=mesh)
            done = run.paint(state, known, past, modules, vae, mesh, watch, len(samples))
            for made in painting.ahead(done, watch.ahead(frames.lag or frames.num_steps)):
                if isinstance(made, Taken):
                    watch.tell(made)
                    continue
                i, (pixels, is_finite) = made
                pixels, is_finite = np.asarray(pixels), np.asarray(is_finite)
                for row, sample in enumerate(samples):
                    checks.check_painted(is_finite[row], sample, "denoiser, vae", sampling)
                    yield Clip(sample, i, pixels[row])

    def _encode(self, given: np.ndarray, room: int) -> Float[np.ndarray, "room l c"]:
        """Latents of given frames, as many as there is room for, and zeros behind them."""
        dit = self.parts["denoiser"].cfg.dit
        latents = np.zeros((room, dit.num_tokens, dit.channels), np.float32)
        (graph,), (state,) = self._of("vae")
        for i, frame in enumerate(given[:room]):
            latents[i] = _encode(graph, state, frame[None])[0]
        return latents


@dataclasses.dataclass(frozen=True)
class _Run:
    """The calls that make videos, and what of them changes from call to call.

    Attributes:
      held: Frames in memory, of which `frames.window` are seen.
      forgets: Whether windows behind the first frame read no prompt.
    """

    sampler: AsynchronousDDIM
    frames: FrameSchedule
    held: int
    sampling: FrameSamplingConfig
    forgets: bool

    def first(self, row: int) -> int:
        """The first frame that is held in a run of rows that begins with this one."""
        return int(self.frames.starts_at(np.array(row)))

    def row_options(self, part: tuple[int, int], before: int = 0) -> dict[str, Any]:
        """What `call` takes to run some rows, `before` being held as yet."""
        first = self.first(part[0])
        tables = row_tables(
            self.sampler,
            self.frames,
            part,
            first=first,
            held=self.held,
            length=self.frames.lag or self.frames.num_steps,
            history_noise=self.sampling.history_noise,
        )
        return {"tables": tables, "first": first, "moves": first > before}

    def call(self, rows: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """What `_advance` takes besides videos, for the rows of a part from `start` to `stop`."""
        within = self.sampler.told(self.sampling.guidance_interval)
        scale = self.sampling.guidance_scale if within[0] <= within[1] else 1.0
        scale = 1.0 if self._is_forgotten(rows) else scale
        # The window moves in front of the first of them alone.
        moves = np.bool_(rows["moves"] and start == 0)
        static = {"sampler": self.sampler, "window": self.frames.window, "is_guided": scale != 1}
        guidance = np.float32(scale), np.array(within, np.int32)
        given = rows["tables"], np.int32(rows["first"]), moves, guidance
        part = np.int32(start), np.int32(stop)
        return {"shared": (*given, *part), "static": tuple(static.items())}

    def paint(self, state, known, past, modules, vae, mesh, watch, clips) -> Iterator[Any]:
        """Numbers and pixels of frames, dispatched and not waited for, and news of the steps."""
        frames, done, before = self.frames, self.frames.num_given, self.first(0)
        num_known = np.int32(min(done - before, self.held))
        x = _begin((), (), state, (known, num_known, np.int32(before)), mesh=mesh)
        seen = {"past": np.broadcast_to(past, (len(x), *past.shape))}
        if mesh is not None:
            seen = jax.device_put(seen, NamedSharding(mesh, ROWS))
        for part in frames.parts():
            rows = self.row_options(part, before)
            if self._is_forgotten(rows):
                state = {**state, "label": jnp.full_like(state["label"], -1)}

            def advance(x, start, stop, rows=rows, state=state):
                options = self.call(rows, int(start), int(stop))
                return _advance(*modules, {**state, "x": x}, mesh=mesh, **options)

            timesteps = rows["tables"].times[: part[1] - part[0], 0]
            x = yield from watch.run(advance, x, timesteps, clips, first=part[0])
            before = self.first(part[0])
            while done < frames.num_frames and self._is_done(done, part[1]):
                at = np.int32(done - before), np.int32(min(done, past.shape[0]))
                pixels, is_finite, seen["past"] = _decode(*vae, {"x": x, **seen}, at, mesh=mesh)
                jax.tree.map(lambda x: x.copy_to_host_async(), (pixels, is_finite))
                yield done, (pixels, is_finite)
                done += 1

    def _is_forgotten(self, rows: Mapping[str, Any]) -> bool:
        return self.forgets and rows["first"] > 0

    def _is_done(self, frame: int, row: int) -> bool:
        return self.frames.steps_at(np.array(row), np.array(frame)) == self.frames.num_steps


def _noise(
    seeds: Array, first: Array, count: int, *shape: int, stream: int = 0
) -> Float[Array, "b f n c"]:
    """Noise of frames from `first` on, which does not depend on how many there are."""

    def of_video(key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))
        return per_sample_normal(keys, 0, shape)

    return jax.vmap(of_video)(fold(sample_keys(seeds), stream))


@painting.program
def _begin(rows, known, num_known, first):
    """The first frames that are held: those that are known, and noise."""
    (held, *shape) = known.shape
    noise = _noise(rows["seed"], first, held, *shape)
    return jnp.where((jnp.arange(held) < num_known)[:, None, None], known, noise)


@painting.program
def _advance(
    denoiser, rows, tables, first, moves, guidance, start, stop, *, sampler, window, is_guided
):
    """Frames that are held after some rows; before these the window may move on by one."""
    x, seeds = rows["x"], rows["seed"]
    b, held, *shape = x.shape
    fresh = _noise(seeds, first + held - 1, 1, *shape)
    x = jnp.where(moves, jnp.concatenate([x[:, 1:], fresh], axis=1), x)
    history = _noise(seeds, first, held, *shape, stream=1)
    labels = [rows["label"], jnp.full(b, -1)][: 1 + is_guided]
    contexts = [denoiser.contexts(label) for label in labels]
    denoise = guided_frames(denoiser, contexts, *guidance)
    part = start, stop
    x, _ = run_rows(denoise, sampler, x, tables, window, history=history, part=part)
    return x, painting.ticks(x, stop)


@painting.program
def _decode(vae, rows, at, num_past):
    """Pixels of the frame `at`, whether they are finite, and the frames that the next one sees."""
    latents = jax.lax.dynamic_slice_in_dim(rows["x"], at, 1, axis=1)
    if not (room := rows["past"].shape[1]):
        return *checks.quantize(2 * vae.decode(latents) - 1), rows["past"]
    place = jnp.minimum(num_past, room - 1)
    past = jnp.where(num_past == room, jnp.roll(rows["past"], -1, axis=1), rows["past"])
    past = jax.lax.dynamic_update_slice_in_dim(past, latents, place, axis=1)
    return *checks.quantize(2 * vae.decode(past, only=place) - 1), past


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph, state, frame):
    return unit(nnx.merge(graph, state).encode(frame[None].astype(jnp.float32) / 255))[0]

"""AR-Diffusion (arXiv 2503.07418): videos whose frames are done one after the other.

pipe = ARDiffusionPipeline.from_pretrained("models/ucf101")
video = pipe("Archery", num_frames=32, lag=5, seed=0)
for frame in pipe.stream("Archery", num_frames=128, lag=5):
    ...  # each is there as soon as it has taken its last step
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.asynchronous import row_tables, run_rows
from dicode_jax.diffusion.frame_schedule import FrameSchedule, frame_schedule
from dicode_jax.diffusion.guidance import guide
from dicode_jax.diffusion.guided import guided_denoise
from dicode_jax.diffusion.parameterization import add_noise
from dicode_jax.diffusion.samplers.asynchronous import AsynchronousDDIM
from dicode_jax.diffusion.samplers.base import per_sample_normal
from dicode_jax.diffusion.time_grid import ddim_timesteps
from dicode_jax.distributions.projected_gaussian import unit
from dicode_jax.errors import UserError
from dicode_jax.media.resize import resize_square
from dicode_jax.models.ar_diffusion.dit import Denoiser, DenoiserConfig
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAE, FrameVAEConfig
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines import base, calls, checks, options
from dicode_jax.pipelines.painting import Clip
from dicode_jax.typing import UInt8

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
      lag: Rows, of one call each, between the starts of neighbouring frames.
      history_noise: Timestep of the noise under which given frames are seen; 0 for none.
    """

    num_frames: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    lag: int = 5
    history_noise: int = 0

    def __post_init__(self):
        options.check(**vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARDiffusionConfig:
    """What a pipeline knows besides its parts.

    Attributes:
      fps: Frames per second of the videos it makes.
      class_names: Names of the classes, in order; empty where they have none.
      sampling: Sampling defaults.
    """

    fps: float = 25.0
    class_names: tuple[str, ...] = ()
    sampling: FrameSamplingConfig = FrameSamplingConfig()

    def __post_init__(self):
        options.check(fps=self.fps)


class ARDiffusionPipeline(base.Pipeline):
    """Holds the denoiser and the VAE of single frames.

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
    def _check_fit(cls, config: ARDiffusionConfig, configs: Mapping[str, Any]) -> None:
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
        if vae.temporal:
            raise UserError("the VAE decodes 16 frames together; take the one of single frames")
        if config.class_names and len(config.class_names) != denoiser.num_classes:
            raise UserError(
                f"class_names has {len(config.class_names)} names for "
                f"{denoiser.num_classes} classes"
            )

    def _answer(self, call: calls.Call) -> calls.Answer:
        """What `stream` gives, gathered; prompts and further options are told there."""
        known = inspect.signature(self.stream).parameters.keys()
        if unknown := sorted(call.options.keys() - known):
            raise UserError(f"there is no option {unknown[0]}; there are {', '.join(known)}")
        if any(image is not (call.images or [None])[0] for image in call.images or []):
            raise UserError("this model goes on from one image for all prompts; give one")
        clips = self.stream(
            call.prompts,
            image=None if call.images is None else call.images[0],
            video=call.video,
            seed=call.seeds,
            **call.options,
        )
        count = call.options.get("num_frames", self.config.sampling.num_frames)
        return calls.Answer(frames=call.gather(clips, count * len(call.seeds)))

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
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        video: UInt8[np.ndarray, "f h w 3"] | None = None,
        history_noise: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[Clip]:
        """The frames of the videos, each as soon as it is done, one video after the other.

        A video does not depend on the others of the call. Frame f is done after
        `num_inference_steps + f * lag` calls of the network.

        Args:
          prompt: A class by its name or number, or a list of them; None or "" where the model has
            no classes.
          num_frames: Of a video, given ones among them.
          lag: Calls between the starts of neighbouring frames: 0 makes all at once, as many as
            there are steps one after the other. A video longer than the window of the model needs
            `window * lag` to reach the steps.
          num_inference_steps, guidance_scale: None for the model's default.
          image: The first frame; its middle square is taken.
          video: The first frames, instead of an image. Given frames come back as they were, in
            the model's size.
          history_noise: Timestep of the noise under which the network sees given frames, which
            keeps long videos from clinging to their faults; 0 for none.
          seed: Of all randomness, 0 to 2**32 - 1; or a seed for each video.

        Raises:
          UserError: No such class, or an option is impossible.
        """
        classes = self._read_classes(prompt)
        seeds = options.check_seeds(seed, len(classes))
        sampling = self._sampling(
            num_frames=num_frames,
            lag=lag,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            history_noise=history_noise,
        )
        given = self._read_given(image, video)
        cfg: DenoiserConfig = self.parts["denoiser"].cfg
        steps = ddim_timesteps(
            "uniform", sampling.num_inference_steps, self._schedule.num_timesteps
        )
        sampler = AsynchronousDDIM(schedule=self._schedule, timesteps=tuple(map(int, steps)))
        frames = frame_schedule(
            sampling.num_frames,
            len(steps),
            sampling.lag,
            window=cfg.dit.num_frames,
            num_given=len(given),
        ).check()

        def videos():
            for sample, (label, one) in enumerate(zip(classes, seeds, strict=True)):
                shown = self._video(label, one, sampling, sampler, frames, given, sample)
                for i, pixels in enumerate(shown):
                    yield Clip(sample, i, pixels[None])

        return videos()

    @property
    def _schedule(self):
        return self.parts["denoiser"].cfg.schedule

    def _sampling(self, **changes: Any) -> FrameSamplingConfig:
        try:
            sampling = dataclasses.replace(self.config.sampling, **options.check(**changes))
            ddim_timesteps("uniform", sampling.num_inference_steps, self._schedule.num_timesteps)
        except ValueError as error:
            raise UserError(str(error)) from error
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
        size = self.parts["vae"].cfg.image_size
        if image is None and video is None:
            return np.zeros((0, size, size, 3), np.uint8)
        if image is not None and video is not None:
            raise UserError("give an image or a video to go on from, not both")
        wanted = "an image is uint8 [h, w, 3]" if video is None else "a video is uint8 [f, h, w, 3]"
        array = checks.as_array(image if video is None else video, wanted)
        shape = array.shape
        array = array[None] if video is None else array
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
            raise UserError(f"{wanted}, got {array.dtype} {shape}")
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

    def _video(
        self,
        label: int,
        seed: int,
        sampling: FrameSamplingConfig,
        sampler: AsynchronousDDIM,
        frames: FrameSchedule,
        given: np.ndarray,
        sample: int,
    ) -> Iterator[np.ndarray]:
        """The frames of one video, uint8 `[h, w, 3]`."""
        (denoiser, vae), (weights, vae_weights) = self._of("denoiser", "vae")
        g, num_frames = len(given), sampling.num_frames
        x = _start(seed, num_frames, *_token_shape(self.parts["denoiser"].cfg))
        shown = None
        if g:
            latents = jnp.concatenate([_encode(vae, vae_weights, one[None]) for one in given])[None]
            x = x.at[:, :g].set(latents)
            if sampling.history_noise:
                times = jnp.full((1, g), sampling.history_noise, jnp.int32)
                noise = _start(seed, g, *latents.shape[2:], stream=1)
                shown = add_noise(sampler.schedule, latents, noise, times), times
        yield from given
        rows, scale = row_tables(sampler, frames), sampling.guidance_scale
        done = g
        for start, stop in _parts(len(frames.moves), sampling.lag):
            part = jax.tree.map(lambda a, i=start, j=stop: a[i:j], rows)
            x = _advance(
                weights,
                x,
                part,
                np.int32(label),
                np.float32(scale),
                shown,
                graph=denoiser,
                sampler=sampler,
                window=frames.window,
                is_guided=scale != 1,
            )
            while done < num_frames and frames.steps[stop, done] == len(sampler.timesteps):
                pixels, is_finite = _decode(vae, vae_weights, x[:, done : done + 1])
                checks.check_painted(np.asarray(is_finite).all(), sample, "denoiser, vae", sampling)
                yield np.asarray(pixels)[0, 0]
                done += 1


def _parts(num_rows: int, lag: int) -> Iterator[tuple[int, int]]:
    """Runs of rows at whose ends frames are done; all but the first are of one length."""
    if lag == 0:
        yield 0, num_rows
        return
    if first := num_rows % lag:
        yield 0, first
    for start in range(first, num_rows, lag):
        yield start, start + lag


def _token_shape(cfg: DenoiserConfig) -> tuple[int, int]:
    return cfg.dit.num_tokens, cfg.dit.channels


def _start(seed: int, num_frames: int, *shape: int, stream: int = 0):
    """Noise `[1, f, n, c]`; that of a frame does not depend on how many there are."""
    key = fold(sample_keys([seed]), stream)[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_frames))
    return per_sample_normal(keys, 0, shape)[None]


@functools.partial(jax.jit, static_argnames=("graph", "sampler", "window", "is_guided"))
def _advance(state, x, rows, label, scale, shown, *, graph, sampler, window, is_guided):
    model = nnx.merge(graph, state)
    labels = jnp.stack([label, jnp.int32(-1)])[: 1 + is_guided]
    contexts = [context[None] for context in model.contexts(labels)]
    join = lambda outputs, step: guide(outputs[0], outputs[1], scale)  # noqa: E731
    denoise = guided_denoise(model, contexts, join, batched=True)
    return run_rows(denoise, sampler, x, rows, window, shown=shown)[0]


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph, state, frame):
    return unit(nnx.merge(graph, state).encode(frame[None].astype(jnp.float32) / 255))[0]


@functools.partial(jax.jit, static_argnames="graph")
def _decode(graph, state, latents):
    return checks.quantize(2 * nnx.merge(graph, state).decode(latents) - 1)

"""What a call of any pipeline may ask for, and what comes back.

`base.Pipeline.__call__` reads its arguments into a `Call`, a family answers with an `Answer`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from dicode_jax.errors import UserError
from dicode_jax.media.given import read_frames, read_images
from dicode_jax.media.videos import Video, Videos
from dicode_jax.pipelines import options
from dicode_jax.pipelines.painting import Clip
from dicode_jax.pipelines.progress import Progress, silent
from dicode_jax.typing import Float, UInt8

OUTPUTS = ("np", "pil", "latent", "tokens")

OnClip = Callable[[Any, int, int, Clip], Any]
"""``(pipe, clips done, clips in all, the clip)``"""

OnStep = Callable[[Any, int, Any, dict[str, Any]], Mapping[str, Any] | None]
"""``(pipe, step, timestep, {"latents": [b, ...]}) -> None or {"latents": others}``"""


def counted(clips: Iterable[Clip], count: int, tell: Progress) -> Iterator[Clip]:
    """The clips, with a word of each."""
    for done, clip in enumerate(clips):
        tell("clips", done, count)
        yield clip
    tell("clips", count, count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call that has been read. All lists have one item for each of the `b` videos.

    Attributes:
      prompts: As the family reads them.
      seeds: 0 to 2**32 - 1.
      images, last_images: uint8 `[h, w, 3]` of any size; None where none is given.
      video: uint8 `[f, h, w, 3]` that all videos go on from, at the pipeline's rate.
      num_clips: Of each video.
      output_type: One of `OUTPUTS`.
      options: What else was given, as it was: the family checks it.
      tell: Told of progress.
      on_clip: Told of each clip as it is there; None for nobody.
      on_step: Told of each step; None for nobody.
    """

    prompts: list[Any]
    seeds: list[int]
    images: list[UInt8[np.ndarray, "h w 3"]] | None = None
    last_images: list[UInt8[np.ndarray, "h w 3"]] | None = None
    video: UInt8[np.ndarray, "f h w 3"] | None = None
    num_clips: int = 1
    output_type: str = "np"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tell: Progress = silent
    on_clip: Callable[[int, int, Clip], Any] | None = None
    on_step: OnStep | None = None

    @property
    def listeners(self) -> dict[str, Any]:
        """Those who are told of steps, as the streams of pipelines take them."""
        return {"progress": self.tell, "callback_on_step_end": self.on_step}

    def gather(self, clips: Iterable[Clip], count: int) -> UInt8[np.ndarray, "b f h w 3"]:
        """All clips of all videos, told of one by one.

        Args:
          clips: Of a stream; those of a video in order.
          count: How many there are.
        """
        videos: list[list[np.ndarray]] = [[] for _ in self.seeds]
        for done, clip in enumerate(counted(clips, count, self.tell), 1):
            videos[clip.sample].append(clip.frames)
            if self.on_clip is not None:
                self.on_clip(done, count, clip)
        if len(videos) == 1:
            return np.concatenate(videos[0])[None]
        return np.stack([np.concatenate(frames) for frames in videos])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a family made: `frames` for "np" and "pil", else what the output type names.

    Attributes:
      frames: uint8 `[b, f, h, w, 3]`.
      latents: Of the frames.
      tokens: Of the keyframes, `[b, k, n, z]`.
      fps: Frames per second, where it is not the pipeline's.
    """

    frames: UInt8[np.ndarray, "b f h w 3"] | None = None
    latents: Float[np.ndarray, "b f y x c"] | None = None
    tokens: Float[np.ndarray, "b k n z"] | None = None
    fps: float | None = None


def read(
    pipe: Any,
    prompt: Any,
    *,
    image: Any,
    last_image: Any,
    video: Any,
    num_clips: Any,
    num_videos_per_prompt: Any,
    seed: Any,
    height: Any,
    width: Any,
    output_type: Any,
    on_clip: OnClip | None,
    on_step: OnStep | None,
    tell: Progress,
    **given: Any,
) -> Call:
    """The arguments of a call, checked; see `base.Pipeline.__call__`.

    Raises:
      UserError: One is impossible, or beyond what the family does; the line says which.
    """
    if not isinstance(prompt, str) and not _is_texts(prompt) and prompt is not None:
        kind = type(prompt).__name__
        if getattr(prompt, "ndim", 0) or isinstance(prompt, Image.Image | os.PathLike):
            raise UserError(f"a prompt is text, got {kind}; give a picture as image=")
    asked = {"image": image, "last_image": last_image, "video": video, **given}
    asked["num_clips"] = None if num_clips == 1 and num_clips is not True else num_clips
    names = {name for name, value in asked.items() if value is not None}
    names |= {output_type} & {"latent", "tokens"} if isinstance(output_type, str) else set()
    if beyond := [n for n in (*asked, "latent", "tokens") if n in names & COMMON - pipe.takes]:
        own = vars(getattr(pipe.config, "sampling", object)).keys() & options.OPTIONS.keys()
        known = [*sorted(pipe.takes & COMMON), *sorted(own - COMMON)]
        raise UserError(
            f"{type(pipe).__name__} does not know {beyond[0]}; beside prompt and seed it takes "
            f"{', '.join(known) or 'nothing'}"
        )
    output_type = options.named("output_type", options.OneOf(OUTPUTS), output_type)
    _check_size(pipe.frame_size, height, width)
    prompts = list(prompt) if _is_texts(prompt) else [prompt]
    images = None if image is None else read_images(image)
    lasts = None if last_image is None else read_images(last_image, "last_image")
    if images is not None and video is not None:
        raise UserError("give an image or a video to go on from, not both")
    if lasts is not None and images is None:
        raise UserError("last_image goes with image, the first frame")
    if not prompts:
        raise UserError("the list of prompts is empty; give one at least")
    prompts, images, lasts = _alike(prompts, images, lasts)
    each = options.named("num_videos_per_prompt", options.Whole(1, 10**6), num_videos_per_prompt)
    count = each * len(prompts)
    repeat = lambda items: None if items is None else [x for x in items for _ in range(each)]  # noqa: E731
    return Call(
        prompts=[x for x in prompts for _ in range(each)],
        seeds=options.check_seeds(seed, count),
        images=repeat(images),
        last_images=repeat(lasts),
        video=None if video is None else _going_on(pipe, video, tell),
        num_clips=options.named("num_clips", options.OPTIONS["num_clips"], num_clips),
        output_type=output_type,
        options={name: value for name, value in given.items() if value is not None},
        tell=tell,
        on_clip=None if on_clip is None else lambda *told: on_clip(pipe, *told),
        on_step=on_step,
    )


COMMON = frozenset(
    {
        "image",
        "last_image",
        "video",
        "num_clips",
        "num_frames",
        "negative_prompt",
        "num_inference_steps",
        "guidance_scale",
        "temperature",
        "latent",
        "tokens",
    }
)
"""What some families know and others do not: arguments, and two types of output."""


def result(pipe: Any, call: Call, answer: Answer, record: Mapping[str, Any]) -> Any:
    """What the caller gets of an answer, by the output type."""
    if call.output_type == "latent":
        return answer.latents
    if call.output_type == "tokens":
        return answer.tokens
    assert answer.frames is not None
    if call.output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in answer.frames]
    return Videos(
        Video(
            frames=frames,
            fps=float(pipe.config.fps if answer.fps is None else answer.fps),
            prompt=None if call.prompts[i] is None else str(call.prompts[i]),
            seed=call.seeds[i],
            tokens=None if answer.tokens is None else answer.tokens[i],
            record={**record, **_own(call, i)},
        )
        for i, frames in enumerate(answer.frames)
    )


def _own(call: Call, i: int) -> dict[str, Any]:
    """What a record says of one video."""
    own: dict[str, Any] = {"prompt": call.prompts[i], "seed": call.seeds[i]}
    for name, given in (("image", call.images), ("last_image", call.last_images)):
        if given is not None:
            own[f"{name}_sha256"] = _digest(given[i])
    if call.video is not None:
        own["video_sha256"] = _digest(call.video)
    return own | {"num_clips": call.num_clips, **_plain(call.options)}


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them."""
    items = ((name, x.item() if isinstance(x, np.generic) else x) for name, x in settings.items())
    is_plain = (int, float, str, list, tuple)
    return {n: x if isinstance(x, is_plain) else str(x) for n, x in items}


def _is_texts(prompt: Any) -> TypeGuard[Sequence[Any]]:
    kind = getattr(getattr(prompt, "dtype", None), "kind", "")
    return isinstance(prompt, list | tuple) or (kind in ("U", "O") and prompt.ndim == 1)


def _going_on(pipe: Any, video: Any, tell: Progress) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a video; of a file those that a family goes on from, where it says which."""
    if isinstance(video, str | os.PathLike) and (read_end := getattr(pipe, "read_end", None)):
        return read_end(video, tell)[0]
    return read_frames(video, fps=pipe.config.fps, progress=tell)


def _alike(prompts: list, images: list | None, lasts: list | None) -> tuple:
    """Prompts and images, one for each video; one alone is for all."""
    counts = {len(items) for items in (prompts, images, lasts) if items is not None}
    count = max(counts)
    if counts - {1, count}:
        said = [f"{len(prompts)} prompts"]
        said += [] if images is None else [f"{len(images)} image(s)"]
        said += [] if lasts is None else [f"{len(lasts)} last image(s)"]
        raise UserError(f"{', '.join(said)}: give one for each, or one for all")
    return tuple(x if x is None or len(x) == count else x * count for x in (prompts, images, lasts))


def _check_size(own: Sequence[int], height: Any, width: Any) -> None:
    for name, value, side in (("height", height, own[0]), ("width", width, own[1])):
        if value is not None and options.named(name, options.SIDE, value) != side:
            raise UserError(
                f"{name}: this model paints {own[1]} x {own[0]} pixels alone, got {value}"
            )

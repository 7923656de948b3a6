"""Wishes to videos, one at a time: the pipeline works in a thread, and its clips come as news."""

import contextlib
import dataclasses
import logging
import pathlib
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from dicode_jax.app import limits as limits_lib
from dicode_jax.app import token_picture
from dicode_jax.app.limits import Limits
from dicode_jax.app.models import Model
from dicode_jax.app.session import Job, Made, Session, file_stem
from dicode_jax.errors import UserError
from dicode_jax.media.given import read_image
from dicode_jax.media.picture import open_picture
from dicode_jax.media.video import at_rate, iter_frames
from dicode_jax.media.videos import Video
from dicode_jax.pipelines import load as load_lib
from dicode_jax.pipelines import options

__all__ = ["News", "Painter", "Wish"]

_log = logging.getLogger(__name__)

_TICK = 0.2  # seconds between two looks at whether somebody still waits
_BETWEEN = 1.0  # seconds at least between two videos of the clips so far
_PICTURE = 256  # pixels of the longer side of a picture of the history, at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What a visitor asks for, as it came from outside: nothing of it is checked.

    Attributes:
      model: Name of the picker.
      prompt, seed, quality: As for the pipelines.
      num_clips, num_frames: The one that the model does not know is passed over.
      start: An uploaded picture or video to begin with.
      last: An uploaded picture to end with.
    """

    model: Any
    prompt: Any
    seed: Any = 0
    num_clips: Any = 1
    num_frames: Any = None
    quality: Any = "standard"
    start: Any = None
    last: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class News:
    """What there is to show.

    Attributes:
      said: A line.
      done: Share of the work, 0 to 1.
      video: The clips so far, an mp4; None for no other than before.
      made: The whole video, at the end.
    """

    said: str
    done: float = 0.0
    video: pathlib.Path | None = None
    made: Made | None = None


class _Stopped(Exception):
    """Nobody waits for the video any more."""


class Painter:
    """Paints for all visitors.

    Args:
      models: Those of the picker.
      root: Folder that uploads and sessions lie in; nothing outside of it is read for a visitor.
      limits: What is refused beyond them.
      load: Folder to pipeline.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        root: pathlib.Path,
        limits: Limits,
        load: Callable[[pathlib.Path], Any] = load_lib.load,
    ):
        self.models, self.root, self.limits = models, root, limits
        self._load = load
        self._loaded: tuple[str, Any] | None = None  # the last one alone: models can be large
        self._lock = threading.Lock()  # whoever holds it loads and paints
        self._looking = threading.Lock()  # pictures can be large: one is decoded at a time
        self._threads: set[threading.Thread] = set()
        self._jobs: set[threading.Event] = set()

    def session(self) -> Session:
        """A new visitor."""
        return Session(self.root / "sessions", self.limits.kept)

    def preload(self, name: str) -> None:
        """Loads a model, so that one that is broken is known before anybody waits for it.

        Raises:
          UserError: It is broken.
        """
        with self._lock:
            self._pipe(name)

    def close(self, patience: float = 10.0) -> None:
        """Stops what is at work, and waits so many seconds for the clips in hand."""
        for stop in list(self._jobs):
            stop.set()
        end = time.monotonic() + patience
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def look(self, path: Any) -> np.ndarray:
        """What an uploaded file shows first, uint8 `[h, w, 3]`.

        Raises:
          UserError: It is no picture and no video, or beyond the limits.
        """
        file = limits_lib.own_file(path, self.root, self.limits)
        with self._looking, _called(file, file.name):
            if _is_picture(file):
                return read_image(file)
            frames = iter_frames(file)
            first, _ = next(frames), next(frames)
            return first.image

    def run(self, session: Session, wish: Wish) -> Iterator[News]:
        """Paints a video, with news as there are any; the last one has the video.

        Whoever stops listening, or stops the session's job, stops the painting at its next clip.

        Raises:
          UserError: Something of the wish is impossible, beyond the limits, or nothing that the
            model does. Nothing is left in the history then.
        """
        model, call = self._read(wish)
        files = {
            name: limits_lib.own_file(path, self.root, self.limits)
            for name, path in (("start", wish.start), ("last", wish.last))
            if path is not None
        }
        job, inbox = session.begin(), queue.SimpleQueue()
        work = threading.Thread(
            target=self._work, args=(job.stop, model, call, files, inbox.put), daemon=True
        )
        self._jobs.add(job.stop)
        self._threads.add(work)
        start = time.monotonic()
        made = None
        try:
            work.start()
            yield News(said="Preparing. The first video of a model also waits for its compiler.")
            for news in self._news(inbox, job, model, call, start):
                made = news.made
                if made is not None:
                    session.end(job, made)
                yield news
        except Exception as error:
            if not job.stop.is_set():  # else its files are gone, and nobody listens
                raise _for_people(error) from error
        finally:
            self._jobs.discard(job.stop)
            session.end(job, made)

    def _read(self, wish: Wish) -> tuple[Model, dict[str, Any]]:
        """The model of a wish and what it is called with, but for the files."""
        limits = self.limits
        if not isinstance(wish.model, str) or wish.model not in self.models:
            raise UserError("there is no such model here; choose one of the list")
        model = self.models[wish.model]
        call: dict[str, Any] = {
            "prompt": limits_lib.check_prompt(wish.prompt, limits),
            "seed": limits_lib.whole("seed", wish.seed, 0, options.MAX_SEED),
        }
        if model.has_clips:
            call["num_clips"] = limits_lib.whole("clips", wish.num_clips, 1, limits.clips)
        elif model.has_frames and wish.num_frames is not None:
            frames = limits_lib.whole("frames", wish.num_frames, 1, limits.frames)
            if frames != model.num_frames:
                call["num_frames"] = frames
        options.preset(wish.quality)
        if model.has_presets and wish.quality not in (None, "standard"):
            call["quality"] = wish.quality
        if model.is_batched:
            call["clips_per_batch"] = 1  # the first one soonest, and a stop after each
        return model, call

    def _work(
        self,
        stop: threading.Event,
        model: Model,
        call: dict[str, Any],
        files: dict[str, pathlib.Path],
        tell: Callable[[Any], None],
    ) -> None:
        """Paints in a thread of its own; tells `("clip", done, total, frames)` and the like."""

        def on_progress(what: str, done: int, total: int) -> None:
            if stop.is_set():
                raise _Stopped
            tell(("progress", what, done, total))

        def on_clip(pipe: Any, done: int, total: int, clip: Any) -> None:
            if stop.is_set():
                raise _Stopped
            tell(("clip", done, total, np.asarray(clip.frames)))

        try:
            if not self._lock.acquire(blocking=False):
                tell(("waiting",))
                while not self._lock.acquire(timeout=_TICK):
                    if stop.is_set():
                        return
            try:
                if stop.is_set():
                    return
                with warnings.catch_warnings(record=True) as notes:
                    warnings.simplefilter("always")
                    with _called(model.folder, model.name):
                        pipe = self._pipe(model.name)
                    given = self._given(pipe, model, files)
                    videos = pipe(
                        **call, **given, callback_on_clip_end=on_clip, progress=on_progress
                    )
                tell(("made", videos[0], [str(note.message) for note in notes if _is_ours(note)]))
            finally:
                self._lock.release()
        except _Stopped:
            pass
        except Exception as error:
            tell(("failed", error))
        finally:
            self._threads.discard(threading.current_thread())

    def _pipe(self, name: str) -> Any:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # first, so that two are never in memory
            self._loaded = name, self._load(self.models[name].folder)
        return self._loaded[1]

    def _given(self, pipe: Any, model: Model, files: dict[str, pathlib.Path]) -> dict[str, Any]:
        """Uploaded files as the arguments of a call."""
        given: dict[str, Any] = {}
        if (file := files.get("start")) is not None:
            with _called(file, file.name):
                if _is_picture(file):
                    given["image"] = read_image(file)
                elif "video" not in model.takes:
                    given["video"] = file  # which the call refuses, with what it takes
                else:
                    given["video"] = self._frames(pipe, file)
        if (file := files.get("last")) is not None:
            with _called(file, file.name):
                given["last_image"] = read_image(file, "last image")
        return given

    def _frames(self, pipe: Any, file: pathlib.Path) -> np.ndarray:
        """uint8 `[f, h, w, 3]`: a video at the rate and in the size of the model."""
        frames = limits_lib.at_most(self.limits.decoded, iter_frames(file), file.name)
        shown = at_rate(frames, pipe.config.fps)
        what = f"{file.name}, at {pipe.config.fps:g} a second,"
        kept = limits_lib.at_most(self.limits.frames, shown, what)
        video = np.stack([pipe.fit_frame(frame.image) for frame in kept])
        if hasattr(pipe, "given_frames"):  # of a family that goes on from certain numbers alone
            video = video[-pipe.given_frames(len(video)) :]
        return video

    def _news(
        self, inbox: queue.SimpleQueue, job: Job, model: Model, call: dict[str, Any], start: float
    ) -> Iterator[News]:
        """What the thread tells, as something to show."""
        clips, shown_at = [], -_BETWEEN
        unit = "clip" if model.has_clips else "frame"
        while not job.stop.is_set():
            try:
                what, *told = inbox.get(timeout=_TICK)
            except queue.Empty:
                continue
            if what == "failed":
                raise told[0]
            if what == "waiting":
                yield News(said="Waiting for the video of somebody else.")
            if what == "progress" and told[0] == "steps":
                _, step, total = told
                yield News(said=f"Step {step} of {total}.", done=step / max(total, 1))
            elif what == "progress" and told[0] != "clips":
                yield News(said=f"Writing {told[0]}: {told[1]} of {told[2]}.")
            if what == "clip":
                done, total, frames = told
                clips.append(frames)
                rate = (time.monotonic() - start) / done
                said = f"Painted {unit} {done} of {total}, {rate:.1f} s each so far."
                video = None
                if done < total and time.monotonic() - shown_at >= _BETWEEN:
                    video = job.folder / f"{done:04d}.mp4"
                    so_far = Video(frames=np.concatenate(clips), fps=model.fps)
                    so_far.save(video)
                    of = f"The first {done} of {total} {unit}s; then it was stopped."
                    job.part = self._made(job, model, call, of, so_far, video)
                    shown_at = time.monotonic()
                yield News(said=said, done=done / total, video=video)
            if what == "made":
                video, notes = told
                file = job.folder / f"{file_stem(call['prompt'], call['seed'])}.mp4"
                video.save(file)
                seconds = len(video.frames) / video.fps
                said = f"{seconds:.3g} s of video, painted in {time.monotonic() - start:.1f} s."
                made = self._made(job, model, call, " ".join([said, *notes]), video, file)
                yield News(said=made.said, done=1.0, video=file, made=made)
                return

    def _made(
        self,
        job: Job,
        model: Model,
        call: dict[str, Any],
        said: str,
        video: Video,
        file: pathlib.Path,
    ) -> Made:
        """The entry of the history, with its pictures."""
        picture = job.folder / f"{file.stem}-picture.png"
        frame = Image.fromarray(video.frames[len(video.frames) // 2])
        grows = max(1, _PICTURE // max(frame.size))
        frame.resize((grows * frame.width, grows * frame.height), Image.Resampling.NEAREST).save(
            picture
        )
        tokens = None
        if video.tokens is not None and video.tokens.ndim == 3:
            tokens = job.folder / f"{file.stem}-tokens.png"
            token_picture.draw(video.tokens, _keyframes(video, model.num_frames)).save(tokens)
        return Made(
            prompt=call["prompt"],
            seed=call["seed"],
            model=model.name,
            said=said,
            folder=job.folder,
            video=file,
            picture=picture,
            tokens=tokens,
        )


def _keyframes(video: Video, num_frames: int) -> list[np.ndarray]:
    """The frame at each keyframe; clips lie between two, and the last frame of all is one."""
    last, count = len(video.frames) - 1, len(video.tokens)  # type: ignore[arg-type]
    return [video.frames[max(0, last - i * num_frames)] for i in reversed(range(count))]


def _is_ours(note: warnings.WarningMessage) -> bool:
    """Whether a warning is for people, as one of a prompt that is cut."""
    ours = pathlib.Path(note.filename).is_relative_to(pathlib.Path(__file__).parents[1])
    return ours and issubclass(note.category, UserWarning)


def _is_picture(file: pathlib.Path) -> bool:
    """Whether it is one that does not move. What is no picture may be a video."""
    try:
        with open_picture(file, file.name) as image:
            return getattr(image, "n_frames", 1) == 1 or image.format != "WEBP"
    except UserError:
        return False


@contextlib.contextmanager
def _called(path: pathlib.Path, name: str) -> Iterator[None]:
    """Errors of the block call a file or folder so: where it lies is nobody's business."""
    try:
        yield
    except UserError as error:
        said = str(error).replace(str(path.resolve()), name)
        raise UserError(said.replace(str(path), name)) from error


def _for_people(error: Exception) -> Exception:
    """What the page says of an error; the log has all of those that are nobody's mistake."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError("not enough memory; ask for fewer clips")
    _log.error("a video failed", exc_info=error)
    return UserError("something went wrong here, which is no mistake of yours; the log has it")

"""One visitor of the page: what was painted for him, and what is being painted."""

import dataclasses
import pathlib
import re
import secrets
import shutil
import threading

from dicode_jax.errors import UserError

__all__ = ["Job", "Made", "Session"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A video of the history.

    Attributes:
      prompt, seed, model: What it was painted from.
      said: How it came out, in a line.
      folder: Holds the files, and no others.
      video: An mp4.
      picture: A frame of it.
      tokens: A picture of its tokens, where the model has such.
    """

    prompt: str
    seed: int
    model: str
    said: str
    folder: pathlib.Path
    video: pathlib.Path
    picture: pathlib.Path
    tokens: pathlib.Path | None = None


@dataclasses.dataclass(kw_only=True)
class Job:
    """A video that is being painted.

    Attributes:
      folder: Its own.
      stop: Set when nobody waits for it any more; the clip that is at work is the last one.
      part: What is there of it.
    """

    folder: pathlib.Path
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    part: Made | None = None


class Session:
    """What belongs to one visitor. Files are in a folder with a name that nobody can guess.

    Args:
      root: Folder of all sessions.
      kept: Videos of the history; beyond these the oldest one goes, with its files.

    Attributes:
      folder: Of his videos.
      history: The newest one first.
    """

    def __init__(self, root: pathlib.Path, kept: int):
        self._root = root
        self.folder = root / secrets.token_urlsafe(16)
        self.history: list[Made] = []
        self._asked, self._stopped = 0, 0  # how many wishes, and how many of them are over
        self._kept, self._count = kept, 0
        self._job: Job | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> "Session":
        """A new visitor, as Gradio gives a copy of the first value of a state to each."""
        return Session(self._root, self._kept)

    def ask(self) -> int:
        """The number of a new wish, whose turn is yet to come."""
        self._asked += 1
        return self._asked

    def is_wanted(self, wish: object) -> bool:
        """Whether the wish of a number is still waited for: none was stopped since."""
        return isinstance(wish, int | float) and wish > self._stopped

    def begin(self) -> Job:
        """A new job.

        Raises:
          UserError: One is at work already, or the visitor has left.
        """
        with self._lock:
            if self._is_closed:
                raise UserError("this page was left; load it again")
            if self._job is not None:
                raise UserError("a video is being painted for you; wait for it, or stop it")
            self._count += 1
            self._job = Job(folder=self.folder / f"{self._count:04d}")
            self._job.folder.mkdir(parents=True)
            return self._job

    def end(self, job: Job, made: Made | None = None) -> None:
        """Ends a job; what was made of it joins the history. A job that was ended stays so."""
        with self._lock:
            job.stop.set()
            if self._job is not job:
                return
            self._job = None
            if made is None:
                shutil.rmtree(job.folder, ignore_errors=True)
                return
            self.history.insert(0, made)
            for old in self.history[self._kept :]:
                shutil.rmtree(old.folder, ignore_errors=True)
            del self.history[self._kept :]

    def stop(self) -> Made | None:
        """Stops what is at work and what waits; the clips that are there join the history.

        Returns:
          These, if there are any.
        """
        self._stopped = self._asked
        job = self._job
        if job is None:
            return None
        part = job.part
        self.end(job, part)
        return part

    def close(self) -> None:
        """Stops what is at work and removes all files."""
        self.stop()
        with self._lock:
            self._is_closed = True
            self.history.clear()
            shutil.rmtree(self.folder, ignore_errors=True)


def file_stem(prompt: str, seed: int) -> str:
    """A name for the file that a visitor downloads, of letters that no file system minds."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-")
    return f"{words or 'video'}-{seed}"

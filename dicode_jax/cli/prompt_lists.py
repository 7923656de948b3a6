"""Lists of prompts to a folder of videos; a run that was stopped goes on where it was.

    tasks = plan(read_prompts("prompts.csv"), seed=0, num_videos_per_prompt=5)
    paint_all(tasks, "videos", settings, paint)

`manifest.jsonl`, beside the videos, has a line for each that is whole, with all that repeats it.
"""

import csv
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Self

from dicode_jax.errors import UserError, printable
from dicode_jax.pipelines.options import MAX_SEED, OPTIONS, Whole, named
from dicode_jax.storage.files import MAX_OBJECT, is_file_name, parse_json, read_small, short

LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
MANIFEST = "manifest.jsonl"
MAX_VIDEOS = 10**6  # of a list

_TEXTS = ("negative_prompt", "image", "last_image", "video")
_RULES = {"seed": Whole(0, MAX_SEED), "num_clips": OPTIONS["num_clips"]}
_FILES = ("image", "last_image", "video")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of a list.

    Attributes:
      prompt: The text; empty only where there is a file to go on from.
      seed: Of its first video; None for that of the command.
      name: Of its files, before the number and extension; None for one made of the prompt.
      options: What the pipeline is told besides: `num_clips`, `negative_prompt`, and files as
        `image`, `last_image` and `video`.
      extra: What else its line says, which goes to the manifest as it is.
    """

    prompt: str
    seed: int | None = None
    name: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A video to paint, as `file` of its folder; the rest as in `Entry`."""

    file: str
    prompt: str
    seed: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the pixels: two videos of one identity are the same."""
        own = {"prompt": self.prompt, "seed": self.seed, "options": dict(self.options)}
        return own | {"settings": dict(settings)}


def read_prompts(path: str | os.PathLike) -> list[Entry]:
    """The prompts of a file, by its extension.

    A .txt holds one on each line, empty ones apart. A .csv has a header with the column `prompt`, a
    .jsonl an object with the key `prompt` on each line; `seed`, `name`, `num_clips`,
    `negative_prompt`, `image`, `last_image` and `video` are understood beside it. Files are named
    from the folder of the list.

    Raises:
      UserError: There is no such file, it is of another kind, or a line is wrong.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in LIST_SUFFIXES:
        raise UserError(f"{path}: a list of prompts is one of: {', '.join(LIST_SUFFIXES)}")
    try:
        text = read_small(path, MAX_OBJECT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8; save it as such") from error
    rows = {".txt": _of_lines, ".csv": _of_csv, ".jsonl": _of_jsonl}[suffix](path, text)
    entries = [_entry(f"{path}, line {number}", row, path.parent) for number, row in rows]
    if not entries:
        raise UserError(f"{path} holds no prompt")
    return entries


def plan(
    entries: Sequence[Entry],
    *,
    seed: int = 0,
    num_videos_per_prompt: int = 1,
    suffix: str = ".mp4",
    name: Callable[[Entry, int, int], str] | None = None,
) -> list[Task]:
    """The videos of a list, prompt by prompt.

    Video i of a prompt has the seed `seed + i`, wherever the prompt stands, so that it stays the
    same when the list changes.

    Args:
      entries: Of `read_prompts`.
      seed: Of the first video of prompts that bring none.
      num_videos_per_prompt: How many are made of each.
      suffix: Kind of the videos, as an extension.
      name: Of a video, without extension, from its entry, number and seed; None for `video_name`.

    Raises:
      UserError: Two videos would have the same name, or a seed or the number of videos is too
        large.
    """
    count = named("num_videos_per_prompt", Whole(1, MAX_VIDEOS), num_videos_per_prompt)
    if count * len(entries) > MAX_VIDEOS:
        raise UserError(f"{len(entries)} prompts of {count} videos are more than {MAX_VIDEOS:,}")
    tasks: dict[str, Task] = {}
    for entry in entries:
        first = seed if entry.seed is None else entry.seed
        named("seed", Whole(0, MAX_SEED - count + 1), first)
        for index in range(count):
            stem = (name or _default_name)(entry, index, first + index)
            file = f"{_checked_name(stem)}{suffix}"
            if file in tasks:
                raise UserError(
                    f"two videos would be called {printable(file, 80)}, of the prompt "
                    f"{printable(entry.prompt, 80)!r}; give one another seed or `name`"
                )
            tasks[file] = Task(
                file=file,
                prompt=entry.prompt,
                seed=first + index,
                options=entry.options,
                extra=entry.extra,
            )
    return list(tasks.values())


def video_name(prompt: str, seed: int) -> str:
    """A file name of prompt and seed alone, without extension.

    It is the prompt's words; where those do not tell the prompt, a part of its hash follows.
    """
    text = unicodedata.normalize("NFC", prompt)
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    kept = short(words[:80]).rstrip("-")
    if kept.replace("-", " ") != prompt:
        kept = f"{kept}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}".lstrip("-")
    return f"{kept}_{seed}"


def model_of(folder: str | os.PathLike) -> dict[str, str]:
    """What `settings` of `paint_all` say of a model, so that no two states of it are mixed."""
    from dicode_jax.evaluation import kept

    return {"model": pathlib.Path(folder).resolve().name, "fingerprint": kept.fingerprint(folder)}


def paint_all(
    tasks: Sequence[Task],
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    paint: Callable[[Task, pathlib.Path], Mapping[str, Any]],
    *,
    say: Callable[[str], None] = lambda line: None,
    manifest: str | os.PathLike | None = None,
) -> list[pathlib.Path]:
    """Makes the videos that the folder does not hold yet, one after the other.

    Args:
      tasks: Of `plan`.
      folder: Made if need be; one that holds none of these files, or videos that were made here.
      settings: What all videos share, as JSON: model, options.
      paint: Writes the video of a task to a path, and returns what the manifest shall say besides.
      say: Told of each video.
      manifest: Its file, for whoever wants nothing but videos in the folder; None for
        `manifest.jsonl` in it.

    Returns:
      The videos, of this run and earlier ones, as in `tasks`.

    Raises:
      UserError: The folder holds one of the files with another identity, or cannot be written; or,
        when all others are made, some could not be.
    """
    folder, failed = pathlib.Path(folder), []
    with Manifest(folder, manifest) as lines:
        done = lines.check(tasks, settings)
        if done:
            say(f"{len(done)} of {len(tasks)} videos are there already")
        for number, task in enumerate(tasks, 1):
            if task.file in done:
                continue
            try:
                said = paint(task, folder / task.file)
            except UserError as error:
                failed.append(f"{task.file}: {error}")
                say(f"{number}/{len(tasks)} {failed[-1]}")
                continue
            lines.add(task, settings, said)
            say(f"{number}/{len(tasks)} {task.file}")
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{len(failed)} of {len(tasks)} videos are not made: {failed[0]}{more}")
    return [folder / task.file for task in tasks]


class Manifest:
    """What is told of a folder's videos, which one process at a time writes; a context manager.

    Args:
      folder: Of the videos.
      path: Of the manifest; None for `manifest.jsonl` in the folder.

    Attributes:
      lines: File -> what its line says.

    Raises:
      UserError: The folder cannot be made, another process is at it, or a line is broken.
    """

    def __init__(self, folder: pathlib.Path, path: str | os.PathLike | None = None):
        self._folder, self._path = folder, pathlib.Path(path or folder / MANIFEST)
        self._file: BinaryIO | None = None
        self._is_new, self._written = True, 0  # when it was last written to, in ns
        self.lines: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(exist_ok=True)
            self._is_new = not os.path.lexists(self._path)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = open(os.open(self._path, flags, 0o666), "r+b", buffering=0)
        except OSError as error:
            where = error.filename or self._path
            raise UserError(f"cannot write {where}: {error.strerror or error}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise UserError(f"{self._path} is a pipe or a device; name another folder")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._written = os.fstat(self._file.fileno()).st_mtime_ns
            self.lines = {line["file"]: line for line in self._read()}
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"another process is writing to {self._folder}") from None
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._file is not None
        if self._is_new and not self.lines:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def check(self, tasks: Sequence[Task], settings: Mapping[str, Any]) -> set[str]:
        """Files of the tasks that are there and whole.

        Raises:
          UserError: A file is of another prompt, seed or setting, or nobody knows of what: it has
            no line, and a kill between it and its line did not leave it either, being older.
        """
        done = set()
        for task in tasks:
            path, line = self._folder / task.file, self.lines.get(task.file)
            is_there = path.is_file()
            if is_there and line is not None:
                wanted = _as_json(task.identity(settings))
                other = [key for key, value in wanted.items() if line.get(key) != value]
                if other:
                    raise UserError(
                        f"{path} was made with other {', '.join(other)}, as {self._path.name} "
                        "says; name another folder"
                    )
                done.add(task.file)
            elif is_there and self._is_new:
                raise UserError(
                    f"{path} is there and {self._path.name} is not; name another folder, so that "
                    "nothing is replaced"
                )
            elif is_there and path.stat().st_mtime_ns < self._written:
                raise UserError(
                    f"{path} is there and {self._path.name} does not know it; move it away, or "
                    "name another folder, so that nothing is replaced"
                )
        return done

    def add(self, task: Task, settings: Mapping[str, Any], said: Mapping[str, Any]) -> None:
        """Adds the line of a video that is whole."""
        assert self._file is not None
        line = {"file": task.file, **task.identity(settings), **said}
        if task.extra:
            line["extra"] = dict(task.extra)
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(text.encode() + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.lines[task.file] = _as_json(line)

    def _read(self) -> Iterator[dict[str, Any]]:
        """The lines; one that a kill cut in half is taken away."""
        assert self._file is not None
        data = read_small(self._path, MAX_OBJECT)
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file.fileno(), whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            where = f"{self._path}, line {number}"
            found = parse_json(line, where)
            if not isinstance(found, dict) or not isinstance(found.get("file"), str):
                raise UserError(f"{where} is not the line of a video")
            yield found


def _as_json(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value, allow_nan=False))


def _default_name(entry: Entry, index: int, seed: int) -> str:
    return video_name(entry.prompt, seed) if entry.name is None else f"{entry.name}_{seed}"


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _checked_name(name: str) -> str:
    if not name or name.startswith(".") or re.search(r"[/\\\0]", name) or not is_file_name(name):
        raise UserError(f"no video can be called {printable(repr(name), 80)}")
    if len(os.fsencode(name)) > 230:
        raise UserError(f"the name {printable(repr(name), 80)} is too long for a file")
    return name


Rows = Iterator[tuple[int, Mapping[str, Any]]]


def _of_lines(path: pathlib.Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _of_csv(path: pathlib.Path, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise UserError(f"{path} has no column `prompt`; name it in the first line")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num} has another number of columns")
            yield reader.line_num, {key: value for key, value in row.items() if value != ""}
    except csv.Error as error:
        raise UserError(f"{path} is no CSV: line {reader.line_num}: {error}") from error


def _of_jsonl(path: pathlib.Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} holds no JSON object")
        yield number, row


def _entry(where: str, row: Mapping[str, Any], folder: pathlib.Path) -> Entry:
    row = {key: value for key, value in row.items() if value is not None}
    prompt = row.pop("prompt", "")
    texts = {name: row.pop(name) for name in (*_TEXTS, "name") if name in row}
    for name, value in {"prompt": prompt, **texts}.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} is not text")
        if not _is_unicode(value):
            raise UserError(f"{where}: {name} holds half of a character, which no text has")
    if not prompt.strip() and not texts.keys() & {"image", "video"}:
        raise UserError(f"{where} has no prompt")
    numbers = {}
    for name, rule in _RULES.items():
        if name in row:
            value = row.pop(name)
            is_digits = isinstance(value, str) and re.fullmatch(r"\d{1,20}", value.strip())
            numbers[name] = named(f"{where}: {name}", rule, int(value) if is_digits else value)
    files = {name: str(folder / texts.pop(name)) for name in _FILES if name in texts}
    if missing := [file for file in files.values() if not os.path.isfile(file)]:
        raise UserError(f"{where}: there is no file {missing[0]}")
    return Entry(
        prompt=prompt,
        seed=numbers.pop("seed", None),
        name=texts.pop("name", None),
        options=numbers | texts | files,
        extra=row,
    )

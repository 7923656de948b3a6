"""A table of videos: CSV, TSV or JSON lines, one row per caption, WebVid's columns too.

Only the place of every row is kept in memory; a row is read again when its record is asked for.
Rows come from strangers: what one of them holds may cost that row, never the table.
"""

import array
import csv
import itertools
import json
import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any

import numpy as np

from dicode_jax.data.records import (
    CAPTION_FIELDS,
    IMAGE_SUFFIXES,
    MAX_NAME,
    MEDIA_SUFFIXES,
    BrokenRecord,
    MediaFile,
    Record,
    captions_from_value,
    joined_captions,
    name_hash,
    suffix_of,
)
from dicode_jax.data.sources.identity import (
    FileNames,
    differs,
    first_name,
    group,
    hash_files,
    leads_outside,
)
from dicode_jax.errors import UserError, printable
from dicode_jax.storage.files import MAX_TEXT

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
VIDEO_FIELDS = ("video", "video_path", "path", "file", "file_name", "filename", "filepath", "image")
WEBVID_ID, WEBVID_FOLDER = "videoid", "page_dir"
_SHOWN_ERRORS = 5
_MAX_ROWS = 10_000  # of one record
_MAX_COLUMNS = 1000  # of JSON lines, besides those that are looked for
_MAX_AGAIN = 16  # times the size of a table, which quotes that do not close have it read again

csv.field_size_limit(MAX_TEXT)


class TableSource:
    """Rows that name files; rows of the same file are one record with several captions.

    WebVid's rows name `PAGE_DIR/VIDEOID.mp4`, which is looked for below `root` and `root/videos`,
    then as `VIDEOID.mp4`.
    """

    def __init__(self, path, root, columns, video_columns, caption_columns):
        self.left_out: tuple[str, ...] = ()
        self._path, self._fence, self._columns = path, root, columns
        self._root = root or os.path.dirname(path) or "."
        # A row says it in the first of them that it has; rows of JSON need not have the same.
        self._video_columns: tuple[str, ...] = video_columns
        self._caption_columns: tuple[str, ...] = caption_columns
        self._places = np.zeros(0, np.int64)  # of rows in the file, those of a record together
        self._ends = np.zeros(1, np.int64)  # record i has the places ends[i] to ends[i + 1]

    @classmethod
    def open(
        cls,
        path: str,
        *,
        root: str | None,
        video_column: str | None,
        caption_column: str | None,
        images: bool,
    ) -> tuple["TableSource", np.ndarray]:
        """Goes through the table once; returns hashes of canonical names too.

        Args:
          root: Rows that lead outside of it are left out; None for the table's folder and no fence.

        Raises:
          UserError: There is no such table, or its columns do not tell which is which.
        """
        if not os.path.isfile(path):
            raise UserError(f"there is no table {path}")
        given = {video_column, caption_column, *VIDEO_FIELDS, *CAPTION_FIELDS}
        rows = _rows(path, given | {WEBVID_ID, WEBVID_FOLDER})
        try:
            columns = next(rows)[1]
            videos = _find_video_columns(path, columns, video_column)
            captions = _find_caption_columns(path, columns, caption_column)
            if again := [name for name in (*videos, *captions) if columns.count(name) > 1]:
                raise UserError(f"{path} has several columns {again[0]!r}; rename all but one")
            source = cls(path, root, columns, videos, captions)
            return source, source._index(rows, images)
        except StopIteration:
            raise UserError(f"{path} is empty") from None
        except UserError:
            raise
        except (csv.Error, ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read as a table: {error}") from error

    def _index(self, rows, images: bool) -> np.ndarray:
        known, wrong, count = FileNames(self._root), [], 0
        places, wanted = array.array("q"), array.array("b")
        spelled, canonical, files = (array.array("Q") for _ in range(3))
        for number, (place, row) in enumerate(rows, start=1):
            name = self._name_in(row) if isinstance(row, dict) else None
            fault = self._fault_of(name)
            if name is None or fault:
                count += 1
                if len(wrong) < _SHOWN_ERRORS:
                    fault = f"{fault} ({printable(repr(name), 100)})"
                    why = row if isinstance(row, str) else fault
                    wrong.append(f"{self._path}, row {number}: {why}")
                continue
            one, file = self._resolve(known, name)
            places.append(place)
            wanted.append(images or suffix_of(name) not in IMAGE_SUFFIXES)
            spelled.append(name_hash(name))
            canonical.append(spelled[-1] if one == name else name_hash(one))
            files.append(canonical[-1] if file is None else file)
        if count > len(wrong):
            wrong.append(f"{self._path}: {count - len(wrong)} more rows like these")
        spelled, canonical, files = (np.array(a, np.uint64) for a in (spelled, canonical, files))
        order, self._ends = group(files, canonical, np.array(wanted, bool))
        self._places = np.array(places, np.int64)[order]
        other = np.count_nonzero(differs(spelled[order], self._ends))
        if other:
            wrong.append(
                f"{self._path}: {other} rows name the file of an earlier row by another name; "
                "their captions are joined"
            )
        self.left_out = tuple(wrong)
        return hash_files(canonical[order], self._ends, self.canonical_name)

    def _fault_of(self, name: str | None) -> str:
        """Why a name is none of a record, or ""."""
        if name is None or suffix_of(name) not in MEDIA_SUFFIXES:
            return "names no video or picture"
        if len(name) > MAX_NAME:
            return f"its name has {len(name):,} letters"
        if name.startswith(("http://", "https://")):
            return (
                "names a web address; download the videos and give the column of local files as "
                "video_column"
            )
        return "" if self._places_of(name) else f"leads outside of {self._fence}"

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        place = int(self._places[self._ends[index]])
        try:
            return self._name_of(self._read(place))
        except BrokenRecord:
            return f"{os.path.basename(self._path)}:{place}"

    def canonical_name(self, index: int) -> str:
        known = FileNames(self._root)
        return first_name(self._resolve(known, self._name_of(row))[0] for row in self._rows(index))

    def record(self, index: int) -> Record:
        if (count := self._ends[index + 1] - self._ends[index]) > _MAX_ROWS:
            name = self.name(index)
            raise BrokenRecord(f"{name}: {count:,} rows name it; at most {_MAX_ROWS:,} are read")
        rows = self._rows(index)
        name = self._name_of(first := next(rows))
        parts = self._captions_in(name, itertools.chain([first], rows))
        media = MediaFile(path=self._find(name), suffix=suffix_of(name))
        return Record(name=name, captions=joined_captions(name, parts), media=media)

    def _captions_in(self, name: str, rows: Iterator[dict]) -> Iterator[tuple[str, ...]]:
        for row in rows:
            column = next((column for column in self._caption_columns if column in row), "")
            try:
                yield captions_from_value(row.get(column))
            except Exception as error:  # of many kinds: whatever a stranger's row may cause
                why = printable(error, 200) or type(error).__name__
                raise BrokenRecord(f"{name}: {why} in {column}") from error

    def _name_in(self, row: dict) -> str | None:
        column = next((column for column in self._video_columns if column in row), "")
        value = row.get(column)
        if value in (None, "") or isinstance(value, list | dict):
            return None
        if column != WEBVID_ID:
            return str(value)
        folder = str(row.get(WEBVID_FOLDER) or "")
        return f"{folder}/{value}.mp4" if folder else f"{value}.mp4"

    def _name_of(self, row: dict) -> str:
        """The name in a row that is listed."""
        name = self._name_in(row)
        if name is None:
            raise BrokenRecord(f"{self._path}: has changed since its rows were listed")
        return name

    def _resolve(self, known: FileNames, name: str) -> tuple[str, int | None]:
        """As `FileNames.resolve`; WebVid's names are canonical wherever the files lie."""
        if WEBVID_ID not in self._video_columns:
            return known.resolve(name)
        found = (known.resolve(place)[1] for place in self._places_of(name))
        file = next((file for file in found if file is not None), None)
        return posixpath.normpath(name), file

    def _places_of(self, name: str) -> list[str]:
        """Where below the root a file may lie, best first: WebVid's in several places."""
        is_webvid = WEBVID_ID in self._video_columns
        places = (name, f"videos/{name}", os.path.basename(name)) if is_webvid else (name,)
        if self._fence is None:
            return [*places]
        return [p for p in places if not leads_outside(os.path.join(self._root, p), self._fence)]

    def _find(self, name: str) -> str:
        paths = [os.path.join(self._root, place) for place in self._places_of(name)]
        if not paths:
            raise BrokenRecord(f"{name}: leads outside of {self._fence}")
        return next(filter(os.path.isfile, paths), paths[0])

    def _rows(self, index: int) -> Iterator[dict]:
        places = self._places[self._ends[index] : self._ends[index + 1]]
        return map(self._read, places.tolist())

    def _read(self, place: int) -> dict:
        try:
            with open(self._path, "rb") as file:
                file.seek(place)
                if suffix_of(self._path) in (".jsonl", ".ndjson"):
                    return dict(json.loads(file.readline(MAX_TEXT + 1)))
                cells = next(csv.reader(_Counted(file), delimiter=_delimiter(self._path)))
                return dict(zip(self._columns, cells, strict=False))
        except Exception as error:  # of many kinds: the table is no longer what it was
            why = printable(error, 200) or "it has ended"
            raise BrokenRecord(f"{self._path}: a row cannot be read again ({why})") from error


def _rows(path: str, wanted: Collection[str | None]) -> Iterator[tuple[int, Any]]:
    """First `(0, columns)`, then place in bytes and row; a string says what is wrong with one."""
    with open(path, "rb") as file:
        if suffix_of(path) in (".jsonl", ".ndjson"):
            yield from _json_rows(file, wanted)
            return
        place = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        columns, budget = None, _MAX_AGAIN * os.path.getsize(path)
        while True:  # again after every row that is no row
            file.seek(place)
            lines = _Counted(file)
            try:
                for cells in csv.reader(lines, delimiter=_delimiter(path), strict=True):
                    count = len(cells if columns is None else columns)
                    if any(_is_row(line, path, count) for line in lines.taken()[1:]):
                        raise csv.Error("they hold another row")
                    if columns is None:
                        columns = [cell.strip() for cell in cells]
                        yield 0, columns
                    elif cells:
                        yield place, _row(columns, cells)
                    place = lines.position
                return
            except (csv.Error, ValueError) as error:
                budget -= lines.position - place
                if columns is None:
                    raise
                if budget < 0:
                    raise csv.Error("too many of its quotes do not close") from error
                said = str(error)
                if isinstance(error, csv.Error):
                    said = f"has quotes that do not close or stand in the middle ({error})"
                yield place, "is not UTF-8" if isinstance(error, UnicodeError) else said
                file.seek(place)
                place = next((end for _, end in _lines(file)), place)


def _row(columns: list[str], cells: list[str]) -> dict | str:
    if len(cells) != len(columns):
        what = "more" if len(cells) > len(columns) else "fewer"
        return (
            f"has {what} cells ({len(cells)}) than the head line ({len(columns)}); a cell that "
            'holds the delimiter needs "quotes"'
        )
    return dict(zip(columns, cells, strict=True))


def _is_row(line: str, path: str, count: int) -> bool:
    """Whether a line of a cell could be a row: it has `count` cells, and one names a file."""
    line = line.replace("\r", " ")  # at which a reader stops
    cells = next(csv.reader([line], delimiter=_delimiter(path)), [])
    return len(cells) >= count and any(suffix_of(x.strip()) in MEDIA_SUFFIXES for x in cells)


def _json_rows(file: IO[bytes], wanted: Collection[str | None]) -> Iterator[tuple[int, Any]]:
    """The columns of JSON lines are those of any row."""
    columns: dict[str, None] = {}
    for _, row in _json_objects(file):
        for name in row if isinstance(row, dict) else ():
            if name in wanted or len(columns) < _MAX_COLUMNS:
                columns[name] = None
    if file.tell():
        yield 0, list(columns)
    file.seek(0)
    yield from _json_objects(file)


def _json_objects(file: IO[bytes]) -> Iterator[tuple[int, dict | str]]:
    place = 0
    for line, end in _lines(file):
        if len(line) > MAX_TEXT:
            yield place, f"has more than {MAX_TEXT:,} bytes"
        elif line.strip():
            try:
                row = json.loads(line)
                row = row if isinstance(row, dict) else "is not a JSON object"
            except Exception as error:  # of many kinds: no text, huge numbers, deep nests
                row = f"is not JSON: {printable(error, 100)}"
            yield place, row
        place = end


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines and where they end; of one of more than `MAX_TEXT` bytes the beginning alone."""
    end = file.tell()
    while line := file.readline(MAX_TEXT + 1):
        rest, end = line, end + len(line)
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_TEXT)):
            end += len(rest)
        yield line, end


class _Counted:
    """Lines of text, and in `position` where the last one ends.

    Raises:
      ValueError: One is not UTF-8, or a row is too long.
    """

    def __init__(self, file: IO[bytes]):
        self.position = file.tell()
        self._lines = _lines(file)
        self._taken: list[str] = []
        self._room = MAX_TEXT

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line, self.position = next(self._lines)
        self._room -= len(line)
        if self._room < 0:
            raise ValueError(f"has more than {MAX_TEXT:,} bytes, or quotes that do not close")
        self._taken.append(line.decode())
        return self._taken[-1]

    def taken(self) -> list[str]:
        """The lines since the last call, which are a row."""
        lines, self._taken, self._room = self._taken, [], MAX_TEXT
        return lines


def _delimiter(path: str) -> str:
    return "\t" if suffix_of(path) == ".tsv" else ","


def _told(columns: Sequence[str]) -> str:
    return ", ".join(printable(name, 60) for name in columns[:50])


def _known_column(path: str, columns: list[str], given: str) -> tuple[str, ...]:
    if given not in columns:
        raise UserError(f"{path} has no column {given!r}; it has {_told(columns)}")
    return (given,)


def _find_video_columns(path: str, columns: list[str], given: str | None) -> tuple[str, ...]:
    if given is not None:
        return _known_column(path, columns, given)
    found = [name for name in VIDEO_FIELDS if name in columns]
    found = found or [name for name in columns if name == WEBVID_ID]
    if not found:
        raise UserError(
            f"{path}: which column names the file? Give it as video_column; there are "
            f"{_told(columns)}"
        )
    return tuple(found)


def _find_caption_columns(path: str, columns: list[str], given: str | None) -> tuple[str, ...]:
    if given == "":
        return ()
    if given is not None:
        return _known_column(path, columns, given)
    found = [name for name in CAPTION_FIELDS if name in columns]
    if not found:
        raise UserError(
            f"{path}: which column holds the caption? Give it as caption_column ('' for none); "
            f"there are {_told(columns)}"
        )
    # `name` is WebVid's caption, but mostly the name of something where there is another column.
    return tuple(found if found == ["name"] else (name for name in found if name != "name"))

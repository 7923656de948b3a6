"""The zip archives that `torch.save` writes, checked before anything is unpacked from them."""

import pathlib
import struct
import zipfile

from convert.engine.pickles import MAX_PICKLE
from dicode_jax.errors import UserError, printable

_MAX_TABLE = 1 << 24  # bytes that say what is in an archive; 60 for every tensor
_NOTE, _MAX_NOTE = "converter", 1000  # name of the entry, bytes
_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"


def check(path: pathlib.Path) -> None:
    """Refuses anything but the plain zip archive that `torch.save` writes.

    Raises:
      UserError: It is none, cannot be read, or claims more than it holds.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head[:2] != b"PK":
            raise UserError(
                f"{path} is not a torch file of PyTorch 1.6 or later"
                + (" (it is empty)" if not head else "; save it again, or take the safetensors")
            )
        entries = _entries(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    names = [entry.filename.lower() for entry in entries]  # torch looks for them so
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path} is a TorchScript program, not weights: save the state dict of what "
            "torch.jit.load gives, with torch.save"
        )
    tables = [entry for entry in entries if entry.filename.lower().endswith("/data.pkl")]
    if len(set(names)) != len(names) or len(tables) != 1:
        raise UserError(f"{path} is a zip archive, but not one that torch.save wrote")
    if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
        raise UserError(f"{path} holds compressed entries, which torch.save never writes: refused")
    sizes = sum(entry.file_size for entry in entries)
    if sizes > path.stat().st_size or tables[0].file_size > MAX_PICKLE:
        raise UserError(f"{path} claims implausible sizes ({sizes} bytes of content): refused")


def _entries(path: pathlib.Path) -> list[zipfile.ZipInfo]:
    try:
        if (size := _table_size(path)) > _MAX_TABLE:
            raise zipfile.BadZipFile(f"its table of contents claims {size} bytes")
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        reason = printable(error, 160)
        raise UserError(f"{path} is truncated or damaged: {reason}") from error


def _table_size(path: pathlib.Path) -> int:
    """Bytes of the table of contents, which `zipfile` would read whatever their number.

    Only an archive without a comment passes, as `torch.save` writes it.
    """
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 98, 0))
        tail = file.read().rjust(98, b"\0")
    if tail[76:80] != _END:
        raise zipfile.BadZipFile("it does not end as a zip archive of torch does")
    if tail[56:60] != _LOCATOR64:
        return struct.unpack_from("<I", tail, 88)[0]
    if tail[:4] != _END64:
        raise zipfile.BadZipFile("its end is not where it should be")
    return struct.unpack_from("<Q", tail, 40)[0]


def spans(path: pathlib.Path) -> list[tuple[int, int, str, int]]:
    """(start, size, name, CRC-32) of the content of every entry of a zip archive, in order."""
    out, end = [], 0
    with path.open("rb") as file:
        for entry in sorted(_entries(path), key=lambda e: e.header_offset):
            file.seek(entry.header_offset)
            head = file.read(30)
            if len(head) < 30 or head[:4] != b"PK\x03\x04" or entry.header_offset < end:
                name = printable(entry.filename[:100])
                raise UserError(f"{path} is damaged: {name} is not where it should be")
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            end = start + entry.file_size
            out.append((start, entry.file_size, entry.filename, entry.CRC))
    return out


def add_note(path: pathlib.Path, text: str) -> None:
    """Adds an entry to a file that `torch.save` wrote, which torch passes over."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{folder}/{_NOTE}", text)


def read_note(path: pathlib.Path) -> str:
    """What `add_note` added; empty for any other file."""
    try:
        notes = [e for e in _entries(path) if e.filename.endswith(f"/{_NOTE}")]
        with zipfile.ZipFile(path) as archive:
            return "".join(archive.read(e).decode() for e in notes if e.file_size < _MAX_NOTE)
    except Exception:  # whatever it is, it has no note
        return ""

"""Pictures: which formats are opened, that no other program is started, and how errors read."""

import ast
import io
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from media_files import greys, mp4_bytes, number_of, write_tar
from PIL import EpsImagePlugin, Image

from dicode_jax import cli
from dicode_jax.data import clips
from dicode_jax.data.config import DataConfig
from dicode_jax.data.inspect import inspect
from dicode_jax.data.records import IMAGE_SUFFIXES, BrokenRecord, MediaBytes, Record
from dicode_jax.data.sources import array_record as sources_array_record
from dicode_jax.data.sources.open import open_source
from dicode_jax.errors import UserError
from dicode_jax.media import picture as pictures
from dicode_jax.media import video

ROOT = pathlib.Path(__file__).parents[2]
POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
showpage
%%EOF
"""


def rng():
    return np.random.default_rng(0)


def encoded(kind, number=4):
    file = io.BytesIO()
    Image.fromarray(greys(number + 1)[number]).save(file, kind)
    return file.getvalue()


def picture(data, suffix=".png"):
    return Record(name=f"x{suffix}", captions=(), media=MediaBytes(data=data, suffix=suffix))


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A file that is there as soon as Ghostscript was started."""
    folder, mark = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return mark


def data_set(folder, form, suffix):
    """A data set with one picture, which is PostScript, and one video."""
    folder.mkdir()
    files = {f"a{suffix}": POSTSCRIPT, "b.mp4": mp4_bytes(greys(4))}
    if form == "tar":
        write_tar(folder / "s.tar", files.items())
        return folder
    if form == "array_record":
        packed = [
            sources_array_record.pack(name, [], os.path.splitext(name)[1], data)
            for name, data in files.items()
        ]
        sources_array_record.write_shard(folder / "x.array_record", packed)
        return folder
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if form == "folder":
        return folder
    (folder / "t.csv").write_text("path,caption\n" + "".join(f"{name},c\n" for name in files))
    return folder / "t.csv"


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
@pytest.mark.parametrize("form", ["folder", "table", "tar", "array_record"])
def test_a_picture_starts_no_program(tmp_path, started, capsys, form, suffix):
    path = data_set(tmp_path / "data", form, suffix)
    source = open_source(DataConfig(path=str(path)), split="all")
    record = next(r for r in map(source.record, range(2)) if r.is_image)
    with pytest.raises(BrokenRecord, match="is not a picture: it holds no AVIF, BMP, ") as caught:
        clips.read_frame(record, DataConfig(), 16, rng())
    assert str(caught.value).startswith(record.name)
    assert list(inspect(DataConfig(path=str(path))).broken) == [record.name]
    assert cli.main(["data", "inspect", str(path)]) == 0
    assert "is not a picture" in capsys.readouterr().out
    assert not started.exists()


def test_pillow_itself_would_start_one(started):
    """So that the test above can fail."""
    with pytest.raises(OSError, match="cannot"), Image.open(io.BytesIO(POSTSCRIPT)) as image:
        image.load()
    assert started.exists()


def test_the_formats_are_those_of_the_suffixes():
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in IMAGE_SUFFIXES} == set(pictures.FORMATS)


@pytest.mark.parametrize("kind", [*pictures.FORMATS, "MPO"])
def test_a_picture_is_read_whatever_its_name_says(kind):
    got = clips.read_frame(picture(encoded(kind), ".jpg"), DataConfig(), 16, rng())
    assert number_of(got["image"]) == 4


@pytest.mark.parametrize(
    "kind", ["DDS", "GIF", "ICO", "JPEG2000", "PCX", "PDF", "PPM", "SGI", "TGA"]
)
def test_other_formats_are_refused_by_name(kind):
    with pytest.raises(BrokenRecord, match=r"^x.png is not a picture: it holds no .* or WEBP$"):
        clips.read_frame(picture(encoded(kind)), DataConfig(), 16, rng())


@pytest.mark.parametrize(
    "error",
    [
        *(NotImplementedError("DDS 999"), MemoryError(), struct.error("too short"), EOFError()),
        *(zlib.error("bad"), SyntaxError("two\nlines"), KeyError(3), RecursionError("deep")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    (tmp_path / "a.webp").write_bytes(encoded("WEBP"))
    for module in ("PngImagePlugin.PngImageFile", "WebPImagePlugin.WebPImageFile"):
        monkeypatch.setattr(f"PIL.{module}.load", fail)
    reads = (
        lambda: clips.read_frame(picture(encoded("PNG")), DataConfig(), 16, rng()),
        lambda: video.read_video(tmp_path / "a.webp"),
    )
    for read in reads:
        with pytest.raises(UserError, match=r"cannot be read as a picture \(.+\)$") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pixels", [1536, 1000, 100]
)  # as many as there are is fine; then a warning
@pytest.mark.filterwarnings("default")  # as users have it
def test_a_picture_with_too_many_pixels_is_one_line(monkeypatch, recwarn, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    read = lambda: clips.probe(picture(encoded("PNG")))  # noqa: E731
    if pixels == 1536:
        assert (read().width, read().height) == (48, 32)
    else:
        with pytest.raises(BrokenRecord, match=r"^x.png .*1536 pixels\) exceeds limit of \d+ "):
            read()
    assert not recwarn.list


def test_every_picture_is_opened_with_the_one_list():
    folders = ("dicode_jax", "train", "convert", "configs", "scripts", "benchmarks")
    calls = []
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                raise AssertionError(f"{path}: call Image.open by its whole name")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls.append((path.relative_to(ROOT).as_posix(), ast.unparse(node)))
    assert calls == [("dicode_jax/media/picture.py", "Image.open(file, formats=FORMATS)")]

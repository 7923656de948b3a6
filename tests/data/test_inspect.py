"""`dicode data inspect`: what it counts and names."""

import numpy as np
import pytest
from media_files import greys, mp4_bytes
from PIL import Image

from dicode_jax import cli
from dicode_jax.data import inspect
from dicode_jax.data.config import DataConfig


@pytest.fixture
def folder(tmp_path):
    """Five videos of 0.5, 1, 2, 2 and 3.5 s, two pictures, two broken files."""
    root = tmp_path / "data"
    root.mkdir()
    for index, length in enumerate((4, 8, 16, 16, 28)):
        (root / f"{index}.mp4").write_bytes(mp4_bytes(greys(length)))
        (root / f"{index}.txt").write_text("a b c\n" * (index % 2) + "one two three four five six")
    for index in (5, 6):
        Image.fromarray(greys(1)[0]).save(root / f"{index}.png")
    (root / "lonely.caption").touch()
    (root / "0.srt").touch()
    (root / "7.mp4").touch()
    (root / "8.mp4").write_bytes(mp4_bytes(greys(16))[:-900])
    return root


def test_everything_is_counted_and_the_broken_are_named(folder):
    found = inspect.inspect(DataConfig(path=str(folder), validation=0.0))
    assert (found.num_records, found.num_read) == (9, 9)
    assert list(found.videos) == [f"{i}.mp4" for i in range(5)]
    lengths = [info.duration for info in found.videos.values()]
    np.testing.assert_allclose(lengths, [0.5, 1.0, 2.0, 2.0, 3.5])
    assert set(found.pictures) == {"5.png", "6.png"}
    assert set(found.broken) == {"7.mp4", "8.mp4"}
    text = "\n".join(inspect.report(found))
    assert "lengths     0.5 to 3.5 s, median 2.0 s" in text
    assert "too short   2 for 16 frames, 8 a second; 1 of them refused" in text
    assert "sizes       48 x 32 (7)" in text
    assert "captions    7; 4 records without, 2 with several; 3 to 6 words, median 6" in text
    assert "7.mp4: is empty" in text
    assert "8.mp4" in text
    assert "left out\n  1 captions without" in text
    assert "lonely.caption\n  1 files of kinds that are not read: .srt (1)" in text


def test_the_command_prints_and_draws(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert cli.main(["data", "inspect", str(folder), "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "broken      2" in out
    with Image.open(sheet) as image:
        assert image.height > 7 * inspect.SHEET_HEIGHT  # a row for each of the seven
        assert np.asarray(image).std() > 1
    assert cli.main(["data", "inspect", str(folder), "--limit", "3"]) == 0
    assert "9 records, 3 of them read" in capsys.readouterr().out


def test_a_sheet_never_replaces_a_picture_of_the_data_set(tmp_path, capsys):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    before = picture.read_bytes()
    assert cli.main(["data", "inspect", str(tmp_path), "--sheet", str(picture)]) == 2
    assert "is read by this command" in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_names_and_captions_of_strangers_forge_no_line(tmp_path, monkeypatch, capsys):
    root = tmp_path / "\x1b[31mdata"
    root.mkdir()
    forged = ["a\x1b]0;mine\x07.mp4", "b\nbroken      0\nfake.mp4", "c\u202e" + "x" * 200 + ".mp4"]
    for name in forged:
        (root / name).write_bytes(mp4_bytes(greys(16)) if name[0] == "a" else b"no video")
        (root / name).with_suffix(".txt").write_text("\x1b[2J" + "y" * 2**19)
    (root / "d\n\x1b[2J.cls\x1b").touch()
    labels = []
    monkeypatch.setattr(inspect, "contact_sheet", lambda *_, **said: labels.extend(said["labels"]))
    assert cli.main(["data", "inspect", str(root), "--sheet", str(tmp_path / "x.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and len(line) < 500 for line in [*lines, *labels])
    assert [line for line in lines if line.startswith("broken")] == ["broken      2"]
    assert labels[0].startswith(r"a\x1b]0;mine\x07.mp4: \x1b[2Jyyy")
    (tmp_path / "t.csv").write_text(f"path,caption\n{'x/' * 2000}a.mp4,c\n{'y' * 5000}.mp4,c\n")
    assert cli.main(["data", "inspect", str(tmp_path / "t.csv")]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 600


def test_a_config_file_says_what_to_look_at(folder, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "import types\nfrom dicode_jax.data.config import DataConfig\n"
        f"data = DataConfig(path={str(folder)!r})\n"
        "def get_config():\n    return types.SimpleNamespace(data=data)\n"
    )
    assert cli.main(["data", "inspect", str(config), "--limit", "1"]) == 0
    assert str(folder) in capsys.readouterr().out
    config.write_text("def get_config():\n    return 3")
    assert cli.main(["data", "inspect", str(config)]) == 2
    assert "configures no data set" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "empty.mp4").touch()
    for argv, said in [
        ([str(tmp_path / "gone")], "does not exist"),
        ([str(tmp_path), "--sheet", str(tmp_path / "x.png")], "nothing in"),
        ([str(tmp_path), "--limit", "0"], "at least 1"),
        ([str(tmp_path), "--kind", "tar"], "there are no shards"),
    ]:
        assert cli.main(["data", "inspect", *argv]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()

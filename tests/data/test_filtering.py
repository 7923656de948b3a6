"""`dicode data filter`: what it measures, leaves out and lists for captions."""

import csv
import json
import sys

import numpy as np
import pytest
from media_files import write
from PIL import Image, ImageDraw, ImageFont

from dicode_jax import cli
from dicode_jax.data import captions, filtering
from dicode_jax.data.config import DataConfig
from dicode_jax.data.filtering import FilterConfig, Measured, Video
from dicode_jax.data.sources.open import open_source
from dicode_jax.errors import UserError

pytest.importorskip("imagehash")

KINDS = ("broken", "dark", "moving", "still", "text", "twin")


def texture(seed, height=96, width=160):
    """A smooth random picture, uint8 [h, w, 3], whose brightness is about a half."""
    small = np.random.default_rng(seed).integers(60, 200, (6, 10, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def moving(seed, count=16):
    return np.stack([np.roll(texture(seed), 5 * i, axis=1) for i in range(count)])


def with_text(frames):
    found = []
    for frame in frames:
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        draw.text((8, 60), "WHAT PEOPLE SAY", (255,) * 3, ImageFont.load_default(14),
                  stroke_width=1, stroke_fill=(0, 0, 0))  # fmt: skip
        found.append(np.asarray(image))
    return np.stack(found)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip of each kind."""
    root = tmp_path_factory.mktemp("clips")
    write(root / "moving.mp4", moving(0))
    write(root / "twin.mp4", moving(0), crf="30")
    write(root / "still.mp4", np.stack([texture(1)] * 16))
    write(root / "dark.mp4", moving(2) // 16)
    write(root / "text.mp4", with_text(moving(3)))
    (root / "broken.mp4").write_bytes((root / "moving.mp4").read_bytes()[:-900])
    return root


@pytest.fixture
def folder(made, tmp_path):
    root = tmp_path / "clips"
    root.mkdir()
    for path in made.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    return root


def report(folder):
    lines = map(json.loads, (folder / "filter.jsonl").read_text().splitlines())
    return {line["video"].removesuffix(".mp4"): line for line in lines}


def test_each_kind_is_left_out_for_its_reason(folder, capsys):
    assert cli.main(["data", "filter", str(folder)]) == 0
    found = report(folder)
    assert tuple(found) == KINDS
    assert {name: list(one["reasons"]) for name, one in found.items()} == {
        "broken": ["broken"], "dark": ["dark"], "moving": [], "still": ["still"],
        "text": ["text"], "twin": ["duplicate"],
    }  # fmt: skip
    assert found["twin"]["reasons"] == {"duplicate": "of moving.mp4"}
    assert [name for name, one in found.items() if one["kept"]] == ["moving"]
    out = capsys.readouterr().out.splitlines()
    assert out[:6] == [
        "broken      1", "still       1", "dark        1", "text        1", "duplicate   1",
        "kept        1 of 6",
    ]  # fmt: skip
    assert (folder / "captions.jsonl").read_text() == '{"video": "moving.mp4", "caption": ""}\n'


def test_what_was_measured_is_not_measured_again(folder, monkeypatch):
    assert cli.main(["data", "filter", str(folder)]) == 0
    before = report(folder)
    with (folder / "filter.jsonl").open("a") as file:
        file.write('{"video": "still.mp4", "by')  # torn by a kill
    looked_at, measure = [], filtering.measure
    monkeypatch.setattr(
        filtering, "measure", lambda video, *a: looked_at.append(video.name) or measure(video, *a)
    )
    write(folder / "dark.mp4", moving(4))
    assert cli.main(["data", "filter", str(folder), "--max-text", "1", "--max-distance", "0"]) == 0
    assert looked_at == ["dark.mp4"]
    after = report(folder)
    assert [name for name, one in after.items() if one["kept"]] == [
        "dark",
        "moving",
        "text",
        "twin",
    ]
    assert {k: after["text"][k] for k in ("hash", "motion", "text")} == {
        k: before["text"][k] for k in ("hash", "motion", "text")
    }


def test_a_line_that_a_kill_has_torn_is_written_anew(folder):
    videos, path = filtering.videos_of(DataConfig(path=str(folder))), folder / "filter.jsonl"
    whole = filtering.measure_all(videos, path)
    before = path.read_bytes()
    path.write_bytes(before[:-9])
    assert filtering.measure_all(videos, path) == whole
    assert path.read_bytes() == before


def test_captions_that_are_there_stay_and_the_table_trains(folder):
    (folder / "moving.txt").write_text("what moves\n")
    table = folder / "captions.jsonl"
    assert cli.main(["data", "filter", str(folder), "--max-text", "1"]) == 0
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert rows[0] == {"video": "moving.mp4", "caption": "what moves"}
    table.write_text("".join(json.dumps(row | {"caption": row["caption"] or "said"}) + "\n"
                             for row in rows))  # fmt: skip
    assert cli.main(["data", "filter", str(folder), "--max-text", "1"]) == 0
    source = open_source(DataConfig(path=str(table)), split="all")
    records = [source.record(i) for i in range(len(source))]
    assert {record.name: record.captions for record in records} == {
        "moving.mp4": ("what moves",), "text.mp4": ("said",)
    }  # fmt: skip


def test_a_caption_is_never_lost(folder, tmp_path, capsys):
    assert cli.main(["data", "filter", str(folder), "--max-text", "1"]) == 0
    table = folder / "captions.jsonl"
    table.write_text('{"video": "text.mp4", "caption": "said"}\n')
    assert cli.main(["data", "filter", str(folder)]) == 2
    assert "has captions of 1 videos that are not kept now" in capsys.readouterr().err
    assert "said" in table.read_text()
    other = tmp_path / "other.csv"
    assert cli.main(["data", "filter", str(folder), "--captions", str(other)]) == 0
    assert list(csv.reader(other.open())) == [["video", "caption"], ["clips/moving.mp4", ""]]


def test_a_table_that_is_filtered_stays_as_it_is(folder, tmp_path, capsys):
    names = ("moving.mp4", "still.mp4")
    rows = [{"video": name, "caption": "", "licence": "mine"} for name in names]
    table = folder / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = table.read_text()
    assert cli.main(["data", "filter", str(table)]) == 2
    assert "captions.jsonl is read by this command" in capsys.readouterr().err
    assert table.read_text() == before
    assert not (folder / "filter.jsonl").exists()
    other = tmp_path / "kept.jsonl"
    assert cli.main(["data", "filter", str(table), "--captions", str(other)]) == 0
    assert table.read_text() == before
    assert other.read_text() == '{"video": "clips/moving.mp4", "caption": ""}\n'


def test_what_is_kept_is_linked_and_nothing_is_replaced(folder, tmp_path, capsys):
    (folder / "sub").mkdir()
    (folder / "moving.mp4").rename(folder / "sub/moving.mp4")
    out = tmp_path / "kept"
    argv = ["data", "filter", str(folder), "--out", str(out)]
    assert cli.main(argv) == 0
    assert (out / "sub/moving.mp4").samefile(folder / "sub/moving.mp4")
    assert {path.name for path in out.iterdir()} == {"sub", "filter.jsonl", "captions.jsonl"}
    assert '"sub/moving.mp4"' in (out / "captions.jsonl").read_text()
    assert not list(folder.glob("*.jsonl"))
    assert cli.main(argv) == 0  # all is there
    assert cli.main([*argv, "--min-motion", "1"]) == 2
    assert "which is not kept; name a new folder" in capsys.readouterr().err


def test_nothing_outside_of_the_fence_is_linked(folder, tmp_path):
    (folder / "moving.mp4").rename(tmp_path / "outside.mp4")
    (folder / "moving.mp4").symlink_to(tmp_path / "outside.mp4")
    argv = ["data", "filter", str(folder), "--out", str(tmp_path / "kept")]
    assert cli.main([*argv, "--root", str(folder)]) == 0
    assert report(tmp_path / "kept")["twin"]["kept"]
    assert {path.stem for path in (tmp_path / "kept").glob("*.mp4")} == {"twin"}


def test_another_file_system_gets_copies(folder, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(filtering.os, "link", no_links)
    videos = [Video(name="moving.mp4", path=str(folder / "moving.mp4"))]
    assert filtering.link_all(videos, tmp_path / "kept") == 1
    assert filtering.link_all(videos, tmp_path / "kept") == 0
    copy = tmp_path / "kept/moving.mp4"
    assert copy.read_bytes() == (folder / "moving.mp4").read_bytes()
    (folder / "moving.mp4").write_bytes(b"another")
    with pytest.raises(UserError, match="is there and another file"):
        filtering.link_all(videos, tmp_path / "kept")
    outside = [Video(name="../x.mp4", path=str(folder / "moving.mp4"))]
    with pytest.raises(UserError, match="outside"):
        filtering.link_all(outside, tmp_path / "kept")


def measured(name, bits, **other):
    whole = {"bytes": 1, "modified": 1, "motion": 0.1, "light": 0.5}
    return Measured(video=name, hash=f"{bits:048x}", **(whole | other))


def test_a_bound_itself_is_kept():
    one = measured("a", 5, motion=0.0, light=0.25, text=0.5)
    bounds = {"min_motion": 0.0, "min_light": 0.25, "max_text": 0.5}
    assert filtering.judge([one], FilterConfig(**bounds))[0].is_kept
    for name, other in (("min_motion", 0.01), ("min_light", 0.26), ("max_text", 0.49)):
        assert not filtering.judge([one], FilterConfig(**bounds | {name: other}))[0].is_kept


def test_motion_and_light_are_shares_of_white_and_one_jump_is_no_motion():
    levels = [0, 51, 102, 153, 204, 255, 0, 51]
    pictures = [Image.new("L", (160, 96), level) for level in levels]
    assert filtering._motion(pictures) == pytest.approx(0.2)  # the median: the jump is of 1
    assert filtering._motion(pictures[:1]) == 0


def test_duplicates_are_those_within_so_many_bits():
    rng = np.random.default_rng(0)
    bits = int.from_bytes(rng.bytes(24), "big")
    for count in range(16):
        flipped = bits
        for place in rng.choice(192, count, replace=False):
            flipped ^= 1 << int(place)
        for most in (0, 7, 11):
            verdicts = filtering.judge(
                [measured("a", bits), measured("b", flipped)], FilterConfig(max_distance=most)
            )
            assert verdicts[1].is_kept == (count > most)


def test_a_video_that_is_left_out_is_nobodys_original():
    verdicts = filtering.judge([measured("a", 5, light=0.0), measured("b", 5)], FilterConfig())
    assert [list(verdict.reasons) for verdict in verdicts] == [["dark"], []]


def test_text_counts_where_it_stays_and_texture_does_not():
    rng = np.random.default_rng(0)
    plain = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in moving(3, 8)])
    said = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in with_text(moving(3, 8))])
    assert filtering.text_share(plain) == 0
    assert filtering.text_share(said) > 0.02
    passing = np.concatenate([said[:3], plain[3:]])  # in a minority of the frames
    assert filtering.text_share(passing) == 0
    noise = rng.integers(100, 150, plain.shape).astype(np.uint8)
    assert filtering.text_share(noise) == 0
    assert filtering.text_share(plain[:, :7]) == 0  # lower than a cell


def test_a_report_of_something_else_is_left_alone(folder, capsys):
    (folder / "filter.jsonl").write_text('{"mine": 1}\n')
    assert cli.main(["data", "filter", str(folder)]) == 2
    assert "is no report of `dicode data filter`" in capsys.readouterr().err
    assert (folder / "filter.jsonl").read_text() == '{"mine": 1}\n'


def test_a_broken_caption_counts_as_a_broken_video(folder):
    (folder / "moving.txt").write_bytes(b"\xff")
    assert cli.main(["data", "filter", str(folder)]) == 0
    assert "UTF-8" in report(folder)["moving"]["reasons"]["broken"] or "utf-8" in str(
        report(folder)
    )
    assert report(folder)["twin"]["kept"]


def test_shards_and_impossible_bounds_are_refused(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match="give a folder or a table"):
        filtering.videos_of(DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="max_distance"):
        FilterConfig(max_distance=12)
    with pytest.raises(UserError, match="min_light"):
        FilterConfig(min_light=float("nan"))


def test_without_imagehash_one_line_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert cli.main(["data", "filter", str(folder)]) == 2
    assert 'pip install "dicode-jax[data]"' in capsys.readouterr().err
    assert not (folder / "filter.jsonl").exists()


def test_a_damaged_table_of_captions_is_not_replaced(folder):
    (folder / "captions.jsonl").write_text('{"video": "moving.mp4", "caption": "a"}\n{"vid')
    with pytest.raises(UserError, match="mend the table"):
        captions.known_captions(folder / "captions.jsonl")

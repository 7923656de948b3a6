"""A video in memory: an array where one is wanted, a file that says how it was made, and shown."""

import base64
import re

import numpy as np
import pytest
from PIL import Image

from dicode_jax.errors import UserError
from dicode_jax.media import video
from dicode_jax.media.given import read_frames, read_image, read_images
from dicode_jax.media.videos import Video, Videos
from dicode_jax.media.writer import VideoWriter

FRAMES = np.arange(2 * 4 * 6 * 8 * 3, dtype=np.uint8).reshape(2, 4, 6, 8, 3)
RECORD = {"dicode_jax": "0.1", "prompt": 'a "ß"\n\x1b', "seed": 3, "settings": {"eta": 0.5}}


def painted(i=0, **known):
    given = {"fps": 4.0, "prompt": f"prompt {i}", "seed": i, "record": RECORD}
    return Video(frames=FRAMES[i], **given | known)


def test_a_video_is_its_frames_where_an_array_is_wanted():
    one, both = painted(), Videos([painted(0), painted(1)])
    np.testing.assert_array_equal(one, FRAMES[0])
    assert np.asarray(one) is one.frames
    np.testing.assert_array_equal(one[1:3, 2], FRAMES[0, 1:3, 2])
    np.testing.assert_array_equal(one - FRAMES[1].astype(int), FRAMES[0] - FRAMES[1].astype(int))
    assert (one.shape, one.ndim, one.dtype, len(one)) == ((4, 6, 8, 3), 4, np.uint8, 4)
    np.testing.assert_array_equal(both, FRAMES)
    np.testing.assert_array_equal(both[1, 2:], FRAMES[1, 2:])
    assert np.asarray(both, np.float32).dtype == np.float32
    assert (both.shape, both.ndim, len(both)) == ((2, 4, 6, 8, 3), 5, 2)
    assert [video.seed for video in both[::-1]] == [1, 0]


def test_a_batch_of_one_is_used_as_its_video_and_a_larger_one_says_so(tmp_path):
    one, both = Videos([painted(1)]), Videos([painted(0), painted(1)])
    assert one.frames is one[0].frames
    assert (one.fps, one.prompt, one.seed, one.tokens, one.record) == (
        4.0, "prompt 1", 1, None, RECORD,
    )  # fmt: skip
    one.save(tmp_path / "a.webp")
    for ask in (lambda: both.frames, lambda: both.seed, lambda: both.save(tmp_path / "b.mp4")):
        with pytest.raises(UserError, match=r"there are 2 videos; take one, such as videos\[0\]"):
            ask()
    assert repr(both).count("4 frames of 8 x 6, 1 s, seed") == 2


def test_saved_files_show_the_frames_and_say_how_they_were_made(tmp_path):
    for suffix in (".mp4", ".gif", ".webp"):
        painted().save(tmp_path / f"a{suffix}")
        read = video.read_video(tmp_path / f"a{suffix}")
        assert read.shape == (4, 6, 8, 3)
        assert read.fps == pytest.approx(4, abs=0.1)
    assert video.probe(tmp_path / "a.mp4").record == RECORD
    assert video.probe(tmp_path / "a.gif").record is None
    painted().save(tmp_path / "a.png")
    assert video.read_record(tmp_path / "a.png") == RECORD
    Image.fromarray(FRAMES[0, 0]).save(tmp_path / "b.png")
    assert video.read_record(tmp_path / "b.png") is None
    with VideoWriter(tmp_path / "grown.mp4", 8, keep=True, record=RECORD) as writer:
        writer.append(FRAMES[0])
        writer.flush()
        writer.append(FRAMES[1])
    assert video.probe(tmp_path / "grown.mp4").record == RECORD
    with pytest.raises(UserError, match=r"write to one of: .mp4, .gif, .webp, .png"):
        painted().save(tmp_path / "a.avi")


@pytest.mark.parametrize("comment", ["a film", "{", '{"other": 1}', '{"dicode_jax": NaN}', "[1]"])
def test_a_comment_of_another_program_is_no_record(tmp_path, comment):
    with VideoWriter(tmp_path / "a.mp4", record=RECORD) as writer:
        writer._record = comment
        writer.append(FRAMES[0])
    assert video.probe(tmp_path / "a.mp4").record is None


def test_a_notebook_shows_each_video_as_h264(tmp_path):
    shown = Videos([painted(i % 2, prompt='<b>"x"') for i in range(10)])._repr_html_()
    assert shown.count("<video ") == 8
    assert shown.endswith(" and 2 more")
    assert "<b>" not in shown
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', shown)[1]
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(data))
    assert len(video.read_video(tmp_path / "a.mp4")) == 4


def test_write_video_takes_one_video_in_any_form(tmp_path):
    path = tmp_path / "a.webp"
    forms = (FRAMES[0], FRAMES[:1], painted(), Videos([painted()]), iter(FRAMES[0]))
    for frames in forms:
        video.write_video(path, frames, fps=5)
        np.testing.assert_array_equal(video.read_video(path), FRAMES[0])
    video.write_video(path, painted())
    assert video.read_video(path).fps == pytest.approx(4, abs=0.1)
    painted().save(tmp_path / "in.mp4")
    video.write_video(tmp_path / "out.mp4", str(tmp_path / "in.mp4"))
    out = video.probe(tmp_path / "out.mp4")
    assert (out.fps, out.num_frames, out.record) == (4, 4, RECORD)
    for frames in (FRAMES, Videos([painted(0), painted(1)])):
        with pytest.raises(UserError, match=r"there are 2 videos; (write|take) one, such as vid"):
            video.write_video(path, frames)
    with pytest.raises(UserError, match="is read by this command"):
        video.write_video(tmp_path / "in.mp4", tmp_path / "in.mp4")
    assert len(video.read_video(tmp_path / "in.mp4")) == 4


def test_images_are_seen_as_their_files_mean_them(tmp_path):
    picture = Image.fromarray(FRAMES[0, 0])
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(FRAMES[0, 0], -1)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(read_image(given), turned)
    np.testing.assert_array_equal(read_image(FRAMES[0, 0]), FRAMES[0, 0])
    clear = np.dstack([FRAMES[0, 0], np.zeros((6, 8), np.uint8)])
    assert (read_image(clear) == 255).all()
    assert read_image(FRAMES[0, 0, :, :, 0])[1, 2].tolist() == [FRAMES[0, 0, 1, 2, 0]] * 3
    both = read_images([FRAMES[0, 0], tmp_path / "a.png"])
    assert [image.shape for image in both] == [(6, 8, 3), (8, 6, 3)]
    assert len(read_images(FRAMES[0])) == 4


def test_frames_are_read_from_whatever_holds_them(tmp_path):
    painted().save(tmp_path / "a.webp")
    pictures = [Image.fromarray(frame) for frame in FRAMES[0]]
    for given in (tmp_path / "a.webp", FRAMES[0], FRAMES[:1], painted(), Videos([painted()])):
        np.testing.assert_array_equal(read_frames(given), FRAMES[0])
    np.testing.assert_array_equal(read_frames(pictures), FRAMES[0])
    assert len(read_frames(tmp_path / "a.webp", fps=8)) == 7


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        (read_image, None, "image is uint8 .*, a picture of Pillow or a path, got None"),
        (read_image, np.zeros((4, 6, 3)), r"got float64 \[4, 6, 3\]"),
        (read_image, np.zeros((0, 6, 3), np.uint8), r"got uint8 \[0, 6, 3\]"),
        (read_image, "no such.png", "no such.png"),
        (read_images, [], "image: the list is empty"),
        (read_frames, FRAMES, r"video: there are 2 videos; give one, such as videos\[0\]"),
        (read_frames, FRAMES[0, 0], r"video is uint8 \[f, h, w, 3\] or a path, got uint8 \[6, 8"),
        (read_frames, "no such.mp4", "there is no file no such.mp4"),
        (read_frames, [[1], [1, 2]], "video is uint8"),
    ],
)
def test_what_is_no_image_and_no_video_is_refused(read, given, message):
    with pytest.raises(UserError, match=message):
        read(given)

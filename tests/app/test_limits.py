"""What is refused, whoever asks: prompts, numbers, and paths that lead out of the folder."""

import dataclasses
import os

import pytest

from dicode_jax.app.limits import Limits, at_most, check_prompt, has_room, own_file, whole
from dicode_jax.errors import UserError

LIMITS = Limits(prompt=10, file_bytes=2**20)


def test_a_prompt_is_one_line_of_text_of_a_length():
    assert check_prompt(" a\ncat ", LIMITS) == "a cat"
    assert check_prompt("x" * 10, LIMITS) == "x" * 10
    assert check_prompt("<script>", LIMITS) == "<script>"  # text, which the page shows as text
    for wrong in ("x" * 11, None, 3, ["a"], {"a": 1}):
        with pytest.raises(UserError, match="prompt"):
            check_prompt(wrong, LIMITS)


def test_numbers_of_a_slider_are_whole_and_within_bounds():
    assert whole("clips", 3.0, 1, 4) == 3
    for wrong in (0, 5, 2.5, float("nan"), float("inf"), "3", None, True, 1e300):
        with pytest.raises(UserError, match=r"clips: want a whole number from 1 to 4"):
            whole("clips", wrong, 1, 4)


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "in.png").write_bytes(b"x")
    (folder / "large.png").write_bytes(b"x" * (LIMITS.file_bytes + 1))
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder_link").symlink_to(tmp_path)
    return folder


def test_an_uploaded_file_is_found(uploads):
    path = uploads / "abc" / "in.png"
    assert own_file(str(path), uploads, LIMITS) == path.resolve()
    path.write_bytes(b"x" * LIMITS.file_bytes)
    assert own_file(path, uploads, LIMITS) == path.resolve()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "pyproject.toml",
        "{uploads}/../secret.png",
        "{uploads}/abc/../../secret.png",
        "{uploads}/link.png",
        "{uploads}/folder_link/secret.png",
        "{uploads}",
        "{uploads}/abc",
        "{uploads}/missing.png",
        "{uploads}2/in.png",
        "http://127.0.0.1/in.png",
        "",
        "a\0b",
        "x" * 5000,
        None,
        7,
        ["/etc/passwd"],
    ],
)
def test_a_path_that_leads_elsewhere_is_refused_and_not_told(uploads, path):
    if isinstance(path, str):
        path = path.format(uploads=uploads)
    with pytest.raises(UserError) as error:
        own_file(path, uploads, LIMITS)
    assert str(error.value) == "this is no file that was uploaded here; upload it again"


def test_a_pipe_is_no_upload(uploads):
    os.mkfifo(uploads / "pipe.png")
    with pytest.raises(UserError, match="no file"):
        own_file(uploads / "pipe.png", uploads, LIMITS)


def test_a_large_file_is_refused_by_its_name_alone(uploads):
    with pytest.raises(UserError, match=r"^large.png has 1.0 MB; at most 1 MB are read$"):
        own_file(uploads / "large.png", uploads, LIMITS)


def test_a_row_ends_in_an_error_at_the_first_item_beyond():
    assert list(at_most(3, "abc", "x")) == ["a", "b", "c"]
    row = at_most(2, iter("abc"), "a.mp4")
    assert [next(row), next(row)] == ["a", "b"]
    with pytest.raises(UserError, match=r"a.mp4 has more than 2 frames"):
        next(row)


def test_a_folder_has_room_until_it_holds_as_much_as_it_may(tmp_path):
    limits = dataclasses.replace(LIMITS, file_bytes=10, stored_bytes=30)
    assert has_room(tmp_path, limits)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(bytes(20))
    assert has_room(tmp_path, limits)
    (tmp_path / "b.png").write_bytes(bytes(1))
    assert not has_room(tmp_path, limits)
    (tmp_path / "deep" / "a.png").unlink()
    assert has_room(tmp_path, limits)

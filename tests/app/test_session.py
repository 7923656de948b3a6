"""What belongs to a visitor, and when it goes."""

import copy

import pytest

from dicode_jax.app.session import Made, Session, file_stem
from dicode_jax.errors import UserError


def made(job, prompt="red"):
    video = job.folder / "video.mp4"
    video.touch()
    return Made(
        prompt=prompt, seed=0, model="grey", said="", folder=job.folder, video=video, picture=video
    )


def test_the_newest_comes_first_and_the_oldest_goes_with_its_files(tmp_path):
    session, jobs = Session(tmp_path, kept=2), []
    for prompt in ("one", "two", "three"):
        jobs.append(session.begin())
        session.end(jobs[-1], made(jobs[-1], prompt))
    assert [one.prompt for one in session.history] == ["three", "two"]
    assert [job.folder.exists() for job in jobs] == [False, True, True]


def test_one_at_a_time(tmp_path):
    session = Session(tmp_path, kept=2)
    job = session.begin()
    with pytest.raises(UserError, match="is being painted for you"):
        session.begin()
    session.end(job)
    assert not job.folder.exists()
    assert session.history == []
    session.begin()


def test_stopping_keeps_what_is_there(tmp_path):
    session = Session(tmp_path, kept=2)
    assert session.stop() is None
    job = session.begin()
    job.part = made(job)
    assert session.stop() is job.part
    assert job.stop.is_set()
    assert session.history == [job.part]
    session.end(job)  # of whoever painted it, later
    assert job.folder.exists()


def test_all_goes_when_the_visitor_leaves(tmp_path):
    session = Session(tmp_path, kept=2)
    job = session.begin()
    session.end(job, made(job))
    other = session.begin()
    session.close()
    assert other.stop.is_set()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="load it again"):
        session.begin()


def test_a_copy_is_a_new_visitor_with_a_folder_of_his_own(tmp_path):
    session = Session(tmp_path, kept=2)
    job = session.begin()
    session.end(job, made(job))
    other = copy.deepcopy(session)
    assert other.history == []
    assert other.folder != session.folder
    assert other.begin().folder.parent.parent == tmp_path


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red circle, moving!", "a-red-circle-moving-3"),
        ("../../etc/<passwd>", "etc-passwd-3"),
        ("", "video-3"),
        ("\u7ea2\u8272", "video-3"),
        ("x" * 300, "x" * 48 + "-3"),
    ],
)
def test_a_download_has_a_plain_name(prompt, stem):
    assert file_stem(prompt, 3) == stem


def test_what_is_stopped_before_its_turn_is_not_wanted_again_by_another_wish(tmp_path):
    session = Session(tmp_path, 2)
    first = session.ask()
    assert session.is_wanted(first)
    assert session.stop() is None
    second = session.ask()
    assert not session.is_wanted(first)
    assert session.is_wanted(second)
    assert not session.is_wanted(None)
    assert not session.is_wanted("9")

"""Videos that grow: what is in the file while it is written, and after an end that came early."""

import os
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.media import video
from dicode_jax.media.writer import VIDEO_SUFFIXES, VideoWriter
from dicode_jax.storage.files import growing_path, part_of


def clip(index, h=16, w=24, f=4):
    """Frames of a grey that tells which clip and which frame they are."""
    greys = 20 + 40 * index + 8 * np.arange(f, dtype=np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (f, h, w, 3)).copy()


def greys(path):
    """Mean of each frame of a file."""
    return video.read_video(path).frames.mean((1, 2, 3))


def expected(count):
    return np.concatenate([clip(i)[:, 0, 0, 0] for i in range(count)]).astype(float)


@pytest.fixture
def out(tmp_path):
    return lambda suffix: tmp_path / f"out{suffix}"


def interrupted(path, whole, error, more=2):
    """Writes some whole clips and some frames of the next one, and fails."""
    with VideoWriter(path, 8, keep=True) as writer:
        for i in range(whole):
            writer.append(clip(i))
            writer.flush()
        writer.append(clip(whole)[:more])
        raise error


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_clips_flushed_one_by_one_are_the_video_and_its_part_is_gone(out, suffix):
    path = out(suffix)
    with VideoWriter(path, 5, keep=True) as writer:
        for i in range(5):
            writer.append(clip(i))
            writer.flush()
    np.testing.assert_allclose(greys(path), expected(5), atol=2)
    np.testing.assert_allclose(video.read_video(path).times, np.arange(20) / 5, atol=0.011)
    assert os.listdir(path.parent) == [path.name]


def test_a_whole_mp4_says_its_length_in_front(out):
    """As those that are not streamed: players show a bar, and a reader knows the end."""
    with VideoWriter(out(".mp4"), 8, keep=True) as writer:
        for i in range(3):
            writer.append(clip(i, h=15, w=21))
            writer.flush()
    data = out(".mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data
    info = video.probe(out(".mp4"))
    assert (info.num_frames, info.duration, info.fps) == (12, 1.5, 8)
    assert (info.width, info.height) == (22, 16)


def test_an_mp4_plays_while_it_grows(out):
    part = part_of(out(".mp4"))
    with VideoWriter(out(".mp4"), 8, keep=True) as writer:
        for i in range(4):
            writer.append(clip(i))
            writer.flush()
            with av.open(str(part)) as container:
                seen = sum(1 for _ in container.decode(video=0))
            assert seen == 4 * (i + 1) - 1  # the length of the last is told by the next
            assert not out(".mp4").exists()


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, MemoryError])
def test_what_was_flushed_stays_playable_and_the_old_file_as_it_was(out, suffix, error):
    path = out(suffix)
    path.write_text("old")
    with pytest.raises(error) as raised:
        interrupted(path, 3, error)
    part = path.with_name(f"out.part{suffix}")
    np.testing.assert_allclose(greys(part), expected(3), atol=2)
    assert path.read_text() == "old"
    assert sorted(os.listdir(path.parent)) == sorted([path.name, part.name])
    assert raised.value.__notes__ == [f"the first 1.5 s are in {part}; {path} is not written"]
    with VideoWriter(path, 8, keep=True) as writer:  # the next run takes its place
        writer.append(clip(0))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_before_the_first_clip_nothing_is_left(out, suffix):
    for count in (0, 2):
        with pytest.raises(KeyboardInterrupt) as raised:
            interrupted(out(suffix), 0, KeyboardInterrupt, count)
        assert not hasattr(raised.value, "__notes__")
        assert not os.listdir(out(suffix).parent)


def test_a_process_that_is_killed_leaves_an_mp4_that_plays(out):
    code = (
        "import os, sys, numpy as np\n"
        "from dicode_jax.media.writer import VideoWriter\n"
        "with VideoWriter(sys.argv[1], 8, keep=True) as writer:\n"
        "    for i in range(3):\n"
        "        writer.append(np.full((4, 16, 16, 3), 20 + 40 * i, np.uint8))\n"
        "        writer.flush()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out(".mp4"))], env=_environment())
    assert done.returncode == -9
    np.testing.assert_allclose(
        greys(part_of(out(".mp4"))), np.repeat([20, 60, 100], 4)[:11], atol=2
    )


def _environment():
    root = pathlib.Path(video.__file__).parents[2]
    return os.environ | {"PYTHONPATH": str(root)}


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_memory_does_not_grow_with_the_length(out, suffix):
    """What Python and FFmpeg hold, in a process of its own: the second half adds nothing."""
    code = (
        "import resource, sys, numpy as np\n"
        "from dicode_jax.media.writer import VideoWriter\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "rng = np.random.default_rng(0)\n"
        "with VideoWriter(sys.argv[1], 8, keep=True) as writer:\n"
        "    for i in range(40):\n"
        "        writer.append(rng.integers(0, 256, (8, 160, 160, 3), np.uint8))\n"
        "        writer.flush()\n"
        "        if i == 10: before = peak()\n"
        "print(peak() - before)\n"
    )
    argv = [sys.executable, "-c", code, str(out(suffix))]
    grown = float(subprocess.run(argv, env=_environment(), capture_output=True, check=True).stdout)
    assert grown < 6  # MB, where the frames are 18


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["a:b.mp4", "file:x.mp4", "pipe:1.mp4", "http:x.gif", "%d.webp"])
def test_a_name_is_never_an_address_or_a_pattern(tmp_path, monkeypatch, name, keep):
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, 8, keep=keep) as writer:
        writer.append(np.zeros((8, 16, 16, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_two_processes_do_not_write_one_part(out):
    with growing_path(out(".mp4")) as part:
        part.write_text("mine")
        message = r"another process is writing .*out\.part\.mp4"
        with pytest.raises(UserError, match=message), growing_path(out(".mp4")):
            pass
        assert part.read_text() == "mine"
    assert out(".mp4").read_text() == "mine"
    assert not part.exists()


def test_a_part_is_no_link_no_pipe_and_no_source(out, tmp_path):
    part = part_of(out(".mp4"))
    (tmp_path / "precious").write_text("kept")
    part.symlink_to(tmp_path / "precious")
    message = r"cannot write .*out\.part\.mp4"
    with pytest.raises(UserError, match=message), growing_path(out(".mp4")):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(UserError, match=r"out\.part\.mp4"), growing_path(out(".mp4")):
        pass
    part.unlink()
    video.write_video(part, clip(0))
    with pytest.raises(UserError, match="is read by this command"):
        VideoWriter(out(".mp4"), keep=True, sources=[part])


def test_a_link_leads_to_where_the_part_lies(out, tmp_path):
    (tmp_path / "far").mkdir()
    out(".mp4").symlink_to("far/target.mp4")
    with growing_path(out(".mp4")) as part:
        assert part == tmp_path / "far" / "target.part.mp4"
        part.write_text("new")
    assert (tmp_path / "far" / "target.mp4").read_text() == "new"
    assert out(".mp4").is_symlink()


@pytest.mark.parametrize("keep", [True, False])
def test_a_disk_that_is_full_costs_one_line_and_no_clip(out, keep):
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from dicode_jax.errors import UserError\n"
        "from dicode_jax.media.writer import VideoWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "rng = np.random.default_rng(0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "try:\n"
        f"    with VideoWriter(sys.argv[1], 8, keep={keep}) as writer:\n"
        "        for i in range(20):\n"
        "            writer.append(rng.integers(0, 256, (4, 64, 64, 3), np.uint8))\n"
        "            writer.flush()\n"
        "except UserError as error: print(error, *getattr(error, '__notes__', ()), sep=chr(10))\n"
    )
    argv = [sys.executable, "-c", code, str(out(".mp4"))]
    done = subprocess.run(argv, env=_environment(), capture_output=True, text=True, check=True)
    line, *notes = done.stdout.splitlines()
    assert line == f"cannot write {out('.mp4')}: File too large"
    assert len(notes) == keep
    assert os.listdir(out("").parent) == ["out.part.mp4"] * keep
    if keep:
        count = len(greys(part_of(out(".mp4"))))  # without a frame that is torn
        assert count == 8 * float(notes[0].split()[2]) - 1 > 4

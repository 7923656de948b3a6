"""Training checkpoints: what is kept, where the data stood, and what happens on a bad disk."""

import collections
import contextlib
import gc
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.training import checkpoint
from dicode_jax.training.checkpoint import Checkpointer, find_checkpoints, read_parameters
from dicode_jax.training.state import TrainState


def make_state(step: int, *, size: int = 6, use_ema: bool = True):
    weights = jnp.arange(size, dtype=jnp.float32).reshape(2, -1) + step
    return TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(0),
        params={"layer": {"kernel": weights}},
        opt_state=({"mu": weights / 3}, jnp.int32(step)),
        ema={"layer": {"kernel": weights + 0.5}} if use_ema else None,
        rng=jax.random.key(7),
    )


@pytest.fixture
def disk(monkeypatch):
    """Says how much room there is; `disk["free"] = bytes` changes it."""
    room = {"free": 10**12}
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(room["free"]))
    return room


def test_state_and_place_in_the_data_come_back_bitwise(tmp_path):
    position = {"next_batch": 12, "broken": {"a video.mp4": 2}}
    saver = Checkpointer(tmp_path)
    saver.save(12, make_state(12), position)
    saver.close()
    abstract = jax.eval_shape(lambda: make_state(0))
    state, place = Checkpointer(tmp_path).restore(abstract)
    assert place == position
    jax.tree.map(np.testing.assert_array_equal, state.replace(rng=0), make_state(12).replace(rng=0))
    assert state.rng == make_state(12).rng


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    saver = Checkpointer(tmp_path, keep=2)
    for step, loss in [(1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 3.5)]:
        metrics = None if loss is None else {"validation_loss": loss}
        saver.save(step, make_state(step), {}, metrics)
    saver.close()
    assert find_checkpoints(saver.folder) == [2, 4, 5]
    again = Checkpointer(tmp_path, keep=2)  # a new process still knows which was the best
    again.save(6, make_state(6), {}, {"validation_loss": 3.2})
    again.close()
    assert find_checkpoints(again.folder) == [2, 5, 6]


def test_a_checkpoint_that_holds_a_file_of_the_user_is_never_deleted(tmp_path):
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "checkpoints" / "0" / "mine.txt").write_text("mine")
    saver = Checkpointer(tmp_path, keep=1)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), {})
        saver.wait()
        if step == 1:
            (saver.folder / "1" / "notes.txt").write_text("mine")
    saver.close()
    assert find_checkpoints(saver.folder) == [0, 1, 3]
    assert (saver.folder / "0" / "mine.txt").read_text() == "mine"
    assert (saver.folder / "1" / "notes.txt").read_text() == "mine"


ODD = ("\u00b2", "\u0663", "-1", "1e3", "007", "+5", " 5", "5 ", "1_0", "tmp.5")


def test_only_folders_that_are_called_by_a_number_are_checkpoints(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(1, make_state(1), {"next_batch": 1})
    saver.close()
    for name in ODD:
        (saver.folder / name).mkdir()
    (saver.folder / "9").write_text("no folder")
    assert find_checkpoints(saver.folder) == [1]
    assert read_parameters(tmp_path, {"layer": {"kernel": jnp.zeros((2, 3))}})[0] == 1
    again = Checkpointer(tmp_path, keep=1)
    assert again.restore(jax.eval_shape(lambda: make_state(0)))[1] == {"next_batch": 1}
    again.save(2, make_state(2), {})
    again.close()
    assert {path.name for path in again.folder.iterdir()} == {"2", "9", *ODD}


DAMAGED = ("_CHECKPOINT_METADATA", "metrics/metrics", "data/metadata", "state/_METADATA")
IN_PLACE = (b"", b"{", b"[1]", b"null", b"[" * 100_000, b'{"a": 1}', b"\xff\0")


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    saver = Checkpointer(folder)
    saver.save(1, make_state(1), {"next_batch": 1}, {"validation_loss": 1.0})
    saver.close()
    return folder


@pytest.mark.parametrize("name", [*DAMAGED, "state/_sharding"])
def test_damaged_notes_of_a_checkpoint_are_one_line_or_of_no_account(
    tmp_path, one_checkpoint, name
):
    def go_on(folder):
        saver = Checkpointer(folder)
        try:
            saver.restore(jax.eval_shape(lambda: make_state(0)))
            saver.save(2, make_state(2), {})
        finally:
            saver.close()

    like = {"layer": {"kernel": jnp.zeros((2, 3))}}
    for i, data in enumerate(IN_PLACE):
        folder = shutil.copytree(one_checkpoint, tmp_path / str(i))
        (folder / "checkpoints/1" / name).write_bytes(data)
        for call in (lambda f: read_parameters(f, like), go_on):
            with contextlib.suppress(UserError):  # nothing else
                call(folder)


def test_a_folder_that_only_looks_like_a_checkpoint_is_told_in_one_line(tmp_path, one_checkpoint):
    for name in ("7", "9" * 200):
        folder = shutil.copytree(one_checkpoint, tmp_path / name[:9])
        (folder / "checkpoints" / name).mkdir()
        with pytest.raises(UserError, match=rf"cannot read .*{name[:9]}"):
            read_parameters(folder, {"layer": {"kernel": jnp.zeros((2, 3))}})
        with pytest.raises(UserError, match="delete that folder to go on"):
            Checkpointer(folder).restore(jax.eval_shape(lambda: make_state(0)))


def test_nothing_is_left_of_a_save_that_was_killed(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(1, make_state(1), {})
    saver.close()
    torn = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "state").write_text("half")
    again = Checkpointer(tmp_path)
    assert again.latest_step == 1
    again.save(2, make_state(2), {})
    again.close()
    assert sorted(path.name for path in torn.parent.iterdir()) == ["1", "2"]


def test_a_disk_without_room_is_noticed_before_the_run(tmp_path, disk):
    saver = Checkpointer(tmp_path, keep=2)
    state = make_state(0, size=1000)  # 3 arrays of 4000 bytes
    disk["free"] = 4 * 12_100
    saver.require_space(state, whole_run=True)
    disk["free"] = 4 * 11_900
    with pytest.raises(UserError, match=r"47\.6 KB free, and 4 checkpoints of 12 KB each must fit"):
        saver.require_space(state, whole_run=True)
    saver.require_space(state)


def test_a_disk_that_fills_up_stops_the_next_save_and_leaves_the_last(tmp_path, disk):
    saver = Checkpointer(tmp_path)
    saver.save(1, make_state(1), {})
    saver.wait()
    disk["free"] = 10
    with pytest.raises(UserError, match=r"10 B free.*the last checkpoint is 1\)"):
        saver.save(2, make_state(2), {})
    assert find_checkpoints(saver.folder) == [1]


# Orbax leaves the writes that it had begun to the garbage collector, which finds their loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_write_that_fails_in_the_background_is_one_line(tmp_path):
    saver = Checkpointer(tmp_path, keep=1)
    saver.save(1, make_state(1), {})
    saver.wait()
    noise = np.random.default_rng(0).normal(size=(2, 500_000)).astype(np.float32)
    large = make_state(2).replace(params={"layer": {"kernel": jnp.asarray(noise)}})

    def save():
        saver.save(2, large, {})
        saver.wait()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot save step 2 .*last checkpoint is 1\)") as info:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(info.value)
    del info
    gc.collect()  # in this test, and not in the next
    assert Checkpointer(tmp_path).restore(make_state(0))[0].step == 1


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.folder.rmdir()
    with pytest.raises(UserError, match="No such file"):
        saver.save(1, make_state(1), {})


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        Checkpointer(tmp_path / "file")


def test_an_older_step_than_the_newest_is_not_passed_over(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(5, make_state(5), {})
    saver.wait()
    with pytest.raises(UserError, match="already holds step 5"):
        saver.save(4, make_state(4), {})
    saver.close()


def test_parameters_alone_can_be_read(tmp_path):
    for name, use_ema in [("with", True), ("without", False)]:
        saver = Checkpointer(tmp_path / name)
        saver.save(3, make_state(3, use_ema=use_ema), {})
        saver.close()
    like = jax.eval_shape(lambda: make_state(0).params)
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3) + 3
    step, params = read_parameters(tmp_path / "with", like)
    assert step == 3
    np.testing.assert_array_equal(params["layer"]["kernel"], kernel + 0.5)
    _, params = read_parameters(tmp_path / "with", like, use_ema=False)
    np.testing.assert_array_equal(params["layer"]["kernel"], kernel)
    _, params = read_parameters(tmp_path / "without" / "checkpoints", like)
    np.testing.assert_array_equal(params["layer"]["kernel"], kernel)
    with pytest.raises(UserError, match="no checkpoint of step 4; it holds 3"):
        read_parameters(tmp_path / "with", like, step=4)

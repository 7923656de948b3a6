"""Programs found again without a trace: the same results, and never where something else is asked.

A second `Program` of a function stands for a second process.
"""

import dataclasses
import errno
import functools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicode_jax import _begun
from dicode_jax.runtime import compile_cache, kept_programs, platform

traced = []


@dataclasses.dataclass(frozen=True)
class Plan:
    factor: float

    @functools.cached_property
    def remembered(self):
        return object()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Made:
    sum: jax.Array
    parts: tuple


def work(plan, x, key, *, shift=0.0):
    traced.append(plan)
    noise = jax.random.normal(key, x["a"].shape)
    return Made(x["a"] * plan.factor + shift, (noise, jnp.arange(3)))


def again(**options):
    jax.clear_caches()  # of traces too, which programs of one function share
    return kept_programs.jit(work, static_argnames=("plan",), **options)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_begun, "STARTED", math.inf)  # whoever edits while tests run
    kept_programs._code.cache_clear()
    names = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    compile_cache.compilation_cache.reset_cache()
    traced.clear()
    yield tmp_path / kept_programs.FOLDER
    for name, value in before.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()


def programs(folder):
    """Files of programs, without those that point to them."""
    return [path for path in folder.iterdir() if path.stat().st_size > 64]


ARGS = Plan(2.0), {"a": jnp.arange(4.0)}, jax.random.key(0)


def check(made, factor=2.0, shift=0.0):
    noise = jax.random.normal(ARGS[2], (4,))
    np.testing.assert_array_equal(made.sum, np.arange(4.0) * factor + shift)
    np.testing.assert_array_equal(made.parts[0], noise)
    np.testing.assert_array_equal(made.parts[1], [0, 1, 2])


def test_a_kept_program_is_not_traced_again(folder):
    with kept_programs.use():
        check(again()(*ARGS, shift=jnp.float32(1)), shift=1)
        assert len(traced) == 1
        assert hash(ARGS[0].remembered)  # what an object remembers is no part of what it is
        second = again()
        for _ in range(2):
            check(second(*ARGS, shift=jnp.float32(1)), shift=1)
    assert len(traced) == 1
    assert len(programs(folder)) == 1


def test_what_jax_found_in_its_own_folder_is_kept_whole(folder):
    check(again()(*ARGS))
    assert not folder.exists()  # outside `use`
    with kept_programs.use():
        check(again()(*ARGS))
        check(again()(*ARGS))
    assert len(traced) == 2


def test_what_this_process_has_from_jax_is_kept_whole_too():
    check(again()(*ARGS))  # into jax's folder
    program = again()
    check(program(*ARGS))  # from there
    with kept_programs.use():
        check(program(*ARGS))
        check(again()(*ARGS))
    assert len(traced) == 2


def test_other_sources_that_say_the_same_compile_nothing(folder, monkeypatch):
    with kept_programs.use():
        check(again()(*ARGS))
        monkeypatch.setattr(kept_programs, "_code", lambda: b"another")
        misses = []
        jax.monitoring.register_event_duration_secs_listener(
            listen := lambda event, _, **__: misses.append(event) if "backend" in event else None
        )
        second = again()
        args = (ARGS[0], *map(jax.block_until_ready, ARGS[1:]))
        misses.clear()
        made = second(*args)
        jax.monitoring.unregister_event_duration_listener(listen)
        assert not misses
        check(made)
        check(again()(*ARGS))
    assert len(traced) == 2  # the first time with either
    assert len(programs(folder)) == 1


def picking(index):
    """A function that takes one of two arguments; of either the same is lowered."""

    def pick(*both):
        return both[index] + 1

    return pick


def key_or_numbers(is_key):
    """A function whose result is a key, or the numbers of one; of either the same is lowered."""

    def made(numbers):
        return jax.random.wrap_key_data(numbers) if is_key else numbers * 1

    return made


@pytest.mark.parametrize("make", [picking, key_or_numbers])
def test_other_sources_that_are_lowered_alike_and_mean_something_else(make, folder, monkeypatch):
    args = (jnp.arange(2, dtype=jnp.uint32), jnp.ones(2, jnp.uint32))
    args = args if make is picking else args[:1]
    with kept_programs.use():
        for source, which in ((b"a", 0), (b"b", 1), (b"a", 0), (b"b", 1)):
            monkeypatch.setattr(kept_programs, "_code", lambda source=source: source)
            got, want = kept_programs.jit(make(which))(*args), make(which)(*args)
            assert got.dtype == want.dtype
            if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
                got, want = map(jax.random.key_data, (got, want))
            np.testing.assert_array_equal(got, want)


SURROUNDINGS = {
    "flags": lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false"),
    "cores": lambda patch: patch.setattr(os, "cpu_count", lambda: 1000),
    "versions": lambda patch: patch.setattr(kept_programs, "_versions", lambda: ("another",)),
    "cpu": lambda patch: patch.setattr(compile_cache, "cpu", lambda: "another"),
}


@pytest.mark.parametrize("change", list(SURROUNDINGS))
def test_what_compiles_elsewhere_is_another_program(change, folder, monkeypatch):
    with kept_programs.use():
        check(again()(*ARGS))
        SURROUNDINGS[change](monkeypatch)
        check(again()(*ARGS))
    assert len(traced) == 2
    assert len(programs(folder)) == 2


def test_a_program_that_was_found_is_not_that_of_other_settings():
    program = kept_programs.jit(lambda x: x * {"auto": 2, "mapped": 3}[platform.attention()])
    promoted = kept_programs.jit(lambda x, y: x + y)
    x, y = jnp.ones(4), jnp.ones((2, 4))
    with kept_programs.use():
        for _ in range(2):
            assert program(x)[0] == 2
            with platform.tracing_for(attention="mapped"):
                assert program(x)[0] == 3
        promoted(x, y)
        with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank_promotion"):
            promoted(x, y)


@pytest.mark.parametrize(
    "change", ["plan", "shape", "type", "number", "setting", "attention", "option"]
)
def test_what_a_trace_sees_is_another_program(change, folder):
    plan, x, key = ARGS
    with kept_programs.use():
        check(again()(plan, x, key))
        if change == "plan":
            check(again()(Plan(3.0), x, key), factor=3)
        elif change == "shape":
            assert again()(plan, {"a": jnp.ones(5)}, key).sum.shape == (5,)
        elif change == "type":
            assert again()(plan, {"a": x["a"].astype(jnp.bfloat16)}, key).sum.dtype == jnp.bfloat16
        elif change == "number":
            check(again()(plan, x, key, shift=1.0), shift=1)
        elif change == "setting":
            with jax.numpy_rank_promotion("raise"):
                check(again()(plan, x, key))
        elif change == "attention":
            with platform.tracing_for(attention="mapped"):
                check(again()(plan, x, key))
        else:
            check(again(donate_argnames=("x",))(plan, {"a": jnp.arange(4.0)}, key))
    assert len(traced) == 2
    assert len(programs(folder)) == 2


@pytest.mark.parametrize("stored", [b"", b"nothing", None])
def test_a_broken_file_is_made_anew(stored, folder):
    with kept_programs.use():
        again()(*ARGS)
        (file,) = programs(folder)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if stored is None else stored)
        check(again()(*ARGS))
        assert len(traced) == 2
        check(again()(*ARGS))
    assert len(traced) == 2


def test_a_wrong_byte_is_found_before_the_program_runs(folder, monkeypatch):
    with kept_programs.use():
        check(again()(*ARGS))
        (file,) = programs(folder)
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 0xFF
        file.write_bytes(whole)
        load = kept_programs.serialize_executable.deserialize_and_load
        loaded = []
        monkeypatch.setattr(
            kept_programs.serialize_executable,
            "deserialize_and_load",
            lambda *given: loaded.append(1) or load(*given),
        )
        check(again()(*ARGS))
        assert not loaded
        check(again()(*ARGS))
    assert (len(loaded), len(traced)) == (1, 2)


def test_a_broken_pointer_is_made_anew(folder):
    with kept_programs.use():
        again()(*ARGS)
        (pointer,) = set(folder.iterdir()) - set(programs(folder))
        for content in (b"../../elsewhere", b"\xff", b""):
            pointer.write_bytes(content)
            check(again()(*ARGS))
        assert len(traced) == 4
        check(again()(*ARGS))
    assert len(traced) == 4


def test_what_jax_cannot_write_is_compiled_once(folder, monkeypatch):
    def refuse(program):
        raise NotImplementedError

    monkeypatch.setattr(kept_programs.serialize_executable, "serialize", refuse)
    with kept_programs.use(), kept_programs._events() as said:
        check(again()(*ARGS))
        check(again()(*ARGS))
    assert kept_programs.FOUND in said  # jax's own folder has it
    assert not folder.exists()


def test_what_cannot_be_named_or_lies_elsewhere_is_left_to_jax(folder, monkeypatch):
    with kept_programs.use():
        scaled = kept_programs.jit(lambda x, f: f(x), static_argnames=("f",))
        assert scaled(jnp.float32(3), lambda x: 2 * x) == 6
        monkeypatch.setattr(kept_programs, "_shape", lambda leaf: None)
        check(again()(*ARGS))
    assert not folder.exists()


def test_without_a_place_or_with_the_cache_off_nothing_is_kept(folder):
    with kept_programs.use(), compile_cache.off():
        check(again()(*ARGS))
    assert not folder.exists()
    folder.touch()  # no folder can be made there
    with kept_programs.use():
        check(again()(*ARGS))
    assert folder.read_bytes() == b""


@pytest.mark.parametrize("when", ["before", "behind"])
def test_sources_that_were_saved_since_the_start_are_not_trusted(when, folder, monkeypatch):
    with kept_programs.use():
        if when == "behind":  # the first program
            check(again()(*ARGS))
        for path in folder.glob("*"):
            path.unlink()
        if when == "before":
            monkeypatch.setattr(kept_programs, "_code", kept_programs._code.__wrapped__)
        monkeypatch.setattr(_begun, "STARTED", 0)
        check(again()(*ARGS))
    assert not list(folder.glob("*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "fixed")])
def test_where_nothing_can_be_written_programs_are_read_and_run(folder, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    with kept_programs.use():
        check(again()(*ARGS))
        for name in ("write_bytes", "mkdir"):
            monkeypatch.setattr(pathlib.Path, name, refuse)
        monkeypatch.setattr(os, "utime", refuse)
        check(again()(*ARGS))
        assert len(traced) == 1
        check(again()(Plan(3.0), *ARGS[1:]), factor=3)
        monkeypatch.undo()
        monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
        check(again()(Plan(4.0), *ARGS[1:]), factor=4)
    assert len(traced) == 3
    assert len(programs(folder)) == 1


def test_a_place_that_is_no_folder_here_is_left_to_jax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compile_cache, "in_use", lambda: "gs://bucket/programs")
    with kept_programs.use():
        check(again()(*ARGS))
    assert not list(tmp_path.glob("gs*"))


def test_those_read_least_lately_make_room(folder, monkeypatch):
    with kept_programs.use():
        for factor in (1.0, 2.0, 3.0):
            check(again()(Plan(factor), *ARGS[1:]), factor)
            for path in folder.iterdir():
                os.utime(path, (path.stat().st_mtime - 1000,) * 2)
        size = sum(path.stat().st_size for path in folder.iterdir())
        check(again()(Plan(1.0), *ARGS[1:]), 1)  # read now
        monkeypatch.setattr(kept_programs, "MOST", size + size // 8)
        check(again()(Plan(4.0), *ARGS[1:]), 4)
        assert len(programs(folder)) == 3
        traced.clear()
        check(again()(Plan(1.0), *ARGS[1:]), 1)
        assert not traced
        check(again()(Plan(2.0), *ARGS[1:]), 2)
        assert len(traced) == 1


def test_donated_arguments_are_given_away():
    with kept_programs.use():
        for _ in range(2):
            x = {"a": jnp.arange(4.0)}
            check(again(donate_argnames=("x",))(ARGS[0], x, ARGS[2]))
            assert x["a"].is_deleted()
    assert len(traced) == 1

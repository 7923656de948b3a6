"""Where compiled programs are kept, and what happens where they cannot be."""

import warnings

import jax
import pytest

from dicode_jax.runtime import compile_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Jax without a folder; all is as it was afterwards."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache._warn.cache_clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()


@pytest.mark.parametrize("home", ["", None, "a file"])
def test_without_a_place_one_line_is_said_once(home, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # as in containers with -u
    if home is not None:
        monkeypatch.setenv("HOME", home and str(tmp_path / home))
    with pytest.warns(UserWarning, match="compiled programs are not kept, .*: every start") as said:
        compile_cache.use()
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_cache.use()
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_are_kept_in_the_users_own_folder_though_some_ran_before(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    compile_cache.compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1)(1.0)  # which settles for jax that there is no cache
    compile_cache.use()
    folder = compile_cache.folder()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.parent == tmp_path / ".cache" / "dicode_jax" / "programs"
    jax.jit(lambda x: x * 3 - 7)(1.0)
    assert list(folder.glob("*-cache"))
    before = sorted(folder.iterdir())
    with compile_cache.off():
        jax.jit(lambda x: x * 5 - 11)(1.0)
    assert sorted(folder.iterdir()) == before


def test_another_cpu_has_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    here = compile_cache.folder()
    monkeypatch.setattr(compile_cache, "cpu", lambda: "another")
    assert compile_cache.folder() != here


@pytest.mark.parametrize("name", ["jax_compilation_cache_dir", "jax_enable_compilation_cache"])
def test_what_the_user_says_to_jax_wins(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    value = str(tmp_path / "own") if name == "jax_compilation_cache_dir" else False
    jax.config.update(name, value)
    compile_cache.use()
    assert getattr(jax.config, name) == value
    assert not (tmp_path / ".cache").exists()

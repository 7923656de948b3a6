"""Shared by all tests: shape checks on, CPU, full float32 matmuls, and where the goldens lie."""

import atexit
import contextlib
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else programs go to the user's own folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Every program: the other worker, child processes and later files find it.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["DICODE_CHECK_SHAPES"] = "1"

import hypothesis
import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# `--hypothesis-profile long` looks longer, and elsewhere each time.
COMMON = {"deadline": None, "database": None}
hypothesis.settings.register_profile("short", max_examples=15, derandomize=True, **COMMON)
hypothesis.settings.register_profile("long", max_examples=20_000, **COMMON)
hypothesis.settings.load_profile("short")

TESTS = pathlib.Path(__file__).parent
GOLDEN = TESTS / "golden"

# Folders whose tests hold that the code writes out how ranks broadcast or types change.
STRICT = jax.numpy_dtype_promotion, "strict"
RAISE = jax.numpy_rank_promotion, "raise"
PROMOTION = {"diffusion": (STRICT, RAISE), "distributions": (STRICT,), "nn": (RAISE,)}


# Most of the time is compilation, so programs have few optimisations, those of children too. Only
# the arrays of `--golden` are compiled as users do, and with `--long` what is not of these rooms,
# whose tests hold values and shapes to something else than themselves.
SIMPLE = {"convert", "diffusion", "distributions", "evaluation", "models", "nn", "pipelines"}
SIMPLE |= {"parity", "stages", "training"}
EXACT = {"test_packed.py"}  # compares two orders of sums to the last bits


# Small programs compile in two thirds of the time without the emitters that go by MLIR. XLA ends a
# process for a flag that it does not know, so only versions are told that are known to have it.
EMITTERS = "--xla_cpu_use_fusion_emitters=false"

MUCH = 3e9  # bytes that a worker may hold between files


def resident():
    """Bytes of this process in memory, 0 where the system does not say."""
    with contextlib.suppress(OSError):
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")
    return 0


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    is_simple = request.config.getoption("golden") == str(GOLDEN)
    if request.config.getoption("long"):
        is_simple &= request.path.relative_to(TESTS).parts[0] in SIMPLE
    is_simple &= request.path.name not in EXACT
    jax.config.update("jax_disable_most_optimizations", is_simple)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(is_simple))
    yield
    if resident() > MUCH:  # compiled programs, of files that are done
        jax.clear_caches()


@pytest.fixture(autouse=True)
def promotion(request):
    folder = request.path.relative_to(TESTS).parts[0]
    with contextlib.ExitStack() as stack:
        for option, value in PROMOTION.get(folder, ()):
            stack.enter_context(option(value))
        yield


def pytest_configure(config):
    """Before XLA reads its flags; child processes read them too."""
    flags = os.environ.get("XLA_FLAGS", "")
    is_ours = config.getoption("golden") == str(GOLDEN) and not config.getoption("long")
    if is_ours and jax.__version_info__[:2] == (0, 10) and EMITTERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {EMITTERS}".strip()


def pytest_report_header():
    names = ("jax", "flax", "av", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("long"):
        left = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption(
        "--golden",
        default=str(GOLDEN),
        metavar="DIR",
        help="folder of golden fixtures (families as sub-folders); default tests/golden",
    )
    parser.addoption(
        "--vocabularies",
        default=None,
        metavar="DIR",
        help="folder with `gpt2`, `llama3` or `clip`: published tokenizer files, for parity only",
    )

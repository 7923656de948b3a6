"""Shared by all tests: shape checks on, CPU, full float32 matmuls, and where the goldens lie."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["DICODE_CHECK_SHAPES"] = "1"

import jax

jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_report_header():
    names = ("jax", "flax", "av", "numpy")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_addoption(parser):
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

"""What a pipeline has XLA do on a GPU, where there is one."""

import importlib.util
import os

import pytest

from dicode_jax.runtime.platform import keep_products_apart


@pytest.mark.parametrize(
    ("plugin", "flags", "want"),
    [
        (None, "", ""),
        ("jax_cuda12_plugin", "", "--xla_gpu_dot_merger_threshold_mb=0"),
        ("jax_cuda13_plugin", "--a=1", "--a=1 --xla_gpu_dot_merger_threshold_mb=0"),
        ("jax_cuda12_plugin", "--xla_gpu_dot_merger_threshold_mb=8", None),
    ],
)
def test_products_stay_apart_where_there_is_a_gpu_and_nobody_said_otherwise(
    monkeypatch, plugin, flags, want
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == plugin else None)
    monkeypatch.setenv("XLA_FLAGS", flags)
    keep_products_apart()
    assert os.environ["XLA_FLAGS"] == (flags if want is None else want)

"""What a training on CPUs keeps of its memory, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from dicode_jax.runtime import allocator
kept = allocator.keep()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
before = faults()
for _ in range(3):
    np.ones(2**24)  # 128 MB
print(kept, faults() - before)
"""


def run(**environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    clean |= {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=clean, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc has these settings")
def test_what_was_freed_is_taken_again_without_a_page_fault():
    kept, faults = run()
    assert kept
    assert faults < 1000  # 3 x 32,768 pages of 4 KB else


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_ARENA_MAX": "2"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=0"},
        {"JAX_PLATFORMS": "cuda"},
    ],
)
def test_a_users_own_settings_and_hosts_of_accelerators_are_left_alone(environment):
    assert not run(**environment)[0]

"""LanDiff's trainings on many devices: how full size lies on them, and that they change no loss."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import sharded_training
from flax import nnx
from jax.sharding import AbstractMesh

from dicode_jax import config as config_lib
from dicode_jax.nn.rngs import blank
from dicode_jax.runtime import sharding
from dicode_jax.stages.registry import build_stage

CONFIGS = pathlib.Path(__file__).parents[3] / "configs" / "landiff"


@pytest.mark.parametrize("name", ["released_lm", "released_diffusion"])
def test_eight_devices_hold_an_eighth_of_what_is_large(name):
    config = config_lib.load_config_file(CONFIGS / f"{name}.py")
    state = nnx.state(blank(build_stage(config).create))
    where = sharding.param_shardings(state, AbstractMesh((1, 8, 1), sharding.AXES), config.sharding)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True))
    whole = sum(x.size for x, _ in pairs)
    held = sum(np.prod(s.shard_shape(x.shape)) for x, s in pairs)
    assert whole > 1.9e9
    assert held < 1.01 * whole / 8


@pytest.mark.long
@pytest.mark.multi_device
@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        ("landiff_lm", "all"),
        ("landiff_diffusion", "all"),
        ("semantic_tokenizer", "fsdp"),
        ("semantic_tokenizer_start", "fsdp"),
    ],
)
def test_eight_devices_give_the_losses_of_one(stage, mesh):
    """Of `all`, data, fsdp and tensor axes have two devices each; what is dropped and drawn acts,
    and codes start, move and are revived by the vectors of all devices."""
    command = [sys.executable, sharded_training.__file__, "losses", stage, "one", mesh]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = sharded_training.read_report(done.stdout)
    np.testing.assert_allclose(found[mesh]["losses"], found["one"]["losses"], rtol=1e-5)
    assert len(set(found["one"]["losses"])) == 5
    assert not found[mesh]["whole"]

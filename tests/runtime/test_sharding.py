"""Rules and meshes; and that a mesh of eight devices trains to the numbers of one device."""

import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_training
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dicode_jax.errors import UserError
from dicode_jax.runtime import sharding
from dicode_jax.runtime.sharding import ShardingConfig

MESH = AbstractMesh((2, 4, 2), sharding.AXES)
SCRIPT = pathlib.Path(sharded_training.__file__)


def spec_of(shape, *rules, min_size=1, path=("body", "up", "kernel"), mesh=MESH):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path):
        tree = {name: tree}
    cfg = ShardingConfig(rules=rules or ((".*", "fsdp"),), min_size=min_size)
    [found] = jax.tree.leaves(sharding.param_shardings(tree, mesh, cfg))
    return found.spec


def test_default_splits_the_largest_axis_that_divides():
    assert spec_of((6, 8, 12)) == P(None, None, "fsdp")
    assert spec_of((6, 8, 13)) == P(None, "fsdp", None)
    assert spec_of((7, 13)) == P()


def test_small_parameters_are_replicated_by_default():
    assert spec_of((8, 8), min_size=64) == P("fsdp", None) or P(None, "fsdp")
    assert spec_of((8, 8), min_size=65) == P()


def test_first_rule_that_is_found_in_the_path_counts():
    rules = ((r"down", "replicate"), (r"up\.kernel$", "fsdp,tensor"), (r".*", "replicate"))
    assert spec_of((8, 6), *rules) == P("fsdp", "tensor") or P(("fsdp",), ("tensor",))
    assert spec_of((8, 6), *rules, path=("body", "up", "bias")) == P()


def test_entries_are_for_the_last_axes_so_that_stacked_layers_need_no_other_rule():
    assert spec_of((5, 8, 6), (".*", "fsdp,tensor")) == P(None, ("fsdp",), ("tensor",))
    assert spec_of((5, 16, 6), (".*", "data+fsdp,-")) == P(None, ("data", "fsdp"), None)


def test_rule_that_does_not_divide_names_the_parameter():
    with pytest.raises(UserError, match=r"body\.up\.kernel \(8, 7\) over 2 devices"):
        spec_of((8, 7), (".*", "fsdp,tensor"))
    with pytest.raises(UserError, match="has 2 entries"):
        spec_of((8,), (".*", "fsdp,tensor"))


@pytest.mark.parametrize(
    ("rule", "fault"), [("fsdp,model", "no axis 'model'"), ("fsdp,fsdp", "axis twice")]
)
def test_rule_with_a_fault_is_refused_when_the_config_is_made(rule, fault):
    with pytest.raises(ValueError, match=fault):
        ShardingConfig(rules=((".*", rule),))


def test_optimizer_state_lies_as_its_parameter_does():
    params = {"up": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(8)}}
    where = sharding.param_shardings(params, MESH, ShardingConfig(min_size=16))
    opt_state = (
        {"mu": params, "count": jnp.zeros(())},
        {"factored": {"up": {"kernel": jnp.ones(6)}}},
    )
    found = sharding.like_params(opt_state, params, where, MESH)
    assert found[0]["mu"] == where
    assert found[0]["mu"]["up"]["kernel"].spec == P("fsdp", None)
    assert found[0]["count"].spec == P()
    assert found[1]["factored"]["up"]["kernel"].spec == P()


def test_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="data 3 x fsdp 2 x tensor 1 does not fit"):
        sharding.make_mesh(ShardingConfig(data=3, fsdp=2), jax.devices()[:1])
    with pytest.raises(ValueError, match="only one mesh axis"):
        ShardingConfig(data=-1, fsdp=-1)


def test_batch_that_the_mesh_cannot_split_is_refused():
    sharding.check_batch_size(48, MESH, accumulate_steps=3)
    with pytest.raises(UserError, match="take a multiple of 24"):
        sharding.check_batch_size(56, MESH, accumulate_steps=3)


def fake_mesh(*processes, tensor):
    devices = np.array([SimpleNamespace(process_index=p) for p in processes])
    return SimpleNamespace(devices=devices.reshape(-1, 1, tensor), shape={"tensor": tensor})


@pytest.mark.parametrize(
    ("processes", "tensor", "share"),
    [
        ((0, 0, 1, 1), 1, (0, 2)),
        ((1, 1, 0, 0), 1, (1, 2)),  # the mesh orders devices by their wires, not by process
        ((0, 0, 1, 1), 2, (0, 2)),
        ((0, 1, 2, 3), 2, (0, 2)),  # processes 0 and 1 hold the same rows
        ((0, 0, 1, 1), 4, (0, 1)),
    ],
)
def test_process_reads_the_rows_that_its_devices_hold(processes, tensor, share):
    assert sharding.batch_share(fake_mesh(*processes, tensor=tensor)) == share


def test_rows_scattered_over_processes_are_refused():
    with pytest.raises(UserError, match="splits the batch unevenly"):
        sharding.batch_share(fake_mesh(0, 1, 0, 1, tensor=1))


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.constrain(x, sharding.BATCH, None) is x


STAGES = ("language_model", "tokenizer")
# The tokenizer compiles for longest. The language model holds on every mesh, and in any number of
# parts, what has nothing to do with a stage.
MESHES = {"tokenizer": ("one", "fsdp")}
TOKENIZER = pytest.param("tokenizer", marks=pytest.mark.long)


def reports(command, stages, meshes):
    """What `sharded_training.py` finds in processes with eight emulated devices, one per stage."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, command, stage, *meshes.get(stage, ())], **options
        )
        for stage in stages
    ]
    report = {}
    for stage, process in zip(stages, processes):
        out, err = process.communicate()
        assert process.returncode == 0, err.decode()[-2000:]
        report[stage] = sharded_training.read_report(out.decode())
    return report


@pytest.fixture(scope="module")
def on_meshes(pytestconfig):
    return reports("losses", STAGES, {} if pytestconfig.getoption("long") else MESHES)


@pytest.fixture(scope="module")
def in_parts(pytestconfig):
    return reports("averages", STAGES if pytestconfig.getoption("long") else STAGES[:1], {})


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize("stage", ["language_model", TOKENIZER])
def test_parts_of_a_batch_give_the_update_of_the_whole_on_one_device_and_on_eight(in_parts, stage):
    whole = in_parts[stage]["1 devices, 1 parts"]
    assert len(in_parts[stage]) == (5 if stage == "language_model" else 3)
    for case, found in in_parts[stage].items():
        np.testing.assert_allclose(found["loss"], whole["loss"], rtol=1e-6, err_msg=case)
        assert found["differs"] < 2e-6, case  # of the largest number; float32 rounds to 6e-8


@pytest.mark.slow
@pytest.mark.multi_device
def test_validation_on_eight_devices_in_small_batches_is_that_of_one_device(in_parts):
    one, eight = (
        in_parts["language_model"][case]["validation"]
        for case in ("1 devices, 1 parts", "8 devices, 2 parts")
    )
    np.testing.assert_allclose(eight, one, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        *(("language_model", mesh) for mesh in ("data", "fsdp", "all")),
        ("tokenizer", "fsdp"),
        pytest.param("tokenizer", "all", marks=pytest.mark.long),
    ],
)
def test_eight_devices_give_the_losses_of_one(on_meshes, stage, mesh):
    one, eight = on_meshes[stage]["one"], on_meshes[stage][mesh]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(eight["grad_norm"], one["grad_norm"], rtol=1e-4)  # after 5 updates
    assert max(one["losses"]) - min(one["losses"]) > 1e-3  # steps do something


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.parametrize("stage", STAGES)
def test_fsdp_leaves_no_large_parameter_whole(on_meshes, stage):
    assert on_meshes[stage]["fsdp"]["large"] > 10
    assert on_meshes[stage]["fsdp"]["whole"] == []
    if stage == "language_model":
        assert on_meshes[stage]["data"]["whole"] != []

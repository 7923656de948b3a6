"""Who joins whom; and two real processes on loopback that train as one does."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import sharded_training

from dicode_jax.errors import UserError
from dicode_jax.runtime import distributed

SCRIPT = pathlib.Path(sharded_training.__file__)
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "JAX_PLATFORMS": "cpu",
}


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({"JAX_PLATFORMS": "cpu"}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "JAX_PLATFORMS": "cpu"}, None),  # no srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_PLATFORMS": "cpu"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_launcher_is_found_in_the_environment(env, launcher):
    assert distributed.find_launcher(env) == launcher


@pytest.fixture
def joined(monkeypatch):
    """Arguments of `jax.distributed.initialize`, which is not run; an empty environment."""
    calls = []
    monkeypatch.setattr("os.environ", {"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: calls.append(kwargs))
    return calls


def test_single_process_joins_nobody(joined):
    assert distributed.initialize() is False
    assert distributed.initialize("localhost:1234", 1, 0) is False
    assert joined == []


def test_flags_go_before_the_environment(joined, monkeypatch):
    monkeypatch.setattr(
        "os.environ",
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
    )
    assert distributed.initialize("b:2") is True
    assert distributed.initialize(process_id=1) is True
    names = ("coordinator_address", "num_processes", "process_id")
    assert [tuple(call[name] for name in names) for call in joined] == [
        ("b:2", 3, 2),
        ("a:1", 3, 1),
    ]


def test_open_mpi_gives_each_process_its_own_gpu(joined, monkeypatch):
    rank = {"SIZE": "4", "RANK": "3", "LOCAL_SIZE": "2", "LOCAL_RANK": "1"}
    monkeypatch.setattr("os.environ", {f"OMPI_COMM_WORLD_{k}": v for k, v in rank.items()})
    distributed.initialize("head:1234")
    assert (joined[0]["process_id"], joined[0]["local_device_ids"]) == (3, [1])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("host:1", 2, None), "needs --process-id .* JAX_PROCESS_ID"),
        (("host", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), r"must be in 0\.\.1, got 2"),
    ],
)
def test_what_is_missing_or_wrong_is_said(joined, arguments, fault):
    with pytest.raises(UserError, match=fault):
        distributed.initialize(*arguments)


def test_others_that_do_not_come_are_one_line(joined, monkeypatch):
    def refuse(**kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED:\n  timed out")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    with pytest.raises(UserError, match=r"1 of 2: .* DEADLINE_EXCEEDED: timed out") as error:
        distributed.initialize("host:1", 2, 1)
    assert "\n" not in str(error.value)


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def start(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return sharded_training.read_report(out)


@pytest.mark.slow
@pytest.mark.multi_device
def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    """Two processes of two devices each (fsdp 4) save step 3; one process goes on (2 x 2 x 1)."""
    address = f"localhost:{free_port()}"
    pair = [start("run", i, 2, address, tmp_path / "pair") for i in range(2)]
    first, second = (finish(process) for process in pair)
    whole = finish(start("run", 0, 1, "-", tmp_path / "one"))
    resumed = finish(start("run", 0, 1, "-", tmp_path / "pair"))

    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], whole["losses"][:3], rtol=1e-5)
    assert whole["steps"] == [0, 1, 2, 3, 4]
    for mine, others, all_ids in zip(first["ids"], second["ids"], whole["ids"]):
        assert not set(mine) & set(others)
        assert mine + others == all_ids

    assert resumed["steps"] == [3, 4]
    np.testing.assert_allclose(resumed["losses"], whole["losses"][3:], rtol=1e-5)
    assert resumed["ids"] == whole["ids"][3:]

"""Joins the processes of a run, however they were launched.

One process per host (or per GPU) runs the same command. Under SLURM, Kubernetes (an indexed Job or
a JobSet), Open MPI and on Cloud TPU each finds the others by itself, through
`jax.distributed.initialize`; elsewhere three flags or environment variables say who is who. A
single process needs nothing.
"""

import dataclasses
import glob
import importlib.util
import os
from collections.abc import Mapping

import jax

from dicode_jax.errors import UserError

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_COUNT = ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE")
_INDEX = ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes, where they do not find each other.

    Attributes:
      coordinator: HOST:PORT of process 0; or set JAX_COORDINATOR_ADDRESS.
      num_processes: Of the run; or set JAX_NUM_PROCESSES.
      process_id: 0..N-1, which of them this is; or set JAX_PROCESS_ID.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> bool:
    """Joins the other processes. Call it once, before anything asks for a device.

    Args:
      coordinator: `HOST:PORT` of process 0, which the others can reach; from the environment when
        None.
      num_processes: Of the whole run; likewise.
      process_id: Which of them this is; likewise.
      timeout: Seconds to wait for the others.

    Returns:
      Whether there are several processes.

    Raises:
      UserError: Something is missing or contradicts itself, or the others did not come in time.
    """
    env = os.environ
    coordinator = coordinator or env.get(_COORDINATOR)
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UserError("--num-processes and --process-id need --coordinator HOST:PORT")
        launcher = find_launcher(env)
        if launcher is None:
            return False
        _join(f"found {launcher}, but", initialization_timeout=timeout)
        return jax.process_count() > 1

    num_processes = _number(env, _COUNT, num_processes, "--num-processes")
    process_id = _number(env, _INDEX, process_id, "--process-id")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id must be in 0..{num_processes - 1}, got {process_id}")
    if num_processes == 1:
        return False
    _join(
        f"process {process_id} of {num_processes}:",
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        local_device_ids=_own_devices(env),
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
    )
    return True


def find_launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """What launched this process together with others, as far as the environment tells."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm) and int(env.get("SLURM_NTASKS", 1)) > 1:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    several = "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env
    return "Cloud TPU" if several or _has_tpu(env) else None


def _has_tpu(env: Mapping[str, str]) -> bool:
    """Whether this is a TPU machine, which may be one of several; its metadata server knows."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or "TPU_SKIP_MDS_QUERY" in env:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _own_devices(env: Mapping[str, str]) -> list[int] | None:
    """The GPU of this process where Open MPI put several on a host; None leaves all to it."""
    if int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1 and "JAX_LOCAL_DEVICE_IDS" not in env:
        return [int(env["OMPI_COMM_WORLD_LOCAL_RANK"])]
    return None


def _number(env: Mapping[str, str], names: tuple[str, ...], given: int | None, flag: str) -> int:
    if given is not None:
        return given
    found = next((env[name] for name in names if name in env), None)
    if found is None:
        raise UserError(f"--coordinator needs {flag} (or the environment variable {names[0]})")
    if not found.isdigit():
        raise UserError(f"{flag} must be a number, got {found!r}")
    return int(found)


def _join(prefix: str, **arguments) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{prefix} the processes could not join: {reason}. Say who is who by --coordinator "
            "HOST:PORT --num-processes N --process-id I, and check that every host reaches that "
            "port"
        ) from error

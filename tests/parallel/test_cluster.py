"""No launcher's environment is ignored: one of several processes meets the others, or is refused."""

from __future__ import annotations

import pytest

from lora_jax.config import DistributedOptions
from lora_jax.errors import UserError
from lora_jax.parallel.cluster import announced, refuse_alone, resolved

JAX = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_JOB_ID": "7"}
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
SLICE = {"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


def test_jax_variables_make_one_run_of_two_processes() -> None:
    """jax#22436, #24399: two shells with these variables each trained alone and wrote the same files."""
    assert resolved(DistributedOptions(), JAX) == DistributedOptions("127.0.0.1:9476", 2, 1)
    given = DistributedOptions("10.0.0.2:8476", process_id=0)  # the command line wins
    assert resolved(given, JAX) == DistributedOptions("10.0.0.2:8476", 2, 0)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, r"coordinator_address \(or JAX_COORDINATOR_ADDRESS\)"),
        ({**JAX, "JAX_NUM_PROCESSES": "two"}, r"^JAX_NUM_PROCESSES=two: is not a whole number; give one"),
        ({**JAX, "JAX_PROCESS_ID": "2"}, "process_id 2: must be from 0 to 1"),
        ({k: JAX[k] for k in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID")}, r"\(or JAX_NUM_PROCESSES\): required"),
    ],
)  # fmt: skip
def test_wrong_or_incomplete_jax_variables_are_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolved(DistributedOptions(), environment)


@pytest.mark.parametrize("environment", [TORCHRUN, MPICH])
def test_processes_of_an_unknown_launcher_are_refused_immediately(
    environment: dict[str, str],
) -> None:
    """`torchrun --nproc_per_node 2 train.py`: both processes trained alone and wrote the same folder."""
    with pytest.raises(
        UserError, match=r"(torchrun|MPI).*each would train alone.*--distributed\.coordinator_address"
    ):
        resolved(DistributedOptions(), environment)


@pytest.mark.parametrize("environment", [SRUN, OPEN_MPI_5, POD, SLICE, SLICES])
def test_announced_processes_that_jax_has_not_found_are_refused(
    environment: dict[str, str],
) -> None:
    assert resolved(DistributedOptions(), environment) == DistributedOptions()  # JAX looks first
    with pytest.raises(UserError, match="each would train alone and write the same files"):
        refuse_alone(environment)


@pytest.mark.parametrize("environment", [TORCHRUN, MPICH, SRUN, OPEN_MPI_5])
def test_an_address_suffices_if_the_launcher_numbers_its_processes(environment: dict[str, str]) -> None:
    found = announced(environment)
    assert found is not None
    options = resolved(DistributedOptions("10.0.0.1:8476"), environment)
    assert options == DistributedOptions("10.0.0.1:8476", found.count, found.number)


@pytest.mark.parametrize("environment", [{}, JAX, TORCHRUN, SRUN, POD, SLICE])
def test_a_single_process_is_alone_in_any_environment(environment: dict[str, str]) -> None:
    assert resolved(DistributedOptions(num_processes=1), environment) == DistributedOptions(num_processes=1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {
            "SLURM_NTASKS": "16",
            "SLURM_PROCID": "0",
        },  # a batch script that starts its one program without srun
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"MEGASCALE_NUM_SLICES": "1"},
    ],
)
def test_a_process_without_announced_peers_trains_alone(environment: dict[str, str]) -> None:
    assert announced(environment) is None
    refuse_alone(environment)
    assert resolved(DistributedOptions(), environment) == DistributedOptions()


def test_a_port_alone_is_combined_with_the_environments_address() -> None:
    """jax#35905: on a TPU slice with port 8482 closed, no other port could be chosen."""
    assert resolved(DistributedOptions(coordinator_port=9000), SLICE).coordinator_port == 9000
    with pytest.raises(UserError, match="coordinator_port 9000: cannot be combined with"):
        resolved(DistributedOptions("10.0.0.1:8476", 2, 0, coordinator_port=9000), {})
    with pytest.raises(UserError, match="coordinator_port 70000: must be from 1 to 65535"):
        resolved(DistributedOptions(coordinator_port=70000), {})

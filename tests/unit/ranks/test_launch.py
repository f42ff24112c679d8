"""Who a rank is, from its environment alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from flexbench.core.errors import ConfigError
from flexbench.ranks.launch import Launch, detect_launch

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-4711@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "815",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "815", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def place(launch: Launch) -> tuple[str, int, int, int, int]:
    return (
        launch.launcher,
        launch.rank,
        launch.world_size,
        launch.local_rank,
        launch.local_world_size,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("none", 0, 1, 0, 1)),
        (OPEN_MPI, ("openmpi", 3, 4, 1, 2)),
        (HYDRA, ("mpich", 1, 2, 1, 2)),
        (SLURM, ("slurm", 4, 5, 0, 1)),
        (SLURM | {"SLURM_NODEID": "1", "SLURM_LOCALID": "1"}, ("slurm", 4, 5, 1, 2)),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        # a batch script is no step of Slurm, and runs once
        (BATCH_SCRIPT, ("none", 0, 1, 0, 1)),
        (BATCH_SCRIPT | OPEN_MPI, ("openmpi", 3, 4, 1, 2)),
        # mpirun starts its daemons with srun
        (SLURM | HYDRA, ("mpich", 1, 2, 1, 2)),
        # Slurm's own PMI
        (SLURM | {"PMI_RANK": "4", "PMI_SIZE": "5"}, ("slurm", 4, 5, 0, 1)),
        # srun, or mpirun, starts torchrun once a host, and torchrun starts the ranks
        (SLURM | TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        (OPEN_MPI | TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        # RANK alone is anybody's variable
        ({"RANK": "captain"}, ("none", 0, 1, 0, 1)),
    ],
)
def test_the_nearest_launcher_counts(environ, expected):
    assert place(detect_launch(environ)) == expected


def test_options_override_the_launcher():
    launch = detect_launch(OPEN_MPI, rank=1, world_size=3)
    assert place(launch) == ("options", 1, 3, 1, 3)
    assert launch.job_key is None
    assert detect_launch(OPEN_MPI, local_rank=0).local_rank == 0
    assert place(detect_launch({}, rank=0, world_size=2, local_rank=5)) == ("options", 0, 2, 5, 2)


@pytest.mark.parametrize(
    ("environ", "missing", "known_by"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK"),
        ({"PMI_RANK": "0"}, "MPI_LOCALNRANKS", "PMI_RANK"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_TASKS_PER_NODE",
            "SLURM_PROCID",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE", "RANK"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    ],
)
def test_variables_that_are_half_set_can_be_unset_or_overridden(environ, missing, known_by):
    with pytest.raises(ConfigError) as raised:
        detect_launch(environ)
    assert raised.value.message == (
        f"{missing}: is not set, though {known_by} is; unset it, or give --rank and --world-size"
    )
    assert place(detect_launch(environ, rank=1, world_size=3)) == ("options", 1, 3, 1, 3)
    del environ[known_by]
    assert place(detect_launch(environ)) == ("none", 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"rank": 0}, "--world-size"),
        ({"world_size": 2}, "--rank"),
        ({"rank": 2, "world_size": 2}, "--rank"),
        ({"rank": -1, "world_size": 2}, "--rank"),
        ({"rank": 0, "world_size": 0}, "--world-size"),
        ({"local_rank": -1}, "--local-rank"),
        ({"use_mpi": True}, "--use-mpi"),
        ({"use_mpi": True, "rank": 0, "world_size": 1}, "--use-mpi"),
    ],
)
def test_wrong_options_are_named(arguments, option):
    with pytest.raises(ConfigError) as raised:
        detect_launch({}, **arguments)
    assert raised.value.option == option


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, SLURM])
def test_use_mpi_takes_mpi_launchers(environ):
    assert detect_launch(environ, use_mpi=True) == detect_launch(environ)


def test_use_mpi_takes_nothing_else():
    with pytest.raises(ConfigError, match="start it with mpirun"):
        detect_launch(TORCHRUN, use_mpi=True)
    assert detect_launch(TORCHRUN | OPEN_MPI, use_mpi=True).launcher == "openmpi"
    assert detect_launch(OPEN_MPI, rank=3, world_size=4, use_mpi=True).launcher == "openmpi"
    with pytest.raises(ConfigError, match="rank 3 of 4, the options say rank 2 of 4"):
        detect_launch(OPEN_MPI, rank=2, world_size=4, use_mpi=True)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "four"}, "OMPI_COMM_WORLD_SIZE"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "0"}, "OMPI_COMM_WORLD_SIZE"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, "OMPI_COMM_WORLD_SIZE"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (HYDRA | {"PMI_SIZE": "1_0"}, "PMI_SIZE"),
        (HYDRA | {"MPI_LOCALNRANKS": ""}, "MPI_LOCALNRANKS"),
        (SLURM | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID"),
        (SLURM | {"SLURM_NODEID": "3"}, "SLURM_NODEID"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, "SLURM_STEP_TASKS_PER_NODE"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "0"}, "SLURM_STEP_TASKS_PER_NODE"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (TORCHRUN | {"RANK": "8"}, "RANK"),
        ({"RANK": "captain", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE"),
    ],
)
def test_malformed_variables_are_named(environ, variable):
    with pytest.raises(ConfigError) as raised:
        detect_launch(environ)
    assert raised.value.option == variable


def test_the_store_is_only_known_when_the_agent_serves_it():
    assert detect_launch(TORCHRUN).store_address == ("node-1", 29500)
    served_by_rank_0 = TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert detect_launch(served_by_rank_0).store_address is None
    assert detect_launch(OPEN_MPI).store_address is None


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, SLURM, TORCHRUN])
def test_a_job_has_one_key_fit_for_a_file_name(environ):
    key = detect_launch(environ).job_key
    assert key is not None
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,48}", key)
    assert key == detect_launch(environ).job_key


@pytest.mark.parametrize(
    ("environ", "change"),
    [
        (OPEN_MPI, {"PMIX_NAMESPACE": "prterun-host-4711_1"}),
        (OPEN_MPI, {"PMIX_NAMESPACE": "x" * 300}),
        (SLURM, {"SLURM_STEP_ID": "1"}),
        (TORCHRUN, {"TORCHELASTIC_RESTART_COUNT": "3"}),
        (TORCHRUN, {"MASTER_PORT": "29501"}),
        (TORCHRUN, {"TORCHELASTIC_RUN_ID": "../other"}),
    ],
)
def test_another_job_has_another_key(environ, change):
    assert detect_launch(environ | change).job_key != detect_launch(environ).job_key


def test_without_a_name_the_launcher_process_is_the_key():
    key = detect_launch(HYDRA, parent_pid=os.getpid()).job_key
    assert key is not None
    assert key.startswith(f"{os.getpid()}.")
    assert key != detect_launch(HYDRA, parent_pid=os.getppid()).job_key
    assert key != detect_launch(HYDRA, parent_pid=2**30).job_key


def test_a_shell_between_launcher_and_rank_does_not_change_the_key():
    program = (
        "import os; from flexbench.ranks.launch import detect_launch;"
        "print(detect_launch(os.environ).job_key)"
    )
    environ = {**os.environ, **HYDRA}
    direct = subprocess.check_output([sys.executable, "-c", program], env=environ)
    # The colon keeps the shell from becoming the program.
    wrapped = subprocess.check_output(
        ["/bin/sh", "-c", '"$0" -c "$1"; :', sys.executable, program], env=environ
    )
    assert direct == wrapped
    assert direct.startswith(f"{os.getpid()}.".encode())

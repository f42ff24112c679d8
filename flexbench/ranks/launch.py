"""Who this process is among the ranks of a job, from what its launcher has left in the environment.

Pure: it reads the mapping that it is given, and /proc to tell jobs apart. It imports no torch.

A launcher that was started by another one is nearer to the rank, and its variables are those that
count; the rank has inherited the other's. `mpirun` within an allocation of Slurm and `torchrun`
under `srun` or `mpirun` are common, so the search begins with them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError

MAX_PORT = 65535

# What a launcher is known by.
_OPEN_MPI = "OMPI_COMM_WORLD_RANK"
_HYDRA = "PMI_RANK"
_SLURM = "SLURM_PROCID"
_TORCHELASTIC = "TORCHELASTIC_RUN_ID"
_TORCH = "RANK"

_MAX_KEY_LENGTH = 40
_START_TIME_FIELD = 22  # of /proc/PID/stat, counted from 1
_PARENT_FIELD = 4


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A rank's place in its job."""

    launcher: str
    """What started it: openmpi, mpich (Intel MPI, too), slurm, torchrun, options, or none."""
    rank: int
    """Number of this process, from 0."""
    world_size: int
    """Number of ranks in the job."""
    local_rank: int
    """Number of this process among those on its host, which picks its GPU."""
    local_world_size: int
    """Ranks on this host. Options do not say it; for them, it is `world_size`."""
    job_key: str | None
    """The same for all ranks of a job on a host, another for every other job there; fit for a
    file's name. None when nothing tells: ranks that were started by hand, or a single one."""
    store_address: tuple[str, int] | None
    """Where torchrun's agent serves a TCPStore that all ranks reach."""


def detect_launch(
    environ: Mapping[str, str],
    *,
    rank: int | None = None,
    local_rank: int | None = None,
    world_size: int | None = None,
    use_mpi: bool = False,
    parent_pid: int | None = None,
) -> Launch:
    """Find out who this process is.

    `rank` and `world_size` come from options and override what a launcher says, `local_rank` does
    on its own; variables that a launcher left half-set are not even looked at then. With `use_mpi`,
    nothing but an MPI launcher will do. Raises ConfigError naming the option, or the variable, that
    is wrong.
    """
    chosen = _from_options(rank, world_size)
    if chosen is None or use_mpi:
        parent = os.getppid() if parent_pid is None else parent_pid
        found = _detect_launcher(environ, parent, only_mpi=use_mpi)
        if use_mpi and found is None:
            raise ConfigError(
                "--use-mpi",
                "this process was not started by an MPI launcher; start it with mpirun or srun, or "
                "leave the option out",
            )
        if chosen is not None and found is not None:
            _check_agreement(chosen, found)
        chosen = found or _single("none")
    if local_rank is not None:
        check_count("--local-rank", local_rank, minimum=0)
        chosen = replace(chosen, local_rank=local_rank)
    return chosen


def _single(launcher: str) -> Launch:
    return Launch(
        launcher=launcher,
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        job_key=None,
        store_address=None,
    )


def _from_options(rank: int | None, world_size: int | None) -> Launch | None:
    if rank is None and world_size is None:
        return None
    if world_size is None:
        raise ConfigError("--world-size", "is needed together with --rank")
    if rank is None:
        raise ConfigError("--rank", "is needed together with --world-size")
    check_count("--world-size", world_size, minimum=1)
    check_count("--rank", rank, minimum=0)
    if rank >= world_size:
        raise ConfigError("--rank", f"must be below --world-size, {world_size}, not {rank}")
    return replace(
        _single("options"),
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
    )


def _check_agreement(chosen: Launch, found: Launch) -> None:
    if (chosen.rank, chosen.world_size) != (found.rank, found.world_size):
        raise ConfigError(
            "--use-mpi",
            f"the launcher says rank {found.rank} of {found.world_size}, the options say rank "
            f"{chosen.rank} of {chosen.world_size}; leave --rank and --world-size out",
        )


def _detect_launcher(environ: Mapping[str, str], parent: int, *, only_mpi: bool) -> Launch | None:
    if _TORCHELASTIC in environ and not only_mpi:
        return _torchrun(environ, parent)
    if _OPEN_MPI in environ:
        return _open_mpi(environ, parent)
    has_step = _SLURM in environ and "SLURM_STEP_NUM_TASKS" in environ
    # Slurm's own PMI sets PMI_RANK as well, but not what hydra says of the host.
    if _HYDRA in environ and ("MPI_LOCALRANKID" in environ or not has_step):
        return _hydra(environ, parent)
    # A batch script is rank 0 of nothing: it has the number of a task, but belongs to no step.
    if has_step:
        return _slurm(environ, parent)
    if _TORCH in environ and "WORLD_SIZE" in environ and not only_mpi:
        return _torchrun(environ, parent)
    return None


def _open_mpi(environ: Mapping[str, str], parent: int) -> Launch:
    return _launch(
        environ,
        launcher="openmpi",
        known_by=_OPEN_MPI,
        rank=_OPEN_MPI,
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size=_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", _OPEN_MPI, minimum=1),
        job=lambda: environ.get("PMIX_NAMESPACE") or _launcher_of(parent, _OPEN_MPI),
    )


def _hydra(environ: Mapping[str, str], parent: int) -> Launch:
    return _launch(
        environ,
        launcher="mpich",
        known_by=_HYDRA,
        rank=_HYDRA,
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_world_size=_number(environ, "MPI_LOCALNRANKS", _HYDRA, minimum=1),
        job=lambda: _launcher_of(parent, "MPI_LOCALRANKID"),
    )


def _slurm(environ: Mapping[str, str], parent: int) -> Launch:
    job, step = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")
    return _launch(
        environ,
        launcher="slurm",
        known_by=_SLURM,
        rank=_SLURM,
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_world_size=_tasks_on_node(environ),
        job=lambda: f"{job}.{step}" if job and step else _launcher_of(parent, "SLURM_STEP_ID"),
    )


def _torchrun(environ: Mapping[str, str], parent: int) -> Launch:
    run = environ.get(_TORCHELASTIC)
    known_by = _TORCH if run is None else _TORCHELASTIC
    port, restarts = environ.get("MASTER_PORT"), environ.get("TORCHELASTIC_RESTART_COUNT")
    found = _launch(
        environ,
        launcher="torchrun",
        known_by=known_by,
        rank=_TORCH,
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", known_by, minimum=1),
        # A run's id is "none" unless the person gave one: its port tells two of them apart.
        job=lambda: f"{run}.{port}.{restarts}" if run else _launcher_of(parent, _TORCH),
    )
    # Without the agent's store, these variables say where rank 0 is to serve one: nobody does yet.
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not environ.get("MASTER_ADDR"):
        return found
    store_port = _number(environ, "MASTER_PORT", known_by, minimum=1, maximum=MAX_PORT)
    return replace(found, store_address=(environ["MASTER_ADDR"], store_port))


def _launch(
    environ: Mapping[str, str],
    *,
    launcher: str,
    known_by: str,
    rank: str,
    world_size: str,
    local_rank: str,
    local_world_size: int,
    job: Callable[[], str],
) -> Launch:
    """A Launch of what the variables of these names say; raises ConfigError if they disagree."""
    size = _number(environ, world_size, known_by, minimum=1)
    found = replace(
        _single(launcher),
        rank=_number(environ, rank, known_by),
        world_size=size,
        local_rank=_number(environ, local_rank, known_by),
        local_world_size=local_world_size,
    )
    if found.rank >= size:
        raise ConfigError(rank, f"must be below {world_size}, {size}, not {found.rank}")
    if local_world_size > size:
        raise ConfigError(
            world_size, f"is {size}, but there are {local_world_size} ranks on this host"
        )
    if found.local_rank >= local_world_size:
        raise ConfigError(
            local_rank,
            f"must be below the number of ranks on this host, {local_world_size}, not "
            f"{found.local_rank}",
        )
    return replace(found, job_key=_sanitized(job())) if size > 1 else found


def _text(environ: Mapping[str, str], name: str, known_by: str) -> str:
    if (text := environ.get(name)) is None:
        raise ConfigError(
            name,
            f"is not set, though {known_by} is; unset it, or give --rank and --world-size",
        )
    return text


def _number(
    environ: Mapping[str, str],
    name: str,
    known_by: str,
    *,
    minimum: int = 0,
    maximum: int | None = None,
) -> int:
    text = _text(environ, name, known_by)
    # Not int() alone: it takes "1_0", and digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(name, f"must be a whole number, not {text!r}")
    value = int(text)
    if value < minimum or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ConfigError(name, f"must be a whole number of {limits}, not {value}")
    return value


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Ranks on this host by Slurm's list for all of them: "2(x3),1" is 2, 2, 2 and 1."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = _text(environ, name, _SLURM)
    node = _number(environ, "SLURM_NODEID", _SLURM)
    first = 0
    for group in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", group.strip())
        if match is None or int(match[1]) < 1:
            raise ConfigError(name, f"must be a list like 2(x3),1, not {text!r}")
        first += int(match[2] or 1)
        if node < first:
            return int(match[1])
    raise ConfigError("SLURM_NODEID", f"is {node}, but {name} has {first} nodes")


def _launcher_of(parent: int, variable: str) -> str:
    """The process that started all ranks of this host, as its id and start time.

    That is the nearest ancestor which does not have the rank's `variable`: between the two may be
    a shell, or numactl, one for each rank.
    """
    pid = parent
    while pid > 1 and _has_variable(pid, variable):
        pid = int(_stat_field(pid, _PARENT_FIELD) or 0)
    if pid <= 1:  # the launcher has gone; what is left of it is the nearest that is known
        pid = parent
    return f"{pid}.{_stat_field(pid, _START_TIME_FIELD) or 'x'}"


def _has_variable(pid: int, variable: str) -> bool:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # somebody else's process, or a system without /proc
        return False
    return any(entry.startswith(f"{variable}=".encode()) for entry in content.split(b"\0"))


def _stat_field(pid: int, number: int) -> str | None:
    """A field of /proc/PID/stat, counted from 1 as in its manual, or None."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    # The second is the program's name in parentheses, which may have spaces and parentheses in it.
    rest = content.rpartition(")")[2].split()
    return rest[number - 3] if len(rest) > number - 3 else None


def _sanitized(key: str) -> str:
    """`key` as part of a file's name: short, and still another one for every other key."""
    clean = re.sub(r"[^A-Za-z0-9_.-]", "_", key)
    if clean == key and len(key) <= _MAX_KEY_LENGTH:
        return key
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{clean[:20]}-{digest[:16]}"

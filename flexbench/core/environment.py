"""What a record says of the machine and the software a run was measured with.

Only what helps to judge or repeat a run: no environment variables, no user or host name.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from flexbench import __version__

# Not "tokens": those are counted.
_SECRET_OPTION = re.compile(r"(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
REDACTED = "***"


def describe_machine() -> dict[str, Any]:
    """CPU, memory, GPUs and operating system of this machine."""
    return {
        "os": platform.platform(),
        "cpu": cpu_model(),
        "num_cpus": num_cpus(),
        "memory_bytes": memory_bytes(),
        "gpus": _gpus(),
    }


def describe_run(packages: Sequence[str]) -> dict[str, Any]:
    """What was called, with which versions, on what machine: the end of every record."""
    return {
        "command": redact_command_line(sys.argv),
        "versions": describe_versions(packages),
        "machine": describe_machine(),
    }


def may_have_gpu() -> bool:
    """Whether the system shows any sign of a GPU that torch could use.

    Asks for device files of NVIDIA's and AMD's drivers, so that torch need not be imported.
    """
    return any(os.path.exists(path) for path in _GPU_DEVICE_FILES)


def num_gpus() -> int | None:
    """GPUs by the device files of NVIDIA's driver; None where those say nothing."""
    numbers = [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]
    return len(numbers) or None


def describe_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python, flexbench and `packages`, None for one that is not installed."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "flexbench": __version__,
    }
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def redact_command_line(arguments: Sequence[str]) -> list[str]:
    """The command line with the values of options that carry secrets replaced by ***."""
    redacted: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_secret = name.startswith("-") and bool(_SECRET_OPTION.search(name))
        if hide_next:
            redacted.append(REDACTED)
        elif is_secret and equals:
            redacted.append(f"{name}={REDACTED}")
        else:
            redacted.append(_URL_CREDENTIALS.sub(f"{REDACTED}@", argument))
        hide_next = is_secret and not equals
    return redacted


def cpu_model() -> str:
    """The name of this machine's CPU, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def num_cpus() -> int:
    """How many CPUs this process may use."""
    return len(usable_cpus())


def usable_cpus() -> list[int]:
    """The numbers of the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None  # not POSIX


def available_memory_bytes() -> int | None:
    """Memory that a new process could use without swapping; None where nobody tells.

    A container's limit counts, where it is lower than what the machine has.
    """
    amounts = [_free_of_machine(), _free_of_container()]
    known = [amount for amount in amounts if amount is not None]
    return min(known) if known else None


def peak_resident_bytes() -> int:
    """The largest resident set of this process, since its start or the last reset."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_resident_bytes() -> None:
    """Begin anew with `peak_resident_bytes`, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def is_memory(folder: Path) -> bool:
    """Whether files in `folder` are kept in memory; False where the system does not tell."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False  # not Linux
    types = {mount[1]: mount[2] for mount in mounts if len(mount) > 2}
    path = folder.expanduser().absolute()
    nearest = next(parent for parent in (path, *path.parents) if str(parent) in {*types, "/"})
    return types.get(str(nearest), "") in ("tmpfs", "ramfs")


def _free_of_machine() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    return None


def _free_of_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        # Cached files are given back when memory is needed.
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
    except (OSError, ValueError):
        return None  # no control group of ours, or no limit: "max"
    return max(0, limit - used)


def _gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs by the driver's own tool, so that nothing heavy is imported for it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in answer.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            gpus.append({"name": name.strip(), "memory_bytes": int(mebibytes) * 2**20})
    return gpus

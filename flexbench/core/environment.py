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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexbench import __version__

# How names of secrets end. Not "tokens": those are counted. argparse takes --api-k for --api-key.
_NAME_END = r"(?:api[-_]ke?|key|token|secret|password|passwd|credentials?)"
# An option whose value is the next word.
_ENDS_IN_OPTION = re.compile(rf"(?<![^='\"])-[^\s='\"]*{_NAME_END}['\"]?$", re.IGNORECASE)
# The beginning of --x-key=value, or X_KEY=value.
_ASSIGNED_FIRST = re.compile(rf"[\w.-]*{_NAME_END}=", re.IGNORECASE)
_ASSIGNED = re.compile(rf"{_NAME_END}=", re.IGNORECASE)
# A word as a shell reads it. A quotation that has no end goes on to the end of the text.
_WORD = re.compile(
    r"""(?:[^\s"'\\]|\\(?:.|$)|"(?:\\.|[^"\\])*(?:"|\\?$)|'[^']*(?:'|$))+""", re.DOTALL
)
_QUOTE = re.compile(r"[\"']+")
_MAX_QUOTED_DEPTH = 5
_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
REDACTED = "***"
_DRIVER_TOOL = "nvidia-smi"
_DRIVER_TIMEOUT_S = 5
_DRIVER_FIELDS = "uuid,mig.mode.current,name,memory.total,memory.free"
_MAX_TEXT_LENGTH = 200
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class DriverGpu:
    """A GPU as NVIDIA's driver shows it. None: it does not tell.

    Of a GPU that is divided (MIG) the memory is not known: a process gets a part of it.
    """

    name: str | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    uuid: str | None = None


@dataclass(frozen=True, kw_only=True)
class GpuListing:
    """GPUs in an order. `problem` says why there are none, unless the driver's tool is missing.

    `is_order_uncertain`: torch may number them in another order.
    """

    gpus: tuple[DriverGpu, ...] = ()
    problem: str | None = None
    is_order_uncertain: bool = False


def describe_machine() -> dict[str, Any]:
    """CPU, memory, GPUs and operating system of this machine."""
    return {
        "os": platform.platform(),
        "cpu": cpu_model(),
        "num_cpus": num_cpus(),
        "num_cpus_installed": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in list_gpus().gpus],
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
    variable = os.environ.get(_VISIBLE)
    if variable is not None and not _parse_visible(variable):
        return False  # hidden from torch
    return any(os.path.exists(path) for path in _GPU_DEVICE_FILES)


def num_gpus() -> int | None:
    """GPUs by the device files of NVIDIA's driver; None where those say nothing."""
    numbers = [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]
    return len(numbers) or None


def describe_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python, flexbench and `packages`, None for one that is not installed."""
    from importlib import metadata  # which brings a mail parser along: nobody waits for that

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
    """The command line with the values of options that carry secrets replaced by ***.

    So are those of variables, NAME_KEY=value, and those in arguments that are command lines
    themselves.
    """
    return _redact_words(arguments, 0)


def _redact_words(words: Sequence[str], depth: int) -> list[str]:
    redacted: list[str] = []
    hide_next = False
    for word in words:
        redacted.append(REDACTED if hide_next else _redact_word(word, depth))
        hide_next = bool(_ENDS_IN_OPTION.search(word))
    return redacted


def _redact_word(text: str, depth: int) -> str:
    assigned = _ASSIGNED_FIRST.match(text)
    if assigned:
        return f"{assigned[0]}{REDACTED}"
    if depth > _MAX_QUOTED_DEPTH:
        return REDACTED  # nobody quotes like that: not worth the risk
    words = _WORD.findall(text)
    if words != [text]:
        between = _WORD.split(text)
        parts = zip(between, [*_redact_words(words, depth), ""], strict=True)
        return "".join(blank + word for blank, word in parts)
    quote = _QUOTE.search(text)
    if quote and re.search(r"\s", text[quote.end() :]):
        # A command line in a command line.
        before = _redact_word(text[: quote.start()], depth + 1)
        return f"{before}{quote[0]}{_redact_word(text[quote.end() :], depth + 1)}"
    assigned = _ASSIGNED.search(text)
    if assigned:
        return f"{text[: assigned.end()]}{REDACTED}"
    return _URL_CREDENTIALS.sub(f"{REDACTED}@", text)


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


def list_gpus() -> GpuListing:
    """All NVIDIA GPUs of this machine, by the driver's own tool: torch takes seconds to import."""
    tool = shutil.which(_DRIVER_TOOL)
    if tool is None:
        return GpuListing()
    try:
        answer = subprocess.run(  # noqa: S603 - the driver's tool, with constants
            [tool, f"--query-gpu={_DRIVER_FIELDS}", "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_DRIVER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return GpuListing(problem=f"{_DRIVER_TOOL} did not answer within {_DRIVER_TIMEOUT_S} s")
    except OSError as error:
        return GpuListing(problem=f"{_DRIVER_TOOL} could not be started: {error.strerror}")
    if answer.returncode != 0:
        words = _printable((answer.stdout.strip() or answer.stderr.strip()).partition("\n")[0])
        problem = f"{_DRIVER_TOOL} failed with exit code {answer.returncode}"
        return GpuListing(problem=f"{problem}: {words}" if words else problem)
    # Not splitlines: a name may have characters at which that splits.
    found = (_parse_gpu(line) for line in answer.stdout.split("\n"))
    gpus = tuple(gpu for gpu in found if gpu is not None)
    return GpuListing(gpus=gpus, problem=None if gpus else f"{_DRIVER_TOOL} lists no GPU")


def visible_gpus() -> GpuListing:
    """The GPUs that torch would see, as it would number them: cuda:0 is the first.

    CUDA_VISIBLE_DEVICES is read as torch and the driver read it.
    """
    listing = list_gpus()
    variable = os.environ.get(_VISIBLE)
    # torch puts the fastest one first, the driver's tool goes by the slots of the bus.
    is_uncertain = (
        len({(gpu.name, gpu.memory_bytes) for gpu in listing.gpus}) > 1
        and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    )
    if variable is None or not listing.gpus:
        return replace(listing, is_order_uncertain=is_uncertain)
    chosen: list[DriverGpu] = []
    is_by_number = False
    for element in _parse_visible(variable):
        is_by_number = isinstance(element, int)
        gpu = _find_gpu(element, listing.gpus)
        if gpu is None:
            break  # the driver takes nothing from there on
        if gpu.uuid is not None and gpu in chosen:
            chosen = []  # nor anything at all if one is named twice
            break
        chosen.append(gpu)
    return GpuListing(
        gpus=tuple(chosen),
        problem=None if chosen else f"{_VISIBLE}={_printable(variable)} hides all GPUs",
        is_order_uncertain=bool(chosen) and is_by_number and is_uncertain,
    )


def _parse_visible(variable: str) -> list[int | str]:
    """Numbers, or the beginnings of UUIDs, up to the first element that is none; each only once."""
    found: list[int | str] = []
    prefix = next((kind for kind in ("GPU-", "MIG-") if variable.startswith(kind)), None)
    for text in variable.split(","):
        element: int | str = text
        if prefix is None:
            # What follows the digits does not matter to the driver.
            match = re.match(r"\+?\d{1,9}", text.strip(), re.ASCII)
            if match is None:
                break
            element = int(match[0])
        elif not text.startswith(prefix):
            break
        if element in found:
            return []
        found.append(element)
    return found


def _find_gpu(element: int | str, gpus: Sequence[DriverGpu]) -> DriverGpu | None:
    """The one that a number or the beginning of a UUID stands for; None: no such one."""
    if isinstance(element, int):
        return gpus[element] if element < len(gpus) else None
    if element.startswith("MIG-"):
        return DriverGpu(name="GPU (MIG)")
    if any(gpu.uuid is None for gpu in gpus):
        return DriverGpu()  # one of them: nobody tells which
    matching = [gpu for gpu in gpus if (gpu.uuid or "").startswith(element)]
    return matching[0] if len(matching) == 1 else None


def _parse_gpu(line: str) -> DriverGpu | None:
    """A line with the values of _DRIVER_FIELDS; None for a warning among them.

    What cannot be read is not known: the line counts all the same, for the next ones' numbers.
    """
    fields = [field.strip() for field in line.split(",")]
    if len(fields) < 3:
        return None
    # A name may have commas. Where only the last three are told, the first two are not known.
    uuid, mig = (fields.pop(0), fields.pop(0)) if len(fields) >= 5 else ("", "")
    name = _printable(", ".join(fields[:-2]))
    is_divided = mig == "Enabled"
    total = None if is_divided else _mebibytes(fields[-2], minimum=1)
    return DriverGpu(
        name=f"{name} (MIG)" if name and is_divided else name or None,
        memory_bytes=total,
        free_bytes=None if total is None else _mebibytes(fields[-1], minimum=0),
        uuid=uuid if uuid.startswith("GPU-") else None,
    )


def _mebibytes(text: str, *, minimum: int) -> int | None:
    """Bytes; None for what is no number of at least `minimum` MiB that a GPU can have."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return None
    return int(text) * 2**20 if int(text) >= minimum else None


def _printable(text: str) -> str:
    """Without control characters, which would change what a terminal shows, and not endless."""
    return "".join(filter(str.isprintable, text)).strip()[:_MAX_TEXT_LENGTH]

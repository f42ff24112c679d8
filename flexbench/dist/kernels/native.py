"""Kernels in C for CPUs, compiled for the machine that they run on.

They are compiled once, in a second or two, and kept in the user's cache folder. Where there is no
compiler, or anything else goes wrong, torch computes instead: slower, the same but for rounding.
FLEXBENCH_NATIVE=0 asks for that, and FLEXBENCH_CFLAGS gives the compiler further options.

They compute with torch's own threads: they are linked to the OpenMP that torch has brought, as
threads of a second one would wait on each other's cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
# Sums in any order, so that they can be vectorized; infinities and NaN stay what they are.
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno"]
_FLAGS += ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # compilers keep to 256 bits of their own accord
_COMPILE_TIMEOUT_S = 60.0


_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's elements are, to hand to a kernel; null for None."""
    return None if tensor is None else tensor.data_ptr()


@cache
def function(name: str, parameters: str) -> Callable[..., Any]:
    """A kernel that returns nothing. There has to be a library.

    Of `parameters`, each letter is one: p a pointer, l int64_t, i int32_t, f float. They are
    converted by ctypes itself, which is several times as fast as to do it for each call.
    """
    kernels = library()
    assert kernels is not None
    found = getattr(kernels, name)
    found.argtypes, found.restype = [_TYPES[letter] for letter in parameters], None
    return cast("Callable[..., Any]", found)


@cache
def count(name: str, parameters: str) -> Callable[..., int]:
    """As `function`, of a kernel that returns an int64_t."""
    found = function(name, parameters)
    found.restype = ctypes.c_int64  # type: ignore[attr-defined]
    return found


@cache
def checked(name: str, parameters: str) -> Callable[..., Any]:
    """A kernel that takes memory of its own, and returns whether there was none.

    `parameters` are as for `function`. Calling it may raise MemoryError.
    """
    found = function(name, parameters)
    found.restype = ctypes.c_int32  # type: ignore[attr-defined]
    found.errcheck = _check_memory  # type: ignore[attr-defined]
    return found


def _check_memory(status: int, called: Callable[..., Any], arguments: object) -> int:  # noqa: ARG001
    if status != 0:
        raise MemoryError(f"there is no memory for the intermediate results of {called.__name__}")
    return status


@cache
def library() -> ctypes.CDLL | None:
    """All kernels, or None where there are none. Compiles them, if nobody has yet."""
    openmp = _torch_openmp()
    if os.environ.get("FLEXBENCH_NATIVE") == "0" or openmp is None:
        return None
    try:
        # What the kernel leaves open is looked for among what is loaded for all.
        ctypes.CDLL(str(openmp), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None


def _torch_openmp() -> Path | None:
    """GNU's OpenMP among torch's own libraries."""
    if platform.system() != "Linux":
        return None
    folder = Path(torch.__file__).parent / "lib"
    return next(iter(sorted(folder.glob("libgomp*.so*"))), None)


def _compiled() -> Path:
    """The library in the cache. Raises OSError or SubprocessError when it cannot be made."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    folder = _cache_folder()
    target = folder / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sources = [source for source in _SOURCES if source.suffix == ".c"]
        objects = [str(Path(scratch, f"{source.stem}.o")) for source in sources]
        _run(
            *(
                [compiler, *_flags(), "-c", str(source), "-o", compiled]
                for source, compiled in zip(sources, objects, strict=True)
            )
        )
        linked = Path(scratch, "kernels.so")
        # Without -fopenmp, which would bring another OpenMP along.
        # Kernels call each other, and no function of that name elsewhere.
        _run([compiler, "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(linked)])
        linked.replace(target)  # at once: other ranks do the same
    return target


def _flags() -> list[str]:
    return _FLAGS + shlex.split(os.environ.get("FLEXBENCH_CFLAGS", ""))


def _run(*commands: Sequence[str]) -> None:
    """Run commands side by side to their end. What they started ends with them, in time or not."""
    processes: list[subprocess.Popen[bytes]] = []
    expires_at = time.monotonic() + _COMPILE_TIMEOUT_S
    try:
        for command in commands:
            process = subprocess.Popen(  # noqa: S603 - the user's own compiler
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            processes.append(process)
        for process in processes:
            status = process.wait(max(0.0, expires_at - time.monotonic()))
            if status != 0:
                raise subprocess.CalledProcessError(status, process.args)
    finally:
        for process in processes:
            if process.poll() is None:
                # A compiler is several processes, of which the one that takes long is not this one.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _cache_folder() -> Path:
    """A folder that only this user can write to: code is loaded from there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(base, "flexbench", "kernels")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written to by others")
    return folder


def _fingerprint(compiler: str) -> str:
    """Of all that decides what is compiled: the sources, how, by what, and for which CPU."""
    version = subprocess.run(  # noqa: S603 - the user's own compiler
        [compiler, "--version"], check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout
    cpu = torch.backends.cpu.get_cpu_capability() + _cpu_name()
    sources = [source.read_bytes() for source in _SOURCES]
    parts = (*sources, " ".join(_flags()).encode(), version, cpu.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("vendor_id", "model name", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

"""Attention of one new position on a CPU, compiled for the machine that it runs on.

`decode_attention.c` is compiled once, in a second or two, and kept in the user's cache folder.
Where there is no compiler, or anything else goes wrong, torch computes instead: slower, the same
but for rounding. FLEXBENCH_NATIVE=0 asks for that.

It computes with torch's own threads: it is linked to the OpenMP that torch has brought, as threads
of a second one would wait on each other's cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("decode_attention.c")
# Sums in any order, so that they can be vectorized; infinities and NaN stay what they are.
_FLAGS = ["-O3", "-march=native", "-std=c11", "-fPIC", "-fopenmp", "-fno-math-errno"]
_FLAGS += ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # compilers keep to 256 bits of their own accord
_COMPILE_TIMEOUT_S = 60.0
_BLOCK = 16  # BLOCK in the source
_FUNCTIONS = {torch.float32: "attend_float", torch.bfloat16: "attend_bfloat16"}


def is_available(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this type. Compiles it, if nobody has yet."""
    return dtype in _FUNCTIONS and _library() is not None


def describe(dtype: torch.dtype, *, on_gpu: bool) -> str:
    """What computes the attention of a new token, in a word: 'compiled' or 'torch'."""
    return "torch" if on_gpu or not is_available(dtype) else "compiled"


def decode_attention(
    q_RD: torch.Tensor,
    k_LRD: torch.Tensor,
    v_LRD: torch.Tensor,
    is_real_RL: torch.Tensor | None,
) -> torch.Tensor:
    """Attention (R, D) of one new position over all that are real, on a CPU.

    `k_LRD` and `v_LRD` are contiguous, of the type of `q_RD`, for which `is_available` has to hold;
    `is_real_RL` is bool. The scale is D^-0.5.
    """
    library = _library()
    assert library is not None
    (length, num_rows, width), dtype = k_LRD.shape, k_LRD.dtype
    assert k_LRD.is_contiguous()
    assert v_LRD.is_contiguous()
    assert v_LRD.dtype == q_RD.dtype == dtype
    q_RD = q_RD.contiguous()
    mask = None if is_real_RL is None else is_real_RL.contiguous()
    out = torch.empty_like(q_RD)
    tasks = -(-num_rows // _BLOCK)
    scratch = torch.empty(tasks * (length + width) * _BLOCK)
    getattr(library, _FUNCTIONS[dtype])(
        *map(_address, (q_RD, k_LRD, v_LRD, mask, out, scratch)),
        *map(ctypes.c_int64, (length, num_rows, width)),
        ctypes.c_float(width**-0.5),
    )
    return out


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@cache
def _library() -> ctypes.CDLL | None:
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
    target = folder / f"decode_attention-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "kernel.o"), Path(scratch, "kernel.so")
        _run(compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled))
        # Without -fopenmp, which would bring another OpenMP along.
        _run(compiler, "-shared", str(compiled), "-o", str(linked))
        linked.replace(target)  # at once: other ranks do the same
    return target


def _run(*command: str) -> None:
    subprocess.run(  # noqa: S603 - the user's own compiler
        command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S
    )


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
    """Of all that decides what is compiled: the source, how, by what, and for which CPU."""
    version = subprocess.run(  # noqa: S603 - the user's own compiler
        [compiler, "--version"], check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout
    cpu = torch.backends.cpu.get_cpu_capability() + _cpu_name()
    parts = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, cpu.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("vendor_id", "model name", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

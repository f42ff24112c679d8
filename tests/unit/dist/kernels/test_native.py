"""How the compiled kernel is made, found, and done without."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.kernels import decode_attention, native, panel_product  # noqa: E402

ASK = "from flexbench.dist.kernels import native; print(native.library() is not None)"
HAS_COMPILER = (
    sys.platform == "linux"
    and shutil.which(os.environ.get("CC", "cc")) is not None
    and native._torch_openmp() is not None
)


def ask(cache: Path, **variables: str) -> str:
    """Whether another process finds the kernel."""
    return subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "FLEXBENCH_NATIVE": "", "XDG_CACHE_HOME": str(cache), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler, or no OpenMP in torch")
def test_it_is_compiled_once(tmp_path: Path) -> None:
    assert ask(tmp_path) == "True"
    (made,) = (tmp_path / "flexbench" / "kernels").iterdir()
    before = made.stat()
    assert ask(tmp_path, CC="false" if shutil.which("false") else "") == "False"
    assert ask(tmp_path) == "True"
    assert made.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler, or no OpenMP in torch")
def test_all_of_it_is_there_where_the_cpu_has_what_it_takes(tmp_path: Path) -> None:
    """Else every test of a kernel could be skipped, and nobody would know."""
    code = """
import torch
from flexbench.dist.kernels import (
    decode_attention, decode_layer, four_bits, four_bit_layouts, panel_product, prefill_attention
)
from flexbench.dist.policy import CompressionConfig

for dtype in (torch.float32, torch.bfloat16):
    assert panel_product.fits(dtype, 64)
    assert prefill_attention.fits(dtype, 64)
    assert decode_layer.fits(dtype, 64)
    assert decode_attention.is_available(dtype)
assert four_bit_layouts.Panels.is_available()
assert four_bits.fits((64, 64), CompressionConfig(group_size=64), "cpu")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLEXBENCH_NATIVE": "", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    assert ask(tmp_path, CC="no-such-compiler") == "False"
    assert ask(tmp_path, FLEXBENCH_NATIVE="0") == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="there are no kernels elsewhere")
def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    compiler = tmp_path / "cc"
    compiler.write_text(
        f"#!/bin/sh\nsleep 600 &\necho $! >{pid_file}.part\nmv {pid_file}.part {pid_file}\nwait\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "_COMPILE_TIMEOUT_S", 2.0)
    with pytest.raises(subprocess.TimeoutExpired):
        native._run([str(compiler)], ["true"])
    child = int(pid_file.read_text())
    expires_at = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < expires_at, f"{child} still runs"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no kernels elsewhere")
def test_a_compiler_that_fails_is_told_from_one_that_does_not() -> None:
    native._run(["true"], ["true"])
    with pytest.raises(subprocess.CalledProcessError, match="'false'"):
        native._run(["true"], ["false"], ["sleep", "600"])  # which is not waited for


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "flexbench" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert ask(tmp_path) == "False"
    assert list(folder.iterdir()) == []


def test_other_types_have_none() -> None:
    for dtype in (torch.float16, torch.float64):
        assert not decode_attention.is_available(dtype)
        assert not panel_product.fits(dtype, 64)


ON_ANOTHER_CPU = """
import sys
import torch
from torch.nn import functional
from flexbench.dist.kernels import native, panel_product
from flexbench.dist.kernels.decode_attention import decode_attention
from flexbench.dist.kernels.decode_layer import Affine, AttentionHalf, Decoder
from flexbench.dist.kernels.decode_layer import KeysValues, MlpHalf, Norm
from flexbench.dist.kernels.four_bit_layouts import Panels
from flexbench.dist.kernels.four_bits import FourBitMap, pack
from flexbench.dist.kernels.panel_product import PanelMatrix
from flexbench.dist.kernels.prefill_attention import prefill_attention
from flexbench.dist.policy import CompressionConfig

WIDTH, HEADS, PAST = 128, 2, 33
assert native.library() is not None
assert panel_product.is_widened(torch.bfloat16) is (sys.argv[1] == "widened")
assert Panels.is_available()
torch.manual_seed(0)


def affine(*shape):
    weight, bias = torch.randn(*shape) / shape[1] ** 0.5, torch.randn(shape[0])
    weight, bias = weight.to(dtype), bias.to(dtype)
    panels = PanelMatrix.of([weight]).in_panels()
    return Affine(panels, bias), lambda x: x @ weight.double().T + bias.double()


for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.04)):
    norm = Norm(torch.randn(WIDTH).to(dtype), torch.randn(WIDTH).to(dtype), 1e-5, True)

    def normed(x):
        weight, bias = norm.weight.double(), norm.bias.double()
        return functional.layer_norm(x, (WIDTH,), weight, bias, norm.epsilon)

    def assert_close(found, expected):
        assert found.dtype == dtype
        limit = tolerance * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)

    for rows in (1, 5, 13, 130):
        x = torch.randn(rows, WIDTH).to(dtype)
        weight = torch.randn(50, WIDTH).to(dtype)
        assert_close(PanelMatrix.of([weight]).apply(x), x.double() @ weight.double().T)
        wide, weight_of_wide = torch.randn(rows, 2050).to(dtype), torch.randn(50, 2050).to(dtype)
        found = PanelMatrix.of([weight_of_wide]).apply(wide)
        assert_close(found, wide.double() @ weight_of_wide.double().T)
        config = CompressionConfig(group_size=32)
        compressed = FourBitMap(pack(weight, config), (50, WIDTH), config, dtype)
        of_levels = compressed.dense().double()
        found = compressed.apply(x).double()
        torch.testing.assert_close(found, x.double() @ of_levels.T, rtol=0, atol=0.3)
    x = torch.randn(13, 1, WIDTH).to(dtype)
    (wide, into), (narrow, out_of) = affine(70, WIDTH), affine(WIDTH, 70)
    found = Decoder([MlpHalf(norm, wide, narrow)], []).forward(x)
    assert_close(found, x.double() + out_of(into(normed(x.double())).relu()))
    q, k, v = torch.randn(3, 1, PAST, 4, 64).to(dtype).unbind(0)
    heads = [t.transpose(1, 2).double() for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert_close(prefill_attention(q, k, v), expected)
    # Of two prompts, the second is shorter, and its first positions are padding.
    both = [torch.cat([t, t.roll(3, dims=1)]) for t in (q, k, v)]
    found = prefill_attention(*both, torch.tensor([0, 3]))
    shorter = [t[:, :, : PAST - 3] for t in heads]
    last = functional.scaled_dot_product_attention(*shorter, is_causal=True).transpose(1, 2)
    assert_close(found, torch.cat([expected, torch.cat([0 * expected[:, :3], last], dim=1)]))
    assert_close(decode_attention(q[0, -1], k[0], v[0], None), expected[0, -1])
    (qkv, to_qkv), (out, from_heads) = affine(3 * WIDTH, WIDTH), affine(WIDTH, WIDTH)
    keys, values = torch.randn(2, PAST, 13 * HEADS, WIDTH // HEADS).to(dtype).unbind(0)
    half = AttentionHalf(norm, qkv, out, HEADS)
    found = Decoder([half], [KeysValues(keys, values)]).forward(x, PAST)
    q, k, v = to_qkv(normed(x.double())).view(13, 3, HEADS, -1).unbind(1)
    assert_close(keys[-1].view(k.shape), k)
    assert_close(values[-1].view(v.shape), v)
    q, k, v = (t.reshape(-1, 13 * HEADS, WIDTH // HEADS).double() for t in (q, keys, values))
    weights = (torch.einsum("prd,lrd->rl", q, k) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
    attended = torch.einsum("rl,lrd->rd", weights, v).reshape(13, 1, WIDTH)
    assert_close(found, x.double() + from_heads(attended))
"""

FOLDER = Path(__file__).parent
BY_HAND = [f"-include {FOLDER / f'{name}_by_hand.h'}" for name in ("avx512", "bfloat16")]
# Compiled for other CPUs than this one, which has to have what they have, but for instructions of
# our own making.
OTHER_CPUS = {
    "without AVX": ("-march=x86-64", (), "widened"),
    "without AVX-512": ("-march=x86-64-v3", ("avx2", "fma"), "widened"),
    "without bfloat16": ("-march=skylake-avx512", ("avx512f", "avx512bw"), "widened"),
    "with bfloat16": (
        f"-march=skylake-avx512 {BY_HAND[1]}",
        ("avx512f", "avx512bw"),
        "in pairs",
    ),
    "without bfloat16, by hand": (f"-march=x86-64-v3 -Og {BY_HAND[0]}", ("avx2", "fma"), "widened"),
    "with bfloat16, by hand": (
        f"-march=x86-64-v3 -Og {' '.join(BY_HAND)}",
        ("avx2", "fma"),
        "in pairs",
    ),
}


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler, or no OpenMP in torch")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the CPU is no x86")
@pytest.mark.parametrize("name", OTHER_CPUS)
def test_it_is_compiled_for_other_cpus_too(tmp_path: Path, name: str) -> None:
    """Other sizes of vectors, and bfloat16 multiplied in pairs or widened first."""
    flags, needed, expected = OTHER_CPUS[name]
    missing = set(needed) - set(Path("/proc/cpuinfo").read_text().split())
    if missing:
        pytest.skip(f"the CPU has no {', '.join(sorted(missing))}")
    done = subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_CPU, expected],
        env={
            **os.environ,
            "FLEXBENCH_NATIVE": "",
            "XDG_CACHE_HOME": str(tmp_path),
            "FLEXBENCH_CFLAGS": flags,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

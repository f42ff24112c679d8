"""How the compiled kernel is made, found, and done without."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
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

has_bfloat16 = "avx512_bf16" in open("/proc/cpuinfo").read()
for dtype, expected in ((torch.float32, True), (torch.bfloat16, has_bfloat16)):
    assert panel_product.fits(dtype, 64) is expected
    assert prefill_attention.fits(dtype, 64) is expected
    assert decode_layer.fits(dtype, 64) is expected
    assert decode_attention.is_available(dtype)
assert four_bit_layouts.Panels.is_available() is has_bfloat16
assert four_bits.fits((64, 64), CompressionConfig(group_size=64), "cpu") or not has_bfloat16
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


ON_AN_OLDER_CPU = """
import torch
from torch.nn import functional
from flexbench.dist.kernels import native, panel_product
from flexbench.dist.kernels.decode_attention import decode_attention
from flexbench.dist.kernels.decode_layer import Affine, MlpHalf, Norm
from flexbench.dist.kernels.prefill_attention import prefill_attention

assert native.library() is not None
assert not panel_product.fits(torch.bfloat16, 64)
x, weight = torch.randn(13, 64), torch.randn(50, 64)
y = panel_product.PanelMatrix([weight]).apply(x)
torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)
inner = torch.randn(70, 64)
norm = Norm(torch.randn(64), torch.randn(64), 1e-5, True)
wide, narrow = (panel_product.PanelMatrix([w]).in_panels() for w in (inner, inner.T))
bias = torch.zeros(70)
found = MlpHalf(norm, Affine(wide, bias), Affine(narrow, bias[:64])).forward(x[:, None])
normed = functional.layer_norm(x, (64,), norm.weight, norm.bias, norm.epsilon)
expected = x + (normed @ inner.T).relu() @ inner
torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-3)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
    q, k, v = torch.randn(3, 1, 33, 4, 64).to(dtype).unbind(0)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    if dtype == torch.float32:
        torch.testing.assert_close(prefill_attention(q, k, v), expected, rtol=0, atol=tolerance)
    newest = decode_attention(q[0, -1], k[0], v[0], None)
    torch.testing.assert_close(newest, expected[0, -1], rtol=0, atol=tolerance)
"""


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler, or no OpenMP in torch")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the CPU is no x86")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_it_is_compiled_for_older_cpus_too(tmp_path: Path, cpu: str) -> None:
    """Without AVX-512, and without AVX: other sizes of vectors, and no products of bfloat16."""
    if cpu == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the CPU has no AVX2")
    done = subprocess.run(
        [sys.executable, "-c", ON_AN_OLDER_CPU],
        env={
            **os.environ,
            "FLEXBENCH_NATIVE": "",
            "XDG_CACHE_HOME": str(tmp_path),
            "FLEXBENCH_CFLAGS": f"-march={cpu} -mno-avx512f",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

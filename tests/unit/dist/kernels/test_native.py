"""How the compiled kernel is made, found, and done without."""

from __future__ import annotations

import os
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
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **variables},
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

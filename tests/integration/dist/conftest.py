"""Tiny models, ranks that are started by hand, and jobs that a launcher starts."""

from __future__ import annotations

import ctypes
import ipaddress
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexbench.cli import main
from flexbench.core.fork_server import fork_server
from tests.integration.conftest import FLEXBENCH, Command

LONG_S = 120  # on a loaded machine, what takes a moment may take this long
MPIRUN = Path(sys.executable).with_name("mpirun")
# What a process of `flexbench dist` spends its first seconds with.
_PRELOAD = ("flexbench.dist.benchmark", "flexbench.dist.tables", "tests.integration.dist.conftest")
_CLONE_NEWNET = 0x40000000
_LISTEN = "0A"  # in /proc/net/tcp


# --- models ---


def write_config(folder: Path, **changed: Any) -> dict[str, Any]:
    """Write the config.json of an OPT model, tiny but for what is `changed`."""
    values = {
        "model_type": "opt",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "ffn_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        **changed,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    return values


def write_model(folder: Path, **changed: Any) -> Path:
    """Write such a model, with random weights in Hugging Face's format: one shard a layer.

    The first and the last shard have the rest as well. Returns `folder`.
    """
    import torch
    from safetensors.torch import save_file

    values = write_config(folder, **changed)
    hidden, ffn = values["hidden_size"], values["ffn_dim"]
    last = values["num_hidden_layers"] - 1
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for layer in range(last + 1):
        shapes = {}
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, hidden),
            ("self_attn.v_proj", hidden, hidden),
            ("self_attn.out_proj", hidden, hidden),
            ("fc1", ffn, hidden),
            ("fc2", hidden, ffn),
        ):
            shapes[f"layers.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"layers.{layer}.{name}.bias"] = (rows,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{layer}.{name}.weight"] = (hidden,)
            shapes[f"layers.{layer}.{name}.bias"] = (hidden,)
        if layer == 0:
            shapes["embed_tokens.weight"] = (values["vocab_size"], hidden)
            shapes["embed_positions.weight"] = (values["max_position_embeddings"] + 2, hidden)
        if layer == last:
            shapes["final_layer_norm.weight"] = shapes["final_layer_norm.bias"] = (hidden,)
        tensors = {}
        for name, shape in shapes.items():
            # Large enough for tokens to depend on prompts, and no two to be about equally likely.
            deviation = 0.05 if len(shape) == 1 else 0.3 if "embed" in name else 0.5
            weight = torch.randn(shape, generator=generator) * deviation
            is_scale = name.endswith("norm.weight")
            tensors[f"model.decoder.{name}"] = weight + 1 if is_scale else weight
        shard = f"model-{layer:05}.safetensors"
        save_file(tensors, folder / shard)
        weight_map.update(dict.fromkeys(tensors, shard))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT model of a few kilobytes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


# --- ranks that are started by hand ---


class Rank:
    """A process that is `flexbench dist`, forked off one that has torch loaded already."""

    def __init__(
        self,
        arguments: list[str],
        environ: Mapping[str, str],
        folder: Path,
        name: str,
        namespace: str | None,
    ) -> None:
        self._stdout, self._stderr = folder / f"{name}.stdout", folder / f"{name}.stderr"
        for path in (self._stdout, self._stderr):
            path.touch()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_become_a_rank,
            args=(arguments, dict(environ), folder, self._stdout, self._stderr, namespace),
        )
        self._process.start()
        self.process = psutil.Process(self._process.pid)

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    @property
    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def wait_for(self, probe: Callable[[], Any], what: str) -> None:
        expires_at = time.monotonic() + LONG_S
        while not probe():
            assert not self.has_ended, f"ended before {what}: {self.stderr}"
            assert time.monotonic() < expires_at, f"no {what}; standard error: {self.stderr}"
            time.sleep(0.02)

    def wait_for_text(self, text: str) -> None:
        """Wait until `text` is in standard error."""
        self.wait_for(lambda: text in self.stderr, repr(text))

    def listening_addresses(self) -> set[str]:
        """The addresses that it listens at, in whatever network it is: psutil knows our own only."""
        place = Path(f"/proc/{self.process.pid}")
        sockets = {os.readlink(file) for file in (place / "fd").iterdir() if file.is_symlink()}
        found = set()
        for table in ("tcp", "tcp6"):
            for line in (place / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in sockets:
                    number = bytes.fromhex(fields[1].partition(":")[0])
                    # Words of 32 bits in the order of this machine, which is little-endian.
                    words = [number[i : i + 4][::-1] for i in range(0, len(number), 4)]
                    found.add(str(ipaddress.ip_address(b"".join(words))))
        return found

    def finish(self, timeout_s: float = LONG_S) -> int:
        """Wait for the end; the exit code, or the number of the signal below 0."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        assert code is not None, f"still there after {timeout_s} s: {self.stderr}"
        return code

    def end(self) -> None:
        self._process.kill()
        self._process.join(LONG_S)
        self._process.close()


def _become_a_rank(
    arguments: list[str],
    environ: dict[str, str],
    folder: Path,
    stdout: Path,
    stderr: Path,
    namespace: str | None,
) -> None:
    # As in a terminal; the fork server has no use for Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.setsid()
    os.chdir(folder)
    os.environ.update(environ)
    tempfile.tempdir = None  # what the process that was forked has found out
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    if namespace is not None:
        network = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        assert ctypes.CDLL(None).setns(network, _CLONE_NEWNET) == 0
        os.close(network)
    sys.argv = ["flexbench", *arguments]
    main()


class Hand:
    """Starts ranks of a job, all in one folder; ends them at the end of its `with` block."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder = folder
        self.temporary = temporary
        self.ranks: list[Rank] = []

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for rank in self.ranks:
            rank.end()

    def start(
        self,
        *arguments: object,
        environ: Mapping[str, object] | None = None,
        namespace: str | None = None,
    ) -> Rank:
        """Start `flexbench dist` with arguments, variables, and in a network of its own."""
        # Threads of several ranks would be in each other's way.
        variables = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        variables |= {name: str(value) for name, value in (environ or {}).items()}
        name = f"rank-{len(self.ranks)}"
        command = ["dist", *map(str, arguments)]
        self.ranks.append(Rank(command, variables, self.folder, name, namespace))
        return self.ranks[-1]

    def start_all(self, world_size: int, *arguments: object, missing: int = 0) -> list[Rank]:
        """Start all ranks of a job, but for the `missing` last ones."""
        place = () if world_size == 1 else ("--world-size", world_size, "--port", free_port())
        ranks = []
        for number in range(world_size - missing):
            rank = ("--rank", number) if place else ()
            ranks.append(self.start(*place, *rank, *arguments))
        return ranks

    def endings(self) -> list[tuple[str, str]]:
        """How the runs in its folder that failed have ended."""
        return endings_in(self.folder)

    def temporary_files(self) -> list[str]:
        """What is left in the folder for temporary files."""
        return [str(path) for path in self.temporary.rglob("*")]


def records_in(folder: Path) -> list[dict[str, Any]]:
    """The records of the default --output in a folder."""
    path = folder / "results" / "dist.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def endings_in(folder: Path) -> list[tuple[str, str]]:
    """Status and error of the records in a folder, all of which have to be of failed runs."""
    return [(record["status"], record["error"]) for record in records_in(folder)]


def tokens_in(output: str) -> dict[int, list[int]]:
    """The prompts' new tokens, which --verbose 2 shows."""
    found = re.findall(r"^Prompt (\d+): (\[[\d,\s]*\])", output, re.MULTILINE)
    return {int(prompt): json.loads(tokens) for prompt, tokens in found}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def _loaded() -> Iterator[None]:
    """A fork server that has imported what a rank spends its first seconds with."""
    with fork_server(_PRELOAD):
        yield


@pytest.fixture
def hand(_loaded: None, tmp_path: Path, temporary_folder: Path) -> Iterator[Hand]:
    """Starts ranks by hand in `tmp_path`."""
    with Hand(tmp_path, temporary_folder) as hand:
        yield hand


# --- jobs that a launcher starts ---


class Job(Command):
    """`mpirun flexbench dist`, say."""

    def __init__(self, program: Iterable[object], folder: Path, temporary: Path) -> None:
        super().__init__(list(map(str, program)), folder, temporary)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def endings(self) -> list[tuple[str, str]]:
        """How the runs in its folder that failed have ended."""
        return endings_in(self.folder)

    def rank(self, number: int, variable: str = "OMPI_COMM_WORLD_RANK") -> psutil.Process:
        """The process of a rank, as soon as it exists."""

        def find() -> psutil.Process | None:
            for process in self.family():
                if process.environ().get(variable) == str(number):
                    return process
            return None

        found: psutil.Process = self.wait_for(find, f"rank {number}", LONG_S)
        return found

    def temporary_files(self) -> list[str]:
        """What is left in the folder for temporary files, mpirun's own left out."""
        paths = (path.relative_to(self.temporary) for path in self.temporary.rglob("*"))
        return [str(path) for path in paths if not path.parts[0].startswith("ompi.")]


@pytest.fixture
def launch(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Job]]:
    """Starts a program in `tmp_path`, or a folder below it."""
    set_variables(monkeypatch)
    with ExitStack() as jobs:

        def start(*program: object, folder: str = ".") -> Job:
            place = tmp_path / folder
            place.mkdir(exist_ok=True)
            return jobs.enter_context(Job(program, place, temporary_folder))

        yield start


def set_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mpirun run as root, and ranks not be in each other's way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")


def mpirun(num_ranks: int, *arguments: object) -> tuple[object, ...]:
    """The command line of mpirun that starts ranks of `flexbench dist` with arguments."""
    return (MPIRUN, "--oversubscribe", "-np", num_ranks, *FLEXBENCH, "dist", *arguments)

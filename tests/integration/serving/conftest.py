"""Scripted HTTP servers, which know what they did."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

_MOCK_SERVER = Path(__file__).parents[3] / "benchmarks" / "mock_server.py"
LONG_S = 20  # on a loaded machine, what takes a moment may take this long


class MockServer:
    """A process of benchmarks/mock_server.py, started with its options."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, str(_MOCK_SERVER), "--end-with-parent", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self.process.stdout is not None
        # One line of JSON; it comes with the first write.
        readable, _, _ = select.select([self.process.stdout], [], [], LONG_S)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.end()
            raise AssertionError(f"the mock server did not start: {command}")
        ready = json.loads(line)
        self.port: int = ready["port"]
        self.url: str = ready["url"]

    def __enter__(self) -> MockServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def truth(self) -> dict[str, Any]:
        """What it did until now (over plain HTTP only; with TLS, see `stop`)."""
        with urlopen(f"{self.url}/mock/truth", timeout=LONG_S) as response:  # noqa: S310
            truth: dict[str, Any] = json.load(response)
        return truth

    def reset(self) -> None:
        """Let it forget what it did."""
        request = Request(f"{self.url}/mock/reset", method="POST")  # noqa: S310
        urlopen(request, timeout=LONG_S).close()  # noqa: S310

    def stop(self) -> dict[str, Any]:
        """End it; what it did."""
        self.process.terminate()
        output, _ = self.process.communicate(timeout=LONG_S)
        truth: dict[str, Any] = json.loads(output)
        return truth

    def end(self) -> None:
        """Kill it, if it is still there."""
        self.process.kill()
        self.process.wait(LONG_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def mock_server() -> Iterator[Callable[..., MockServer]]:
    """Starts mock servers with options: `mock_server("--ttft", "50ms")`."""
    with ExitStack() as servers:
        yield lambda *options: servers.enter_context(MockServer(*options))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that nobody vouches for, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
            ),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        timeout=LONG_S,
    )
    return certificate, key

"""How benchmarks/dist_vs_peers.py and the programs beside this file talk to each other.

Each of them runs in the environment of one system, with settings as JSON on its command line. It
loads a model folder once and says so with a line of JSON on standard output; then it answers each
line on standard input, which has prompts, with a line that has the time and the new tokens. It ends
with its standard input. Only the standard library is used here: every environment has that.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Settings:
    """What a worker is told before it loads anything."""

    folder: str
    """With config.json, tokenizer.json and weights in the safetensors format."""
    dtype: str
    """float32 or bfloat16; int8 where a system has that."""
    num_threads: int
    max_batch_size: int
    max_length: int
    """Of a prompt and its new tokens."""
    converted_folder: str
    """Where a system that reads no safetensors keeps the model in its own format."""


class Engine(Protocol):
    """A system with a loaded model."""

    versions: dict[str, str]
    """Of the libraries that do the work."""

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt, chosen greedily; no token ends a prompt."""


def serve(load: Callable[[Settings], Engine]) -> None:
    """Load, then answer until standard input ends. What is printed otherwise goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    end_with_parent()
    settings = Settings(**json.loads(sys.argv[1]))
    started_at = time.perf_counter()
    try:
        engine = load(settings)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to know
        _answer(answers, _told(error))
        return
    load_s = time.perf_counter() - started_at
    _answer(answers, {"versions": engine.versions, "load_s": load_s})
    for line in sys.stdin:
        _answer(answers, _timed(engine, json.loads(line)))


def _timed(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    started_at = time.perf_counter()
    try:
        tokens = engine.generate(request["prompts"], request["num_new_tokens"])
    except Exception as error:  # noqa: BLE001 - likewise
        return _told(error)
    return {"seconds": time.perf_counter() - started_at, "tokens": tokens}


def _told(error: Exception) -> dict[str, str]:
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}"}


def _answer(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def end_with_parent() -> None:
    """Have the system end this process when its parent has ended, even while it is stopped."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it ended before that
        sys.exit(1)

"""What a run of `flexbench serving` measures: prompts, load, limits. Each part checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from flexbench.core.checks import check_count, check_seconds, check_seed
from flexbench.core.errors import ConfigError
from flexbench.ranks.launch import MAX_PORT, Launch

AUTO_MODEL = "auto"
DEFAULT_NUM_CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
DEFAULT_RESULT_DIR = Path("results/serving")
MAX_RATE = 1e6
MAX_CLIENTS = 100_000
MAX_WORKERS = 4096
# Fewer say nothing of a rate of failures.
_FEW_REQUESTS = 20


class Arrival(StrEnum):
    """How the requests of an open loop are spread over time."""

    CONSTANT = "constant"
    POISSON = "poisson"
    BURST = "burst"


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Prompts and lengths. The names are DeepSpeedometer's.

    Lengths are drawn from normal distributions; a `*_var` is the standard deviation as a fraction
    of the mean, as DeepSpeedometer computes it in spite of the name. 0: all are equal.
    """

    model: str
    tokenizer: str = "auto"
    """auto, byte, or a folder or a name on a hub with a tokenizer."""
    prompt_generator_seed: int = 0
    max_prompt_length: int = 4000
    prompt_length: int = 512
    prompt_length_var: float = 0.3
    max_new_tokens: int = 64
    max_new_tokens_var: float = 0.3
    streaming: bool = True
    prompt_text_source: str | None = None
    """A text, or a text file, or a .jsonl dataset; None: the built-in text."""
    shared_prefix: int = 0
    """So many first tokens are the same in all prompts."""

    def __post_init__(self) -> None:
        check_seed("--prompt-generator-seed", self.prompt_generator_seed)
        check_count("--prompt-length", self.prompt_length, minimum=1)
        check_count("--max-prompt-length", self.max_prompt_length, minimum=self.prompt_length)
        check_count("--max-new-tokens", self.max_new_tokens, minimum=1)
        check_count("--shared-prefix", self.shared_prefix, minimum=0)
        for option, value in (
            ("--prompt-length-var", self.prompt_length_var),
            ("--max-new-tokens-var", self.max_new_tokens_var),
        ):
            if not 0 <= value <= 10:
                raise ConfigError(option, f"must be a number from 0 to 10, not {value:g}")


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load of one point: a closed loop of `concurrency`, or an open loop at `rate_per_s`.

    It ends after `num_requests` or `duration_s`, whichever comes first; at least one is given. At
    the end of the duration nothing more is sent, and what is in flight may come to its end, which
    is not part of the measured window, within the time of a request.
    """

    concurrency: int | None = None
    rate_per_s: float | None = None
    arrival: Arrival = Arrival.CONSTANT
    burst_size: int = 1
    """Requests that a burst has; between bursts are `burst_size / rate_per_s` seconds."""
    num_requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ConfigError("--rate", "is another kind of load than --num-clients; give one")
        if self.concurrency is not None:
            check_count("--num-clients", self.concurrency, minimum=1, maximum=MAX_CLIENTS)
        if self.rate_per_s is not None and not 0 < self.rate_per_s <= MAX_RATE:
            raise ConfigError("--rate", f"must be above 0 and at most {MAX_RATE:g} requests/s")
        check_count("--burst-size", self.burst_size, minimum=1)
        if self.num_requests is None and self.duration_s is None:
            raise ConfigError("--duration", "is needed, or a number of requests")
        if self.num_requests is not None:
            check_count("--min-requests", self.num_requests, minimum=1)
        if self.duration_s is not None:
            check_seconds("--duration", self.duration_s)

    @property
    def label(self) -> str:
        """For people: '8 clients', or '20 requests/s, poisson'."""
        if self.concurrency is not None:
            return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"
        return f"{self.rate_per_s:g} requests/s, {self.arrival}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Loads that are measured with the same prompts, from light to heavy."""

    prompts: PromptConfig
    loads: tuple[Load, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long things may take, in seconds, and how much may fail."""

    request_timeout_s: float = 120.0
    warmup_timeout_s: float = 300.0
    service_timeout_s: float = 600.0
    early_stop_latency_s: float = 10.0
    """Mean end-to-end latency above which no heavier load is measured; 0: none."""
    max_errors: int | None = None
    """More failed requests end a point."""
    max_error_rate: float = 0.5
    """A larger part of the ended requests, once there are 20, ends a point."""

    def __post_init__(self) -> None:
        check_seconds("--request-timeout", self.request_timeout_s)
        check_seconds("--warmup-timeout", self.warmup_timeout_s)
        check_seconds("--service-timeout", self.service_timeout_s)
        if not 0 <= self.early_stop_latency_s < float("inf"):
            raise ConfigError("--early-stop-latency", "must be a number of seconds of at least 0")
        if self.max_errors is not None:
            check_count("--max-errors", self.max_errors, minimum=0)
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError("--max-error-rate", "must be a number from 0 to 1")

    def error_problem(self, failed: int, ended: int) -> str | None:
        """Why a point is to end, in words; None: it may go on."""
        if self.max_errors is not None and failed > self.max_errors:
            return f"{failed} requests failed; --max-errors is {self.max_errors}"
        if ended >= _FEW_REQUESTS and failed > self.max_error_rate * ended:
            return (
                f"{failed} of {ended} requests failed; --max-error-rate is {self.max_error_rate:g}"
            )
        return None

    def final_problem(self, failed: int, succeeded: int) -> str | None:
        """What keeps a point that came to its end from being a result, in words."""
        if not succeeded:
            return "no request succeeded" if failed else "no request came to its end"
        if self.max_errors is not None and failed > self.max_errors:
            return f"{failed} requests failed; --max-errors is {self.max_errors}"
        ended = failed + succeeded
        if failed > self.max_error_rate * ended:
            return (
                f"{failed} of {ended} requests failed; --max-error-rate is {self.max_error_rate:g}"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """A whole run of `flexbench serving`."""

    api: str
    client_config: Any
    sweeps: tuple[Sweep, ...]
    """With `is_search`, each one's loads are a single one: where the search begins."""
    is_search: bool = False
    max_clients: int = 1024
    """Where a search ends,"""
    max_rate: float = 10_000.0
    """or one over the rate, in requests/s."""
    search_point_s: float | None = None
    """How long each point of a search lasts; None: what the latency asks for."""
    slo: tuple[str, ...] = ()
    warmup_requests: int = 1
    num_workers: int | None = None
    use_threading: bool = False
    limits: Limits = Limits()
    result_dir: Path = DEFAULT_RESULT_DIR
    force: bool = False

    def __post_init__(self) -> None:
        check_count("--warmup-requests", self.warmup_requests, minimum=0)
        check_count("--max-clients", self.max_clients, minimum=1)
        if not 0 < self.max_rate <= MAX_RATE:
            raise ConfigError("--max-rate", f"must be above 0 and at most {MAX_RATE:g} requests/s")
        if self.num_workers is not None:
            check_count("--num-workers", self.num_workers, minimum=1, maximum=MAX_WORKERS)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the ranks of a job meet, and how long they wait for each other."""

    launch: Launch
    head_ip: str | None = None
    port: int | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.port is not None:
            check_count("--head-port", self.port, minimum=1, maximum=MAX_PORT)
        check_seconds("--comm-timeout", self.timeout_s)

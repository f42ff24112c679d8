"""What a load generator needs of a system that serves text generation.

`flexbench serving` sends load through this protocol and knows nothing else of a system; HTTP
endpoints, a Petals swarm and a dist pipeline each have a client that implements it.

A client is made twice. In the command's own process it starts the service, if it has one to start,
and stops it. In every worker it sends requests; there it is made from the `config` that the first
one had after `start_service`, so what workers must know, such as a port that was found, is put into
`config`.

All times are time.monotonic_ns, in nanoseconds: processes of one machine share that clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol

from flexbench.core.progress import Progress


class FailureKind(StrEnum):
    """Why a request has no answer that counts."""

    REFUSED = "refused"  # nobody listens there, or the host cannot be reached
    TLS = "tls"  # the certificate, or the handshake
    CLOSED = "closed"  # the connection ended before the answer did
    TIMEOUT = "timeout"  # no end within the request's time
    UNAUTHORIZED = "unauthorized"  # 401 or 403
    RATE_LIMITED = "rate_limited"  # 429
    HTTP_CLIENT_ERROR = "http_4xx"  # any other status from 400 to 499
    HTTP_SERVER_ERROR = "http_5xx"
    MALFORMED = "malformed"  # not the protocol, not JSON, another status, or no such fields
    SERVER_REPORTED = "server_error"  # an error that the server sent as an event of a stream
    EMPTY = "empty"  # a well-formed answer without a token
    CLIENT_ERROR = "client_error"  # our own code, or a library under it


@dataclass(frozen=True, slots=True)
class Failure:
    """How a request failed. `message` is for people, one line, without secrets."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt, and what is asked for it."""

    index: int
    """Its number within the point, from 0; the same seed gives the same prompt to a number."""
    prompt: str
    prompt_tokens: int
    """Length of `prompt` by the run's tokenizer."""
    max_new_tokens: int
    is_streaming: bool


class Exchange:
    """One request on its way: when it was sent, and what came back when.

    The generator makes it, `send_request` fills it in. Of an exchange that is cut off, by a
    time-out or the end of the run, what it has until then is kept.
    """

    __slots__ = ("arrivals", "connected_at", "ended_at", "failure", "pieces", "sent_at", "status")

    def __init__(self) -> None:
        self.sent_at = 0
        """Just before the first byte is written; 0 until then."""
        self.connected_at = 0
        """When a connection that had to be opened for it was there; 0: an open one was used."""
        self.arrivals: list[int] = []
        """When each of `pieces` arrived."""
        self.pieces: list[Any] = []
        """What arrived, as it came; `process_response` knows how to read it."""
        self.ended_at = 0
        """When the end of the answer arrived; 0 until then."""
        self.status = 0
        """HTTP status, where there is one."""
        self.failure: Failure | None = None


@dataclass(kw_only=True, slots=True)
class Response:
    """What an exchange says, taken apart."""

    content_times: list[int] = field(default_factory=list)
    """When each piece with generated text arrived: one entry a chunk of a stream, however many
    tokens are in it; a single one for an answer that came at once."""
    texts: list[str] = field(default_factory=list)
    """The text of each of these."""
    output_tokens: int | None = None
    """As the server counts; None: it does not say."""
    prompt_tokens: int | None = None
    """As the server counts, template and special tokens included; None: it does not say."""
    finish_reason: str | None = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class ServiceContext:
    """What `start_service` gets from the command."""

    progress: Progress
    log_folder: Path
    """Where a service's output goes."""
    scratch_folder: Path
    """For temporary files; removed after the run."""
    timeout_s: float
    """How long the service may take to be ready (--service-timeout)."""
    raise_if_stopped: Callable[[], None]
    """Raises Interrupted after Ctrl-C or SIGTERM: to be called twice a second in a wait."""
    streaming: bool
    """Whether requests will ask for a stream."""
    max_prompt_tokens: int
    """The longest prompt there will be, and"""
    max_new_tokens: int
    """the most tokens that a request will ask for."""
    max_in_flight: int
    """The most requests at once, as far as that is known."""


class Client(Protocol):
    """A serving system, as the load generator sees it.

    `config_class` is a frozen, keyword-only dataclass that validates itself in `__post_init__`
    (ConfigError naming the option). Its fields become options of the command line: `api_url` is
    --api-url; `field(metadata={"help": "..."})` is the option's help; str, int, float, bool, Path
    and their `| None` are the types. Every field has a default but those that must be given. A
    secret's field has `metadata={"secret": True}`: records show it as ***.
    A field named `model` gets the value of --model.
    """

    config_class: ClassVar[type]
    requests_per_worker: ClassVar[int | None]
    """The most requests that one worker process can have in flight; None: any number."""
    preload: ClassVar[tuple[str, ...]]
    """Modules that workers need and that are slow to import. With any, workers come from a fork
    server that has imported them; without, they are forked from the command itself."""
    packages: ClassVar[tuple[str, ...]]
    """Packages whose versions a record shall tell.

    Beside these, a class may have `max_workers`, the most processes that its requests may come
    from, `can_stream = False`, and a method `check_service` that raises a FlexbenchError if the
    service that was started has ended by itself.
    """

    config: Any

    def __init__(self, config: Any) -> None: ...

    def start_service(self, context: ServiceContext) -> None:
        """Start what is to be measured and wait until it is ready; or check that it is there.

        Raises a FlexbenchError that says what is wrong, with the last lines of its log.
        """

    def stop_service(self) -> None:
        """End exactly what `start_service` started. Also called when that failed half-way."""

    def describe_service(self) -> dict[str, Any]:
        """What a record says of the service: versions, command, size. Never a secret."""

    async def open(self, num_connections: int) -> None:
        """In a worker: be ready for so many requests at once, before anything is timed."""

    async def close(self) -> None:
        """In a worker: let go of what `open` and requests have opened."""

    def prepare_request(self, request: GenerationRequest) -> Any:
        """Everything that can be done before the clock runs, such as writing JSON."""

    async def send_request(self, prepared: Any, exchange: Exchange) -> None:
        """Send it and receive the whole answer into `exchange`. Never sends twice.

        A failure is put into `exchange.failure`, not raised. May be cancelled at any moment, and
        then leaves nothing behind that a later request could meet.
        """

    def process_response(self, exchange: Exchange) -> Response:
        """Read what arrived. Not timed: called after the next request has been sent."""

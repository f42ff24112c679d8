"""A Petals swarm as an endpoint: `flexbench serving --api petals`.

The embedded swarm, if there is to be one, is started by the command and ended with it. Every worker
process is one client of the swarm, with one request at a time, as in `flexbench petals`.

A request is what `flexbench petals` times: a session is opened with the servers of a route, the
prompt goes through it, then one token after the other, and the session is closed. Each token's
moment is when the client has chosen it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from flexbench.core.endpoint import (
    Exchange,
    Failure,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.errors import ConfigError
from flexbench.core.signals import SignalWatch
from flexbench.petals.config import (
    DEFAULT_EMBEDDED_PREFIX,
    DEFAULT_REMOTE_PREFIX,
    PetalsConfig,
)
from flexbench.petals.model import DEFAULT_MAX_RETRIES, SwarmModel

if TYPE_CHECKING:
    import torch

    from flexbench.petals.client import SwarmClient
    from flexbench.petals.plan import Plan
    from flexbench.petals.swarm import OpenSwarm

_PRELOAD = "flexbench.petals_runtime.preload"
_LOOK_EVERY_S = 0.4
# For a request that was cut off to come to its next token.
_CUT_S = 5.0
_MAX_MESSAGE_LENGTH = 300
_FIRST_CHARACTER = 33
_NUM_CHARACTERS = 90


@dataclass(frozen=True, kw_only=True)
class PetalsEndpointConfig:
    """A swarm to start, or to join. The options are those of `flexbench petals`."""

    model: str | None = None
    """The OPT model whose dimensions are measured: --prefix of `flexbench petals`."""
    initial_peers: str | None = field(
        default=None,
        metadata={
            "help": "DHT peers of a running swarm, in one argument, with spaces or commas between "
            "them. Without any, a private swarm is started on this machine and ended afterwards",
            "metavar": "'ADDRESS ...'",
        },
    )
    dht_prefix: str | None = field(
        default=None,
        metadata={
            "help": "Key of the model's blocks in the DHT. Default: --model with dots replaced by "
            "hyphens; opt6b for facebook/opt-6.7b",
            "metavar": "KEY",
        },
    )
    num_servers: int = field(default=2, metadata={"help": "Servers of the private swarm"})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of weights and activations: auto, float32, bfloat16, float16"},
    )
    device: str = field(
        default="auto",
        metadata={"help": "Where clients and private servers compute: auto, cpu, cuda, cuda:N"},
    )
    connect_timeout: float = field(
        default=60.0, metadata={"help": "To reach the swarm's peers", "metavar": "SECONDS"}
    )
    max_retries: int = field(
        default=DEFAULT_MAX_RETRIES,
        metadata={"help": "Attempts of a client at a failing server, within a request"},
    )
    seed: int = field(default=0, metadata={"help": "Of the private swarm's weights"})

    def __post_init__(self) -> None:
        if self.model in (None, "", "auto"):
            default = DEFAULT_REMOTE_PREFIX if self.peers else DEFAULT_EMBEDDED_PREFIX
            object.__setattr__(self, "model", default)
        self.swarm_config()

    @property
    def peers(self) -> tuple[str, ...]:
        """The addresses in `initial_peers`."""
        return tuple((self.initial_peers or "").replace(",", " ").split())

    def swarm_config(
        self,
        *,
        num_clients: int = 1,
        prompt_length: int = 1,
        max_tokens: int = 1,
        start_timeout_s: float = 300.0,
    ) -> PetalsConfig:
        """The swarm, for so many clients with prompts and answers of these lengths at most."""
        assert self.model is not None
        with _options_renamed():
            return PetalsConfig(
                initial_peers=self.peers,
                prefix=self.model,
                dht_prefix=self.dht_prefix,
                num_processes=num_clients,
                sequence_lengths=(prompt_length,),
                max_tokens=(max_tokens,),
                sweep=False,
                dtype=self.dtype,
                device=self.device,
                num_servers=self.num_servers,
                connect_timeout_s=self.connect_timeout,
                server_timeout_s=start_timeout_s,
                max_retries=self.max_retries,
                seed=self.seed,
            )


@dataclass(frozen=True, kw_only=True)
class JoinedSwarmConfig(PetalsEndpointConfig):
    """What workers get: the configuration, and the swarm that is there by now."""

    swarm: SwarmModel


@contextmanager
def _options_renamed() -> Iterator[None]:
    """While open, errors name the options that this client has."""
    names = {"--prefix": "--model", "--server-timeout": "--service-timeout"}
    try:
        yield
    except ConfigError as error:
        raise ConfigError(names.get(error.option, error.option), error.problem) from error


class PetalsClient:
    """Starts a private swarm, or looks at a running one, and sends requests through it."""

    config_class: ClassVar[type] = PetalsEndpointConfig
    requests_per_worker: ClassVar[int | None] = 1
    preload: ClassVar[tuple[str, ...]] = (_PRELOAD,)
    packages: ClassVar[tuple[str, ...]] = ("petals", "hivemind", "torch", "transformers")

    config: PetalsEndpointConfig

    def __init__(self, config: PetalsEndpointConfig) -> None:
        self.config = config
        self._resources = ExitStack()
        self._plan: Plan | None = None
        self._swarm: OpenSwarm | None = None
        self._connection: _Connection | None = None
        self._is_free: asyncio.Lock | None = None

    # --- in the command's process ---

    def start_service(self, context: ServiceContext) -> None:
        """Start the private swarm, or look whether the running one has all blocks.

        Raises ConfigError for what this machine cannot do, MissingDependencyError without petals,
        RunError, with the last lines of a server's log, when the swarm does not come about.
        """
        from flexbench.core.processes import Crew
        from flexbench.petals.plan import check_resources, make_plan
        from flexbench.petals.swarm import start_swarm
        from flexbench.petals_runtime.requirement import ensure_petals_installed

        ensure_petals_installed()
        config = self.config.swarm_config(
            num_clients=max(1, context.max_in_flight),
            prompt_length=context.max_prompt_tokens,
            max_tokens=context.max_new_tokens,
            start_timeout_s=context.timeout_s,
        )
        self._plan = make_plan(config)
        with _options_renamed():
            check_resources(self._plan)
        signals = _SignalsOfCommand(context)
        crew = self._resources.enter_context(
            Crew(
                log_folder=context.log_folder,
                scratch_folder=context.scratch_folder,
                signals=signals,
                preload=self.preload,
            )
        )
        with _options_renamed(), signals.asked_often():
            self._swarm = start_swarm(crew, self._plan, progress=context.progress)
        values = {one.name: getattr(self.config, one.name) for one in fields(PetalsEndpointConfig)}
        self.config = JoinedSwarmConfig(**values, swarm=self._swarm.model)

    def stop_service(self) -> None:
        """End the private swarm's processes."""
        self._resources.close()

    def describe_service(self) -> dict[str, Any]:
        """The swarm: its servers with their blocks, and how the private one's are run."""
        if self._swarm is None or self._plan is None:
            return {}
        model = self._swarm.model
        return {
            "model": asdict(model.shape) | {"dht_prefix": model.dht_prefix, "seed": model.seed},
            "swarm": asdict(self._swarm.view) | {"embedded": self._plan.config.is_embedded},
            "swarm_startup_s": round(self._swarm.startup_s, 2),
            "initial_peers": list(model.initial_peers),
            "servers": [
                asdict(spec) | {"blocks": [spec.blocks.start, spec.blocks.stop]}
                for spec in self._plan.servers
            ],
        }

    # --- in a worker ---

    async def open(self, num_connections: int) -> None:  # noqa: ARG002 - there is one in a worker
        """Join the swarm and generate one token, so that the route to its servers is known.

        A worker's connection outlives its points: the next one finds it.
        """
        assert isinstance(self.config, JoinedSwarmConfig), "start_service() finds the swarm"
        self._is_free = asyncio.Lock()
        self._connection = _Connection.take(self.config.swarm)
        await self._connection.run(self._connection.join)

    async def close(self) -> None:
        """Leave the connection to the worker's next point, unless a request cannot be ended."""
        connection, self._connection = self._connection, None
        if connection is None or self._is_free is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_CUT_S), self._is_free:
                connection.give_back()

    def prepare_request(self, request: GenerationRequest) -> _PreparedRequest:
        """Token ids of the prompt; see `prompt_ids` for which."""
        return _PreparedRequest(
            ids=prompt_ids(request.prompt, request.prompt_tokens),
            max_new_tokens=request.max_new_tokens,
            is_streaming=request.is_streaming,
        )

    async def send_request(self, prepared: _PreparedRequest, exchange: Exchange) -> None:
        """Generate, and note when each token was there.

        Petals cannot be told to let go of a request. One that is cut off ends with its next token,
        and its session is closed then; or when Petals gives up on the server. The worker's next
        request waits for that, and is sent only then: its latency since it was scheduled has the
        wait in it.
        """
        assert self._connection is not None, "open() comes first"
        assert self._is_free is not None
        connection = self._connection
        await self._is_free.acquire()
        run = _Run(prepared, exchange, asyncio.get_running_loop())
        exchange.sent_at = time.monotonic_ns()
        generating = asyncio.ensure_future(
            connection.run(partial(connection.generate, prepared, run))
        )
        generating.add_done_callback(partial(_release, self._is_free))
        try:
            ended_at = await asyncio.shield(generating)
        except asyncio.CancelledError:
            run.is_cut = True
            raise
        except Exception as error:  # noqa: BLE001 - Petals raises whatever happens in it
            exchange.failure = failure_of(error)
            return
        exchange.ended_at = ended_at

    def process_response(self, exchange: Exchange) -> Response:
        """The tokens as text, one character each: what random weights say means nothing.

        `pieces` are lists of token ids: one token each of a stream, all of an answer at once.
        """
        response = Response(failure=exchange.failure)
        for moment, ids in zip(exchange.arrivals, exchange.pieces, strict=True):
            response.content_times.append(moment)
            response.texts.append("".join(_character(token) for token in ids))
        response.output_tokens = sum(len(ids) for ids in exchange.pieces)
        if exchange.ended_at and not response.output_tokens and response.failure is None:
            response.failure = Failure(FailureKind.EMPTY, "the answer has no token in it")
        if exchange.ended_at and response.failure is None:
            response.finish_reason = "length"
        return response


@dataclass(frozen=True, kw_only=True)
class _PreparedRequest:
    ids: Sequence[int]
    max_new_tokens: int
    is_streaming: bool


def _release(lock: asyncio.Lock, generating: asyncio.Future[Any]) -> None:
    lock.release()
    if not generating.cancelled():
        generating.exception()  # of one that was cut off, nobody wants to know


class _CutError(Exception):
    """Nobody waits for the rest."""


class _Run:
    """The streamer of one request: notes tokens and times from Petals' thread in the loop's own."""

    def __init__(
        self, prepared: _PreparedRequest, exchange: Exchange, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._is_streaming = prepared.is_streaming
        self._exchange = exchange
        self._loop = loop
        self._has_prompt = False
        self._ids: list[int] = []
        self.is_cut = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then every token."""
        moment = time.monotonic_ns()
        if self.is_cut:
            raise _CutError
        if not self._has_prompt:
            self._has_prompt = True
            return
        ids = [int(token) for token in value]
        if self._is_streaming:
            self._note(moment, ids)
        else:
            self._ids += ids

    def end(self) -> None:
        """That was all."""

    def finish(self, moment: int) -> None:
        """The answer has come to its end."""
        if self._ids:
            self._note(moment, self._ids)

    def _note(self, moment: int, ids: list[int]) -> None:
        self._loop.call_soon_threadsafe(self._append, moment, ids)

    def _append(self, moment: int, ids: list[int]) -> None:
        if not self.is_cut:
            self._exchange.arrivals.append(moment)
            self._exchange.pieces.append(ids)


class _Connection:
    """One client of the swarm, and the thread it lives in; kept for a worker's next point."""

    _idle: ClassVar[dict[SwarmModel, list[_Connection]]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, model: SwarmModel) -> None:
        self._model = model
        self._client: SwarmClient | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="petals")

    @classmethod
    def take(cls, model: SwarmModel) -> _Connection:
        """One that nobody uses, or a new one."""
        with cls._lock:
            idle = cls._idle.setdefault(model, [])
            return idle.pop() if idle else cls(model)

    def give_back(self) -> None:
        """Let others use it."""
        with self._lock:
            self._idle[self._model].append(self)

    async def run(self, function: Any) -> Any:
        """Call `function` in the thread, after whatever else is to be done there."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def join(self) -> None:
        """Join the swarm, unless that is done."""
        from flexbench.petals.client import SwarmClient

        if self._client is None:
            client = SwarmClient(self._model, os.getpid())
            client.generate(client.prompt_of([0]), 1)
            self._client = client

    def generate(self, prepared: _PreparedRequest, run: _Run) -> int:
        """Do a request, as `flexbench petals` does; returns when its session was closed."""
        assert self._client is not None, "it has not joined"
        if run.is_cut:
            raise _CutError
        prompt = self._client.prompt_of(prepared.ids)
        self._client.generate(prompt, prepared.max_new_tokens, streamer=run)
        ended_at = time.monotonic_ns()
        run.finish(ended_at)
        return ended_at


def prompt_ids(prompt: str, count: int) -> list[int]:
    """`count` token ids for a prompt, the same for the same text.

    A swarm's speed does not depend on which tokens a prompt has, and the models that `flexbench`
    measures have no tokenizer of their own. So these are the bytes of its UTF-8, if there are as
    many of them as it has tokens by the run's tokenizer; if not, they are drawn by a hash of it.
    """
    data = prompt.encode(errors="replace")
    if len(data) == count:
        return list(data)
    drawn = hashlib.shake_256(data).digest(4 * count)
    return [int.from_bytes(drawn[i : i + 4], "big") for i in range(0, 4 * count, 4)]


def failure_of(error: Exception) -> Failure:
    """How a request failed that ended with an error of Petals'."""
    from flexbench.petals_runtime.imports import (
        MissingBlocksError,
        P2PDaemonError,
        P2PHandlerError,
    )

    kind = FailureKind.CLIENT_ERROR
    if isinstance(error, P2PHandlerError):  # the server's own words
        kind = FailureKind.SERVER_REPORTED
    elif isinstance(error, MissingBlocksError):
        kind = FailureKind.REFUSED
    elif isinstance(error, P2PDaemonError | OSError | EOFError | StopAsyncIteration):
        kind = FailureKind.CLOSED
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        kind = FailureKind.TIMEOUT
    text = " ".join(str(error).split())[:_MAX_MESSAGE_LENGTH]
    return Failure(kind, f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _character(token: int) -> str:
    return chr(_FIRST_CHARACTER + token % _NUM_CHARACTERS)


class _SignalsOfCommand(SignalWatch):
    """For a crew: the command's own watch of signals, asked twice a second.

    It is not entered, and so has no handlers: they would take the signals away from the command.
    """

    def __init__(self, context: ServiceContext) -> None:
        super().__init__()
        self._context = context

    def raise_if_stopped(self) -> None:
        """Raise Interrupted if the command was told to stop."""
        while self.wakeup.poll():
            self.wakeup.recv()
        self._context.raise_if_stopped()

    @contextmanager
    def asked_often(self) -> Iterator[None]:
        """While open, whoever waits for messages looks again and again."""
        is_over = threading.Event()

        def remind() -> None:
            while not is_over.wait(_LOOK_EVERY_S):
                self._writer.send(None)

        thread = threading.Thread(target=remind, name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

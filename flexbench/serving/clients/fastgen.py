"""DeepSpeed-MII (FastGen) on this machine: a deployment of its own, asked through its gRPC API.

MII 0.3 starts a load balancer and a server for each replica, and generates with CUDA only. Its own
client blocks a thread for each request; requests go through the same stubs and messages here, on
gRPC's asyncio interface, so that one loop has any number of them in flight.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from flexbench.core.checks import check_count
from flexbench.core.endpoint import (
    Exchange,
    Failure,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.environment import may_have_gpu
from flexbench.core.errors import ConfigError, MissingDependencyError, WorkerError
from flexbench.core.progress import Phase, Progress, Silence
from flexbench.core.service_process import LOCAL_HOST, ServiceProcess, find_port
from flexbench.http_endpoint.keys import quoting

_MAX_PORT = 65535
_DEPLOYMENT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# The threads of MII's load balancer, and of each replica's server: one a request.
_MII_THREADS = 256
_CONNECT_TIMEOUT_S = 0.4
_OPEN_TIMEOUT_S = 10.0
_DEPLOYED = "deployed"
_UNFINISHED = "none"
# https://grpc.github.io/grpc/core/md_doc_statuscodes.html
_KINDS = {
    "CANCELLED": FailureKind.CLOSED,
    "DEADLINE_EXCEEDED": FailureKind.TIMEOUT,
    "PERMISSION_DENIED": FailureKind.UNAUTHORIZED,
    "RESOURCE_EXHAUSTED": FailureKind.RATE_LIMITED,
    "UNAUTHENTICATED": FailureKind.UNAUTHORIZED,
}


@dataclass(frozen=True, kw_only=True)
class FastGenConfig:
    """How the deployment is made, and how it is asked."""

    model: str | None = None
    deployment_name: str = field(
        default="fastgen-benchmark-deployment", metadata={"help": "Name of the deployment"}
    )
    tp_size: int = field(default=1, metadata={"help": "Tensor parallel size of each replica"})
    num_replicas: int = field(default=1, metadata={"help": "Replicas of the model"})
    max_ragged_batch_size: int = field(
        default=768, metadata={"help": "Most requests, and most tokens, in a replica's batch"}
    )
    quantization_mode: str | None = field(
        default=None, metadata={"help": "Quantization of the weights, as MII names it: wf6af16"}
    )
    port: int | None = field(
        default=None,
        metadata={
            "help": "Port of the load balancer, before those of the replicas; by default free ones"
        },
    )
    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0: the likeliest token"}
    )
    ignore_eos: bool = field(
        default=True, metadata={"help": "Generate exactly as many tokens as are wanted"}
    )

    def __post_init__(self) -> None:
        if self.model in (None, "", "auto"):
            raise ConfigError("--model", "is needed with --api fastgen: a folder, or a hub's name")
        if not _DEPLOYMENT_NAME.fullmatch(self.deployment_name):
            raise ConfigError(
                "--deployment-name", "must be letters, digits, '.', '_' and '-', as in a file name"
            )
        check_count("--tp-size", self.tp_size, minimum=1)
        check_count("--num-replicas", self.num_replicas, minimum=1)
        check_count("--max-ragged-batch-size", self.max_ragged_batch_size, minimum=1)
        if self.port is not None:
            check_count("--port", self.port, minimum=1, maximum=_MAX_PORT)
        if not 0 <= self.temperature <= 100:
            raise ConfigError(
                "--temperature", f"must be a number of at least 0, not {self.temperature:g}"
            )

    @property
    def num_ports(self) -> int:
        """Ports from `port` on: the load balancer, each GPU of each replica, each replica's queue,
        and torch.distributed.
        """
        return 1 + self.num_replicas * self.tp_size + self.num_replicas + 1

    def deployment(self) -> dict[str, Any]:
        """The arguments of mii.serve, but for the engine's configuration."""
        assert self.port is not None
        queues = self.port + 1 + self.num_replicas * self.tp_size
        return {
            "deployment_name": self.deployment_name,
            "tensor_parallel": self.tp_size,
            "replica_num": self.num_replicas,
            "quantization_mode": self.quantization_mode,
            "port_number": self.port,
            "zmq_port_number": queues,
            "torch_dist_port": queues + self.num_replicas,
        }


@dataclass(frozen=True, slots=True)
class _Prepared:
    message: Any
    is_streaming: bool


class FastGenClient:
    """Deploys a model with MII and sends requests to its load balancer."""

    config_class: ClassVar[type] = FastGenConfig
    requests_per_worker: ClassVar[int | None] = None
    preload: ClassVar[tuple[str, ...]] = ("mii",)
    packages: ClassVar[tuple[str, ...]] = ("deepspeed-mii", "deepspeed", "grpcio", "torch")

    config: FastGenConfig

    def __init__(self, config: FastGenConfig) -> None:
        self.config = config
        self._process: ServiceProcess | None = None
        self._progress: Progress = Silence()
        self._ready_s: float | None = None
        self._channel: Any = None
        self._stub: Any = None
        self._rpc_error: Any = None

    # --- in the command's process ---

    def start_service(self, context: ServiceContext) -> None:
        """Deploy the model and wait for it.

        Raises MissingDependencyError without MII, ConfigError for ports that are taken, WorkerError
        with the last lines of the log when MII gives up, DeadlineError when it takes too long.
        """
        if find_spec("mii") is None:
            raise MissingDependencyError(
                "--api fastgen needs deepspeed-mii, which is not installed: "
                "pip install deepspeed-mii requests"
            )
        self._progress = context.progress
        config = self.config
        self.config = replace(config, port=find_port(config.port, num_ports=config.num_ports))
        if context.max_in_flight > _MII_THREADS:
            context.progress.note(
                f"MII answers {_MII_THREADS} requests at a time; further ones wait in it"
            )
        mark = context.scratch_folder / f"{config.deployment_name}.{_DEPLOYED}"
        self._process = ServiceProcess(
            "fastgen",
            [sys.executable, "-m", __name__, json.dumps(asdict(self.config)), str(mark)],
            log_path=context.log_folder / "fastgen.log",
            environment=_environment(context.scratch_folder),
        )
        with context.progress.phase("Starting DeepSpeed-MII", 1) as phase:
            self._process.start()
            self._ready_s = self._wait(self._process, mark, context, phase)
            phase.advance()

    def stop_service(self) -> None:
        """End the deployment and all its processes."""
        if self._process is not None and self._process.is_to_be_stopped:
            with self._progress.phase("Stopping DeepSpeed-MII", 1) as phase:
                self._process.stop()
                phase.advance()

    def check_service(self) -> None:
        """Raise WorkerError, with the end of its log, if the server has ended by itself."""
        if self._process is not None:
            self._process.raise_if_ended()

    def describe_service(self) -> dict[str, Any]:
        """MII's version, the deployment, and how long it took."""
        ready_s = self._ready_s
        return {
            "version": _version("deepspeed-mii"),
            "model": self.config.model,
            "max_ragged_batch_size": self.config.max_ragged_batch_size,
            **(self.config.deployment() if self.config.port is not None else {}),
            "ready_after_s": None if ready_s is None else round(ready_s, 1),
        }

    def _wait(
        self, process: ServiceProcess, mark: Path, context: ServiceContext, phase: Phase
    ) -> float:
        try:
            return process.wait_until_ready(
                lambda: mark.exists() and self._is_listening(),
                timeout_s=context.timeout_s,
                raise_if_stopped=context.raise_if_stopped,
                phase=phase,
            )
        except WorkerError as error:
            if not may_have_gpu():
                # The last lines of MII's log are about the end of something that had failed before.
                error.add_details("MII generates with CUDA only, and this machine shows no GPU.")
            raise

    def _is_listening(self) -> bool:
        """Whether the load balancer is there: MII itself waits for the replicas only."""
        assert self.config.port is not None
        try:
            with socket.create_connection((LOCAL_HOST, self.config.port), _CONNECT_TIMEOUT_S):
                return True
        except OSError:
            return False

    # --- in a worker ---

    async def open(self, num_connections: int) -> None:  # noqa: ARG002 - gRPC shares one
        """Connect to the load balancer; all requests go over this connection."""
        import asyncio

        from mii.backend.client import create_channel
        from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub

        self._rpc_error = import_module("grpc.aio").AioRpcError
        self._channel = create_channel(LOCAL_HOST, self.config.port)
        self._stub = ModelResponseStub(self._channel)
        # Without a connection, each request says what is wrong.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._channel.channel_ready(), _OPEN_TIMEOUT_S)

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()

    def prepare_request(self, request: GenerationRequest) -> _Prepared:
        """The request as MII's message."""
        options: dict[str, Any] = {
            "max_new_tokens": int(request.max_new_tokens),
            "ignore_eos": self.config.ignore_eos,
            "return_full_text": False,
            "stream": request.is_streaming,
            "do_sample": self.config.temperature > 0,
        }
        if self.config.temperature > 0:
            options["temperature"] = float(self.config.temperature)
        message = self._methods.pack_request_to_proto([request.prompt], **options)
        return _Prepared(message, request.is_streaming)

    async def send_request(self, prepared: _Prepared, exchange: Exchange) -> None:
        """Send it and receive the whole answer; a message for each token of a stream."""
        assert self._stub is not None, "open() comes first"
        arrivals, pieces, now = exchange.arrivals, exchange.pieces, time.monotonic_ns
        exchange.sent_at = now()
        if prepared.is_streaming:
            call = self._stub.GeneratorReplyStream(prepared.message)
        else:
            call = self._stub.GeneratorReply(prepared.message)
        try:
            if prepared.is_streaming:
                async for message in call:
                    arrivals.append(now())
                    pieces.append(message)
            else:
                message = await call
                arrivals.append(now())
                pieces.append(message)
            exchange.ended_at = now()
        except self._rpc_error as error:
            exchange.failure = _failure(error.code().name, error.details(), bool(pieces))
        finally:
            call.cancel()  # nothing, unless it is cut off

    def process_response(self, exchange: Exchange) -> Response:
        """Read what arrived: the last message says why the text ends."""
        response = Response(failure=exchange.failure)
        for arrived_at, message in zip(exchange.arrivals, exchange.pieces, strict=True):
            if not message.response:
                response.failure = Failure(FailureKind.MALFORMED, "a message without a response")
                break
            reply = message.response[0]
            if reply.response:
                response.content_times.append(arrived_at)
                response.texts.append(reply.response)
            response.prompt_tokens = reply.prompt_tokens
            response.output_tokens = reply.generated_tokens
            if reply.finish_reason != _UNFINISHED:
                response.finish_reason = reply.finish_reason
        if response.failure is None and exchange.ended_at:
            response.failure = _incomplete(response)
        return response

    @cached_property
    def _methods(self) -> Any:
        from mii.constants import TaskType
        from mii.grpc_related.task_methods import TASK_METHODS_DICT

        return TASK_METHODS_DICT[TaskType.TEXT_GENERATION]


def _environment(scratch_folder: Path) -> Mapping[str, str | None]:
    """MII finds DeepSpeed's launcher by name, and keeps what it writes where all users can."""
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH")
    return {
        "PATH": f"{programs}{os.pathsep}{path}" if path else programs,
        "MII_CACHE_PATH": str(scratch_folder / "mii"),
        "TMPDIR": str(scratch_folder),
    }


def _failure(code: str, details: str | None, has_begun: bool) -> Failure:
    said = quoting(None)(details or "no details")
    kind = _KINDS.get(code, FailureKind.SERVER_REPORTED)
    if code == "UNAVAILABLE":
        kind = FailureKind.CLOSED if has_begun else FailureKind.REFUSED
    return Failure(kind, f"gRPC {code}: {said}")


def _incomplete(response: Response) -> Failure | None:
    if response.finish_reason is None:
        return Failure(FailureKind.CLOSED, "the stream ended without its last message")
    if not response.texts and not response.output_tokens:
        return Failure(FailureKind.EMPTY, "the answer has no token in it")
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _deploy(config: FastGenConfig, mark: Path) -> None:
    """In a process of its own: deploy, say so with the file `mark`, and wait to be ended."""
    import signal

    import mii

    inference: Any = import_module("deepspeed.inference")
    ragged: Any = import_module("deepspeed.inference.v2.ragged")
    engine = inference.RaggedInferenceEngineConfig(
        tensor_parallel=inference.DeepSpeedTPConfig(tp_size=config.tp_size),
        state_manager=ragged.DSStateManagerConfig(
            max_ragged_batch_size=config.max_ragged_batch_size,
            max_ragged_sequence_count=config.max_ragged_batch_size,
        ),
    )
    mii.serve(config.model, inference_engine_config=engine, **config.deployment())
    mark.touch()
    signal.pause()


if __name__ == "__main__":
    _deploy(FastGenConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))

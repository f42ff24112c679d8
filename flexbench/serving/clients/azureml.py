"""Online endpoints of Azure Machine Learning that generate text, in the form of its model catalog.

They answer at once. Newer deployments also have OpenAI's API, which the openai client speaks.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flexbench.core.endpoint import (
    Exchange,
    Failure,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.errors import ConfigError, RunError
from flexbench.http_endpoint.address import Url, parse_url
from flexbench.http_endpoint.keys import check_key, check_variable, quoting, read_key
from flexbench.http_endpoint.openai import describe_refused_key
from flexbench.http_endpoint.requirement import require_http

if TYPE_CHECKING:
    from flexbench.http_endpoint.pool import ConnectionPool
    from flexbench.http_endpoint.tls import TlsOptions

_DEPLOYMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_CHECK_TIMEOUT_S = 60.0
_CHECK = GenerationRequest(
    index=-1, prompt="Hello", prompt_tokens=1, max_new_tokens=1, is_streaming=False
)


@dataclass(frozen=True, kw_only=True)
class AzureMLConfig:
    """A deployment behind an online endpoint."""

    api_url: str = field(
        metadata={
            "help": "Scoring address of the endpoint. Proxies that environment variables name are "
            "not used."
        }
    )
    deployment_name: str = field(metadata={"help": "Which of the endpoint's deployments answers"})
    api_key_env: str = field(
        default="AZUREML_API_KEY",
        metadata={"help": "Name of the environment variable with the endpoint's key"},
    )
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={
            "secret": True,
            "help": "The key itself. Others on this machine can see it: better set the variable "
            "that --api-key-env names",
        },
    )
    ca_file: Path | None = field(
        default=None,
        metadata={"help": "Certificates (PEM) to accept instead of the system's authorities"},
    )
    tls_insecure: bool = field(
        default=False, metadata={"help": "Accept any certificate: who answers is not verified"}
    )

    def __post_init__(self) -> None:
        parse_url("--api-url", self.api_url)
        if not _DEPLOYMENT_NAME.fullmatch(self.deployment_name):
            raise ConfigError("--deployment-name", "must be the name of a deployment")
        check_variable("--api-key-env", self.api_key_env)
        if self.api_key is not None:
            check_key("--api-key", self.api_key)
        self.tls_options()

    def request_url(self) -> Url:
        """Where requests are sent."""
        return parse_url("--api-url", self.api_url)

    def tls_options(self) -> TlsOptions:
        """Which certificates are accepted."""
        from flexbench.http_endpoint.tls import TlsOptions

        return TlsOptions(ca_file=self.ca_file, is_insecure=self.tls_insecure)


class AzureMLClient:
    """Sends requests to an online endpoint; each once, whatever comes of it."""

    config_class: ClassVar[type] = AzureMLConfig
    requests_per_worker: ClassVar[int | None] = None
    can_stream: ClassVar[bool] = False
    preload: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ("uvloop", "httptools", "orjson")

    config: AzureMLConfig

    def __init__(self, config: AzureMLConfig) -> None:
        self.config = config
        self._pool: ConnectionPool | None = None
        self._server: str | None = None

    # --- in the command's process ---

    def start_service(self, context: ServiceContext) -> None:
        """Ask for a single token, which shows whether address, key and deployment are right.

        Raises RunError, or ConfigError for an option that has to be another.
        """
        require_http()
        from flexbench.http_endpoint.fetch import fetch

        if context.streaming:
            raise ConfigError(
                "--streaming",
                "azureml endpoints answer at once; give --no-streaming, or --api openai for a "
                "deployment that has /v1/chat/completions",
            )
        if self._key is None:
            raise ConfigError("--api-key-env", f"{self.config.api_key_env} is not set")
        fetched = fetch(
            self.config.request_url(),
            self.config.tls_options(),
            self.prepare_request(_CHECK),
            timeout_s=min(_CHECK_TIMEOUT_S, context.timeout_s),
            raise_if_stopped=context.raise_if_stopped,
        )
        self._server = fetched.server
        failure = fetched.exchange.failure or self.process_response(fetched.exchange).failure
        if failure is None:
            return
        if failure.kind is FailureKind.UNAUTHORIZED:
            source = "--api-key" if self.config.api_key is not None else self.config.api_key_env
            raise RunError(describe_refused_key(source, self._key, failure.message))
        raise RunError(f"The endpoint cannot be used: {failure.message}")

    def stop_service(self) -> None:
        """There is nothing of ours to stop."""

    def describe_service(self) -> dict[str, Any]:
        """Where requests went, and what the server said of itself."""
        return {
            "url": str(self.config.request_url()),
            "deployment_name": self.config.deployment_name,
            "server": self._quote(self._server) if self._server is not None else None,
        }

    # --- in a worker ---

    async def open(self, num_connections: int) -> None:
        """Open connections for so many requests at once."""
        from flexbench.http_endpoint.pool import ConnectionPool

        self._pool = ConnectionPool(self.config.request_url(), self.config.tls_options())
        await self._pool.open(num_connections)

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()

    def prepare_request(self, request: GenerationRequest) -> bytes:
        """The request as it goes over the network."""
        import orjson

        from flexbench.http_endpoint.head import with_body

        parameters = {
            "max_new_tokens": request.max_new_tokens,
            "do_sample": False,
            "return_full_text": False,
        }
        body = {"input_data": {"input_string": [request.prompt], "parameters": parameters}}
        return with_body(self._head, orjson.dumps(body))

    def send_request(self, prepared: bytes, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Send it and receive the whole answer; a coroutine."""
        assert self._pool is not None, "open() comes first"
        return self._pool.send(prepared, exchange)

    def process_response(self, exchange: Exchange) -> Response:
        """Read what arrived. These endpoints do not count tokens: the tokenizer has to."""
        if exchange.failure is not None or not exchange.ended_at:
            return Response(failure=exchange.failure)
        from flexbench.http_endpoint.completions import error_message
        from flexbench.http_endpoint.failures import status_failed

        body = b"".join(exchange.pieces)
        failure = status_failed(exchange.status, error_message(body), self._quote)
        if failure is not None:
            return Response(failure=failure)
        text = _read_text(body)
        if text is None:
            problem = f"no generated text in the answer: {self._quote(body)!r}"
            return Response(failure=Failure(FailureKind.MALFORMED, problem))
        if not text:
            problem = "the answer has no token in it"
            return Response(failure=Failure(FailureKind.EMPTY, problem))
        return Response(content_times=[exchange.ended_at], texts=[text])

    @cached_property
    def _key(self) -> str | None:
        return self.config.api_key or read_key("--api-key-env", self.config.api_key_env)

    def _quote(self, said: object) -> str:
        return quoting(self._key)(said)

    @cached_property
    def _head(self) -> bytes:
        from flexbench.http_endpoint.head import posting

        headers = {"azureml-model-deployment": self.config.deployment_name}
        return posting(self.config.request_url(), key=self._key, headers=headers)


def _read_text(body: bytes) -> str | None:
    """The text of the first answer, in any of the forms that scoring scripts give it; or None.

    [{"0": TEXT}], [TEXT], {"output": TEXT}, each also with {"generated_text": TEXT} for TEXT.
    """
    import orjson

    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    for _ in range(4):  # as deep as any of them is nested
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            value = value[0] if value else None
        elif isinstance(value, dict):
            names = ("0", "output", "generated_text")
            value = next((value[name] for name in names if name in value), None)
    return value if isinstance(value, str) else None

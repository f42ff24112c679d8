"""Any server that speaks OpenAI's HTTP API: completions or chat, as a stream or at once.

The modules that do the work are imported when they are needed: the options of this client are read
for every --help.
"""

from __future__ import annotations

import json
import re
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flexbench.core.endpoint import (
    Exchange,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.errors import ConfigError, RunError
from flexbench.http_endpoint.address import Url, parse_url
from flexbench.http_endpoint.keys import check_variable, quoting, read_key
from flexbench.http_endpoint.requirement import require_http

if TYPE_CHECKING:
    from flexbench.http_endpoint.completions import AnswerReader, RequestWriter
    from flexbench.http_endpoint.fetch import Fetched
    from flexbench.http_endpoint.pool import ConnectionPool
    from flexbench.http_endpoint.tls import TlsOptions

DEFAULT_API_URL = "http://127.0.0.1:8000"
_PATHS = {"completions": "/completions", "chat": "/chat/completions"}
_VERSION = re.compile(r"v\d+\w*")
_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")
# What a request is made of; the rest is everybody's own.
_OWN_FIELDS = frozenset(
    ("model", "prompt", "messages", "stream", "stream_options", "n", "best_of", *_LENGTH_FIELDS)
)
# A server that is there answers a question about its models at once.
_CHECK_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class OpenAIConfig:
    """An endpoint, and how it is asked."""

    model: str | None = None
    """None or 'auto': the server's only one, or its first."""
    api_url: str = field(
        default=DEFAULT_API_URL,
        metadata={
            "help": "Address of the server, with or without /v1 or the whole path. Proxies that "
            "environment variables name are not used."
        },
    )
    endpoint: str | None = field(
        default=None,
        metadata={"help": "completions or chat; by default what --api-url ends in, or completions"},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Name of the environment variable with the API key, if there is one"},
    )
    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0: the likeliest token"}
    )
    ignore_eos: bool = field(
        default=False,
        metadata={
            "help": "Ask for exactly as many tokens as are wanted (ignore_eos; "
            "vLLM and SGLang know it)"
        },
    )
    usage_in_stream: bool = field(
        default=True,
        metadata={"help": "Ask for the server's own count of tokens at the end of a stream"},
    )
    max_tokens_field: str = field(
        default="max_tokens",
        metadata={
            "help": "Name of the field with the number of tokens: max_tokens or "
            "max_completion_tokens"
        },
    )
    extra_body: str | None = field(
        default=None,
        metadata={
            "help": "JSON object with further fields of each request, like '{\"top_k\": 5}'; "
            "null leaves a field out"
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
        url = parse_url("--api-url", self.api_url)
        by_url = _endpoint_of(url.path)
        endpoint = self.endpoint or by_url or "completions"
        if endpoint not in _PATHS:
            raise ConfigError("--endpoint", f"must be completions or chat, not {endpoint!r}")
        if by_url is not None and by_url != endpoint:
            raise ConfigError("--endpoint", f"{endpoint} is not what --api-url ends in")
        object.__setattr__(self, "endpoint", endpoint)
        check_variable("--api-key-env", self.api_key_env)
        if not 0 <= self.temperature <= 100:
            raise ConfigError(
                "--temperature", f"must be a number of at least 0, not {self.temperature:g}"
            )
        if self.max_tokens_field not in _LENGTH_FIELDS:
            raise ConfigError("--max-tokens-field", f"must be {' or '.join(_LENGTH_FIELDS)}")
        self.extra_fields()
        self.tls_options()

    def base_url(self) -> Url:
        """The address that /models and the others are under."""
        url = parse_url("--api-url", self.api_url)
        by_url = _endpoint_of(url.path)
        if by_url is not None:
            return url.with_path(url.path.removesuffix(_PATHS[by_url]))
        if any(_VERSION.fullmatch(part) for part in url.path.split("/")):
            return url
        return url.with_path(f"{url.path}/v1")

    def request_url(self) -> Url:
        """Where requests are sent."""
        assert self.endpoint is not None
        base = self.base_url()
        return base.with_path(f"{base.path}{_PATHS[self.endpoint]}")

    def tls_options(self) -> TlsOptions:
        """Which certificates are accepted."""
        from flexbench.http_endpoint.tls import TlsOptions

        return TlsOptions(ca_file=self.ca_file, is_insecure=self.tls_insecure)

    def extra_fields(self) -> dict[str, Any]:
        """What --extra-body has in it."""
        if self.extra_body is None:
            return {}
        try:
            fields = json.loads(self.extra_body)
        except ValueError as error:
            raise ConfigError("--extra-body", f"is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError("--extra-body", 'must be a JSON object like {"top_k": 5}')
        own = sorted(_OWN_FIELDS & fields.keys())
        if own:
            raise ConfigError("--extra-body", f"must not have {own[0]!r}: other options set it")
        return fields


def _endpoint_of(path: str) -> str | None:
    if path.endswith(_PATHS["chat"]):
        return "chat"
    return "completions" if path.endswith(_PATHS["completions"]) else None


class OpenAIClient:
    """Sends requests to a server that somebody else has started."""

    config_class: ClassVar[type] = OpenAIConfig
    finds_model: ClassVar[bool] = True
    requests_per_worker: ClassVar[int | None] = None
    preload: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ("uvloop", "httptools", "orjson")

    config: OpenAIConfig

    def __init__(self, config: OpenAIConfig) -> None:
        self.config = config
        self._pool: ConnectionPool | None = None
        self._facts: dict[str, Any] = {}

    # --- in the command's process ---

    def start_service(self, context: ServiceContext) -> None:
        """Check that the server is there and accepts the key; find the model if none is given.

        Raises RunError, or ConfigError for an option that has to be another.
        """
        require_http()
        self._warn_of_open_key(context)
        fetched = self._ask_models(context)
        self._facts["server"] = fetched.server
        self._raise_unless_ready(fetched)
        models = _read_models(fetched.body) if fetched.exchange.status == 200 else []
        model = self.config.model if self.config.model != "auto" else None
        if model is None and not models:
            raise ConfigError("--model", "is needed: the server does not tell which models it has")
        if model is None:
            model = models[0]["id"]
        entry = next((entry for entry in models if entry["id"] == model), None)
        if entry is None and models:
            names = ", ".join(self._quote(known["id"]) for known in models[:5])
            context.progress.note(f"The server does not name {model!r} among its models: {names}")
        self._facts["owned_by"] = entry.get("owned_by") if entry is not None else None
        self.config = replace(self.config, model=model)

    def stop_service(self) -> None:
        """There is nothing of ours to stop."""

    def describe_service(self) -> dict[str, Any]:
        """Where requests went, and what the server said of itself."""
        return {
            "url": str(self.config.request_url()),
            "model": self.config.model,
            **{
                name: self._quote(value) if value is not None else None
                for name, value in self._facts.items()
            },
        }

    def _warn_of_open_key(self, context: ServiceContext) -> None:
        url = self.config.base_url()
        if self._key is not None and not url.is_tls and not url.is_loopback:
            context.progress.note(
                f"The key in {self.config.api_key_env} goes to {url.place} unencrypted: its "
                "address begins with http://"
            )

    def _ask_models(self, context: ServiceContext) -> Fetched:
        from flexbench.http_endpoint.fetch import fetch
        from flexbench.http_endpoint.head import request_head

        base = self.config.base_url()
        url = base.with_path(f"{base.path}/models")
        return fetch(
            url,
            self.config.tls_options(),
            request_head(url, "GET", key=self._key) + b"\r\n",
            timeout_s=min(_CHECK_TIMEOUT_S, context.timeout_s),
            raise_if_stopped=context.raise_if_stopped,
        )

    def _raise_unless_ready(self, fetched: Fetched) -> None:
        from flexbench.http_endpoint.completions import error_message
        from flexbench.http_endpoint.failures import status_failed

        failure = fetched.exchange.failure
        if failure is not None:
            raise RunError(f"The server cannot be used: {failure.message}")
        failure = status_failed(fetched.exchange.status, error_message(fetched.body), self._quote)
        if failure is None:
            return
        if failure.kind is FailureKind.UNAUTHORIZED:
            raise RunError(
                describe_refused_key(self.config.api_key_env, self._key, failure.message)
            )
        # Some servers have no list of models: the other refusals say that somebody is there.
        if failure.kind not in (FailureKind.HTTP_CLIENT_ERROR, FailureKind.RATE_LIMITED):
            raise RunError(f"The server is not ready: {failure.message}")

    # --- in a worker ---

    async def open(self, num_connections: int) -> None:
        """Open connections for so many requests at once."""
        from flexbench.http_endpoint.pool import ConnectionPool

        url = self.config.request_url()
        self._pool = ConnectionPool(url, self.config.tls_options())
        await self._pool.open(num_connections)

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()

    def prepare_request(self, request: GenerationRequest) -> bytes:
        """The request as it goes over the network."""
        return self._writer.write(request)

    def send_request(self, prepared: bytes, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Send it and receive the whole answer; a coroutine."""
        assert self._pool is not None, "open() comes first"
        return self._pool.send(prepared, exchange)

    def process_response(self, exchange: Exchange) -> Response:
        """Read what arrived."""
        return self._reader.read(exchange)

    @cached_property
    def _key(self) -> str | None:
        return read_key("--api-key-env", self.config.api_key_env)

    def _quote(self, said: object) -> str:
        return quoting(self._key)(said)

    @cached_property
    def _writer(self) -> RequestWriter:
        from flexbench.http_endpoint.completions import RequestWriter
        from flexbench.http_endpoint.head import posting

        config = self.config
        return RequestWriter(
            posting(config.request_url(), key=self._key),
            is_chat=config.endpoint == "chat",
            common={
                "model": config.model,
                "temperature": config.temperature,
                **config.extra_fields(),
            },
            length_field=config.max_tokens_field,
            has_usage_in_stream=config.usage_in_stream,
            ignores_eos=config.ignore_eos,
        )

    @cached_property
    def _reader(self) -> AnswerReader:
        from flexbench.http_endpoint.completions import AnswerReader

        return AnswerReader(quoting(self._key))


def describe_refused_key(variable: str, key: str | None, refusal: str) -> str:
    """What to do about a key that a server does not accept, or misses."""
    if key is None:
        return f"The server wants an API key, and {variable} is not set ({refusal})"
    return f"The server does not accept the API key in {variable} ({refusal})"


def _read_models(body: bytes) -> list[dict[str, Any]]:
    """The entries of a list of models; none for an answer that is no such list."""
    try:
        value = json.loads(body)
    except ValueError:
        return []
    entries = value.get("data") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        return []
    return [
        entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]

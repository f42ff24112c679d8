"""What clients share that start their server themselves, and then ask it over HTTP."""

from __future__ import annotations

import http.client
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from flexbench.core.endpoint import Exchange, GenerationRequest, Response
from flexbench.core.service_process import LOCAL_HOST

if TYPE_CHECKING:
    from flexbench.core.endpoint import Client


class AskedOverHttp(ABC):
    """What a client does in a generator's process: all of it goes to an HTTP client."""

    @property
    @abstractmethod
    def _requests(self) -> Client:
        """The HTTP client, the same one every time."""

    async def open(self, num_connections: int) -> None:
        """Open connections for so many requests at once."""
        await self._requests.open(num_connections)

    async def close(self) -> None:
        """Close all connections."""
        await self._requests.close()

    def prepare_request(self, request: GenerationRequest) -> Any:
        """The request as it goes over the network."""
        return self._requests.prepare_request(request)

    def send_request(self, prepared: Any, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Send it and receive the whole answer; a coroutine."""
        return self._requests.send_request(prepared, exchange)

    def process_response(self, exchange: Exchange) -> Response:
        """Read what arrived."""
        return self._requests.process_response(exchange)


def get(port: int, path: str, *, timeout_s: float, key: str | None = None) -> tuple[int, bytes]:
    """Status and body of a server's answer on this machine, before anything is measured.

    Raises OSError or http.client.HTTPException when there is none.
    """
    connection = http.client.HTTPConnection(LOCAL_HOST, port, timeout=timeout_s)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()

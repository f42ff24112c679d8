"""The side of the service that people see: its HTTP server, in a thread beside the computing."""

from __future__ import annotations

import asyncio
import threading

from flexbench.core.errors import ConfigError
from flexbench.dist.batching import JobQueue
from flexbench.dist.completions import CompletionsApp, Limits
from flexbench.dist.http_server import HttpServer
from flexbench.dist.text import Codec

HOST = "127.0.0.1"
# For answers on their way, and errors instead of answers, to be taken.
_CLOSE_GRACE_S = 0.5


class Front:
    """Listens from the beginning to the end of its `with` block; requests wait in `queue`."""

    def __init__(self, *, port: int, model_name: str, codec: Codec, limits: Limits) -> None:
        """`port` 0: a free one."""
        self.queue = JobQueue()
        self._loop = asyncio.new_event_loop()
        self.app = CompletionsApp(
            model_name=model_name, codec=codec, limits=limits, queue=self.queue, loop=self._loop
        )
        self.port = port
        self._server = HttpServer(self.app.handle)
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)

    def __enter__(self) -> Front:
        try:
            self.port = self._loop.run_until_complete(self._server.open(HOST, self.port))
        except OSError as error:
            self._loop.close()
            raise ConfigError(
                "--port", f"cannot listen at {HOST}:{self.port}: {error.strerror or error}"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.app.fail("the service has ended")
        closing = asyncio.run_coroutine_threadsafe(self._server.close(_CLOSE_GRACE_S), self._loop)
        try:
            closing.result(2 * _CLOSE_GRACE_S + 1)
        except TimeoutError:
            pass  # the process ends, and its connections with it
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_GRACE_S)
            if not self._thread.is_alive():
                self._loop.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def set_ready(self) -> None:
        """Answer requests from now on."""
        self.app.is_ready = True

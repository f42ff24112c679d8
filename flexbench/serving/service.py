"""What is measured: started when a point first needs it, and stopped at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flexbench.core.endpoint import Client, ServiceContext
from flexbench.core.folders import WorkFolders
from flexbench.core.progress import Progress
from flexbench.serving.config import PromptConfig, ServingConfig

_MANY_DEVIATIONS = 4


class Service:
    """The service behind a client. Points that were measured before need none."""

    def __init__(
        self,
        client_class: type[Client],
        config: ServingConfig,
        *,
        progress: Progress,
        folders: WorkFolders,
        raise_if_stopped: Callable[[], None],
    ) -> None:
        self._client = client_class(config.client_config)
        self._config = config
        self._progress = progress
        self._folders = folders
        self._raise_if_stopped = raise_if_stopped
        self._is_started = False
        self.description: dict[str, Any] = {}
        """What a record says of it, once it is started."""

    def start(self) -> Any:
        """Start it, unless it is; the configuration that workers need."""
        if not self._is_started:
            self._is_started = True
            self._client.start_service(self._context())
            self.description = self._client.describe_service()
        return self._client.config

    def check(self) -> None:
        """Raise the client's error if a service that was started has ended by itself."""
        check: Callable[[], None] | None = getattr(self._client, "check_service", None)
        if self._is_started and check is not None:
            check()

    def stop(self) -> None:
        """Stop it, if it was started, or half started."""
        if self._is_started:
            self._is_started = False
            self._client.stop_service()

    def _context(self) -> ServiceContext:
        config = self._config
        prompts = [sweep.prompts for sweep in config.sweeps]
        in_flight = [load.concurrency or 0 for sweep in config.sweeps for load in sweep.loads]
        if config.is_search:
            in_flight.append(config.max_clients)
        return ServiceContext(
            progress=self._progress,
            log_folder=self._folders.logs,
            scratch_folder=self._folders.scratch,
            timeout_s=config.limits.service_timeout_s,
            raise_if_stopped=self._raise_if_stopped,
            streaming=any(one.streaming for one in prompts),
            max_prompt_tokens=max(_longest_prompt(one) for one in prompts),
            max_new_tokens=max(_longest_output(one) for one in prompts),
            max_in_flight=max(in_flight),
        )


def _longest_prompt(prompts: PromptConfig) -> int:
    """Of a dataset nothing is known but the limit."""
    if (prompts.prompt_text_source or "").endswith(".jsonl"):
        return prompts.max_prompt_length
    likely = _hardly_exceeded(prompts.prompt_length, prompts.prompt_length_var)
    return min(likely, prompts.max_prompt_length)


def _longest_output(prompts: PromptConfig) -> int:
    return _hardly_exceeded(prompts.max_new_tokens, prompts.max_new_tokens_var)


def _hardly_exceeded(mean: int, fraction: float) -> int:
    """What hardly any draw from the lengths' distribution exceeds."""
    return math.ceil(mean * (1 + _MANY_DEVIATIONS * fraction))

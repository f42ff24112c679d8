"""What makes a point another one than any other: its whole configuration."""

from __future__ import annotations

import zlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from flexbench.core.environment import REDACTED
from flexbench.serving.config import Load, PromptConfig, ServingConfig


def configuration_of(
    config: ServingConfig,
    prompts: PromptConfig,
    load: Load,
    *,
    model: str | None,
    number_of_try: int,
    num_ranks: int,
) -> dict[str, Any]:
    """Everything that a point's figures may depend on; the same on a second start.

    `model` is the one that an endpoint was found to have; None: the configuration names it.
    """
    client = public_fields(config.client_config)
    if model is not None:
        client["model"] = model
    return {
        "api": config.api,
        "client": client,
        "prompts": asdict(prompts),
        "load": asdict(load),
        "warmup_requests": config.warmup_requests,
        "request_timeout_s": config.limits.request_timeout_s,
        "max_errors": config.limits.max_errors,
        "max_error_rate": config.limits.max_error_rate,
        "slo": list(config.slo),
        "num_workers": config.num_workers,
        "use_threading": config.use_threading,
        "num_ranks": num_ranks,
        "number_of_try": number_of_try,
    }


def series_of(configuration: dict[str, Any]) -> int:
    """A number for the prompts of this point, which another one of the run hardly has.

    So a server that keeps prefixes has seen none of them at an earlier point, be that another load,
    length or try.
    """
    words = {name: configuration[name] for name in ("prompts", "load", "number_of_try")}
    return zlib.crc32(repr(words).encode())


def public_fields(config: Any) -> dict[str, Any]:
    """A client's configuration as plain data, without its secrets."""
    values = {}
    for one in fields(config):
        value = getattr(config, one.name)
        if one.metadata.get("secret") and value is not None:
            value = REDACTED
        values[one.name] = str(value) if isinstance(value, Path) else value
    return values

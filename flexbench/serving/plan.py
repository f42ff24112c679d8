"""From options and config files to sweeps: what is measured, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError
from flexbench.core.units import parse_seconds
from flexbench.serving.clients import find_client
from flexbench.serving.config import (
    DEFAULT_NUM_CLIENTS,
    Arrival,
    Limits,
    Load,
    PromptConfig,
    ServingConfig,
    Sweep,
)
from flexbench.serving.config_files import expand
from flexbench.serving.point_files import PointStore
from flexbench.serving.prompts import open_prompts

_DEFAULT_MAX_PROMPT_LENGTH = 4000
_PROMPT_NAMES = tuple(field.name for field in fields(PromptConfig))
_TAKEN_AS_GIVEN = (
    "max_clients",
    "max_rate",
    "warmup_requests",
    "num_workers",
    "use_threading",
    "result_dir",
    "force",
)


def config_from(
    arguments: dict[str, Any], make_client_config: Callable[[str], Any]
) -> ServingConfig:
    """The whole run, from the command's parameters by name.

    `make_client_config` makes the client's configuration for a model. Raises ConfigError and
    InputFileError.
    """
    duration = arguments["duration"]
    sweeps = make_sweeps(arguments)
    return ServingConfig(
        api=arguments["api"],
        client_config=make_client_config(_model_of(sweeps)),
        sweeps=sweeps,
        is_search=arguments["saturation"],
        search_point_s=None if duration is None else parse_seconds("--duration", duration),
        slo=tuple(arguments["slo"] or ()),
        limits=Limits(
            request_timeout_s=parse_seconds("--request-timeout", arguments["request_timeout"]),
            warmup_timeout_s=parse_seconds("--warmup-timeout", arguments["warmup_timeout"]),
            service_timeout_s=parse_seconds("--service-timeout", arguments["service_timeout"]),
            early_stop_latency_s=arguments["early_stop_latency"],
            max_errors=arguments["max_errors"],
            max_error_rate=arguments["max_error_rate"],
        ),
        **{name: arguments[name] for name in _TAKEN_AS_GIVEN},
    )


def _model_of(sweeps: Sequence[Sweep]) -> str:
    """The model that all sweeps ask for: a config file may name it."""
    models = {sweep.prompts.model for sweep in sweeps}
    if len(models) > 1:
        raise ConfigError(
            "--config-file",
            f"names several models, {', '.join(sorted(models))}; a run measures one",
        )
    return models.pop()


def make_sweeps(arguments: dict[str, Any]) -> tuple[Sweep, ...]:
    """The sweeps that the options ask for, one for each combination in the config files.

    `arguments` has the command's parameters by name. Raises ConfigError and InputFileError.
    """
    paths = arguments["config_file"] or []
    given = {name: arguments[name] for name in (*_PROMPT_NAMES, "num_clients", "rate")}
    if given["streaming"] is None:
        given["streaming"] = getattr(find_client(arguments["api"]), "can_stream", True)
    return tuple(
        Sweep(prompts=_prompts(values), loads=_loads(arguments | values))
        for values in (expand(paths, given) if paths else [given])
    )


def _prompts(values: Mapping[str, Any]) -> PromptConfig:
    chosen = {name: values[name] for name in _PROMPT_NAMES}
    if chosen["max_prompt_length"] is None:
        chosen["max_prompt_length"] = max(_DEFAULT_MAX_PROMPT_LENGTH, chosen["prompt_length"])
    return PromptConfig(**chosen)


def _loads(arguments: Mapping[str, Any]) -> tuple[Load, ...]:
    clients, rates = arguments["num_clients"], arguments["rate"]
    if arguments["burst_size"] > 1 and arguments["arrival"] is not Arrival.BURST:
        raise ConfigError("--burst-size", "is for --arrival burst")
    if arguments["arrival"] is not Arrival.CONSTANT and not rates:
        raise ConfigError("--arrival", "is for an open loop; give its --rate as well")
    if clients and rates:
        raise ConfigError("--rate", "is another kind of load than --num-clients; give one")
    if arguments["saturation"]:
        return (_first_load_of_search(arguments, clients, rates),)
    per_client, least = arguments["num_requests_per_client"], arguments["min_requests"]
    check_count("--num-requests-per-client", per_client, minimum=1)
    check_count("--min-requests", least, minimum=0)
    duration_s = _duration(arguments)

    def limits(num_clients: int) -> dict[str, Any]:
        if duration_s is not None:
            return {"duration_s": duration_s}
        return {"num_requests": max(num_clients * per_client, least)}

    if rates:
        return tuple(_open_load(arguments, rate, **limits(1)) for rate in rates)
    return tuple(
        Load(concurrency=number, **limits(number)) for number in clients or DEFAULT_NUM_CLIENTS
    )


def _first_load_of_search(
    arguments: Mapping[str, Any], clients: list[int] | None, rates: list[float] | None
) -> Load:
    if len(clients or rates or [1]) > 1:
        option = "--num-clients" if clients else "--rate"
        raise ConfigError(option, "with --saturation, give one value: where the search begins")
    # How long its points last is up to the search, unless the person says it.
    duration_s = _duration(arguments) or 1.0
    if rates:
        return _open_load(arguments, rates[0], duration_s=duration_s)
    return Load(concurrency=(clients or [1])[0], duration_s=duration_s)


def _open_load(arguments: Mapping[str, Any], rate: float, **limits: Any) -> Load:
    return Load(
        rate_per_s=rate,
        arrival=arguments["arrival"],
        burst_size=arguments["burst_size"],
        **limits,
    )


def _duration(arguments: Mapping[str, Any]) -> float | None:
    text = arguments["duration"]
    return None if text is None else parse_seconds("--duration", text)


def check_plan(config: ServingConfig) -> None:
    """Find out what would stop the run before anything is sent. Raises ConfigError and such."""
    # Imported late: --help needs none of it.
    from flexbench.serving.load import choose_topology

    PointStore(config.result_dir).check(create_folder=False)
    client_class = find_client(config.api)
    for sweep in config.sweeps:
        if config.slo:
            from flexbench.serving.slo import check_measurable, parse_slo

            check_measurable(parse_slo(config.slo), is_streaming=sweep.prompts.streaming)
        open_prompts(sweep.prompts).request(0)
        for load in sweep.loads:
            choose_topology(
                client_class,
                load,
                num_workers=config.num_workers,
                use_threading=config.use_threading,
            )

"""Clients by name: one file for each serving system, and what plug-ins add.

A package adds a client with an entry point of the group flexbench.clients, whose name is what
--api takes and whose object is a class that keeps the protocol `flexbench.core.endpoint.Client`.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexbench.core.endpoint import Client
from flexbench.core.errors import ConfigError, FlexbenchError, MissingDependencyError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

DEFAULT_CLIENT = "openai"
ENTRY_POINTS = "flexbench.clients"

BUILT_IN = {
    "openai": "flexbench.http_endpoint.openai:OpenAIClient",
    "dummy": "flexbench.serving.clients.dummy:DummyClient",
    "vllm": "flexbench.serving.clients.vllm:VLLMClient",
    "fastgen": "flexbench.serving.clients.fastgen:FastGenClient",
    "azureml": "flexbench.serving.clients.azureml:AzureMLClient",
    "petals": "flexbench.petals.endpoint:PetalsClient",
    "dist": "flexbench.dist.endpoint:DistClient",
}

_EXTRAS = {"petals": "petals", "dist": "dist"}
_ATTRIBUTES = ("config_class", "requests_per_worker", "preload", "packages")
_METHODS = (
    "start_service",
    "stop_service",
    "describe_service",
    "open",
    "close",
    "prepare_request",
    "send_request",
    "process_response",
)


def client_names() -> list[str]:
    """All names that --api takes, those of plug-ins last."""
    return [*BUILT_IN, *(name for name in _plug_ins() if name not in BUILT_IN)]


def find_client(name: str) -> type[Client]:
    """The class of a client; nothing but its own module is imported.

    Raises ConfigError for a name that nobody has, MissingDependencyError where the client needs a
    package that is not installed, FlexbenchError for a plug-in that does not work.
    """
    if name in BUILT_IN:
        return _built_in(name)
    plug_ins = _plug_ins()
    if name not in plug_ins:
        names = client_names()
        nearest = get_close_matches(name, names, n=1, cutoff=0.7)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError("--api", f"must be one of {', '.join(names)}, not {name}{hint}")
    return _plug_in(name, plug_ins[name])


def _built_in(name: str) -> type[Client]:
    module, _, attribute = BUILT_IN[name].partition(":")
    try:
        client: type[Client] = getattr(import_module(module), attribute)
    except ImportError as error:
        missing = error.name or ""
        if missing.partition(".")[0] in ("", "flexbench"):
            raise
        extra = _EXTRAS.get(name, "serving")
        raise MissingDependencyError(
            f"--api {name} needs {missing}, which is not installed: "
            f"pip install 'flexbench[{extra}]'"
        ) from error
    return client


def _plug_ins() -> dict[str, list[EntryPoint]]:
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, []).append(entry)
    return found


def _plug_in(name: str, entries: list[EntryPoint]) -> type[Client]:
    packages = sorted({_package_of(entry) for entry in entries})
    if len(packages) > 1:
        raise ConfigError("--api", f"{name} is a client of several packages: {', '.join(packages)}")
    entry = entries[0]
    whose = f"The client {name} of the package {packages[0]}"
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a module of others raises
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise FlexbenchError(f"{whose} cannot be loaded from {entry.value}: {reason}") from error
    problem = _problem_of(loaded)
    if problem is not None:
        raise FlexbenchError(f"{whose} does not work: {entry.value} {problem}")
    client: type[Client] = loaded
    return client


def _package_of(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def _problem_of(loaded: Any) -> str | None:
    if not isinstance(loaded, type):
        return "is no class"
    missing = [name for name in _ATTRIBUTES if not hasattr(loaded, name)]
    missing += [name for name in _METHODS if not callable(getattr(loaded, name, None))]
    if missing:
        return f"lacks {', '.join(missing)}"
    config_class = getattr(loaded, "config_class", None)
    if not (isinstance(config_class, type) and is_dataclass(config_class)):
        return "has a config_class that is no dataclass"
    return None

"""Speeds that were measured before, in the person's cache folder.

A look-up takes milliseconds: it reads a file and the versions of what is installed, and imports
neither torch nor Petals.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from flexbench.core.environment import cpu_model, num_cpus, visible_gpus
from flexbench.core.errors import FlexbenchError
from flexbench.core.results import LOCK_TIMEOUT_S
from flexbench.models.families import DecoderSpec
from flexbench.server_config.bandwidth import is_measured
from flexbench.server_config.compute import OWN_BLOCK, OWN_BLOCK_VERSION, uses_petals
from flexbench.server_config.compute_setup import ComputeSetup
from flexbench.server_config.speeds import ComputeSpeed, Network

_SCHEMA_VERSION = 2
_NETWORK_MAX_AGE = timedelta(days=7)
_MAX_RATE = 1e18
# Of a configuration's values, those that decide what a block computes, beside its sizes.
_DECISIVE_VALUES = (
    "activation_function",
    "alibi",
    "attention_bias",
    "bias",
    "ffn_dim",
    "hidden_act",
    "intermediate_size",
    "mlp_bias",
    "multi_query",
    "new_decoder_architecture",
    "num_experts_per_tok",
    "num_local_experts",
    "parallel_attn",
    "sliding_window",
)


@dataclass(frozen=True, kw_only=True)
class CachedSpeed:
    """How fast a block computes, measured at `measured_at` (UTC, ISO 8601).

    `compute` has both its rates; `network` is what was last measured on this machine, at a time of
    its own, or None.
    """

    compute: ComputeSpeed
    measured_at: str
    network: Network | None = None


@dataclass(frozen=True, kw_only=True)
class CachedNetwork:
    """The network of this machine as it was measured at `measured_at` (UTC, ISO 8601)."""

    network: Network
    measured_at: str

    @property
    def is_recent(self) -> bool:
        """Whether it is good enough to spare a measurement."""
        age = datetime.now(UTC) - datetime.fromisoformat(self.measured_at)
        return timedelta(0) <= age <= _NETWORK_MAX_AGE


def device_name(setup: ComputeSetup) -> str:
    """What computes, for people: 'CPU (AMD EPYC, 2 cores)', a GPU's name, or 'MPS'."""
    if setup.device_type == "cpu":
        return f"CPU ({cpu_model()}, {num_cpus()} cores)"
    if setup.device_type == "mps":
        return "MPS"
    gpus = [gpu.name or "GPU" for gpu in visible_gpus().gpus]
    numbers = [int(device.partition(":")[2] or 0) for device in setup.devices]
    names = [gpus[number] if number < len(gpus) else "GPU" for number in numbers]
    return " + ".join(dict.fromkeys(names))


class SpeedCache:
    """Speeds by everything that they depend on, in a JSON file that many processes may use."""

    def __init__(self, path: Path | None = None) -> None:
        """The cache in the file `path`; the default is one for each person."""
        self.path = path or _default_path()

    def lookup(
        self, spec: DecoderSpec, setup: ComputeSetup, device_name: str
    ) -> CachedSpeed | None:
        """What was stored for the same dimensions, device, formats and versions, if anything.

        A file that is missing or cannot be understood holds nothing.
        """
        content = self._read()
        network = _parse_network(content["networks"].get(_machine()))
        entry = content["speeds"].get(_key(_subject(spec, setup, device_name)))
        return _parse_speed(entry, network.network if network else None)

    def lookup_network(self) -> CachedNetwork | None:
        """What was last measured on this machine, however long ago, if anything."""
        return _parse_network(self._read()["networks"].get(_machine()))

    def store(
        self,
        spec: DecoderSpec,
        setup: ComputeSetup,
        device_name: str,
        compute: ComputeSpeed,
        *,
        measured_at: str,
    ) -> None:
        """Keep `compute` instead of what was stored for the same. Raises FlexbenchError."""
        subject = _subject(spec, setup, device_name)
        entry = {**subject, "compute": asdict(compute), "measured_at": measured_at}
        self._add("speeds", _key(subject), entry)

    def store_network(self, network: Network, *, measured_at: str) -> None:
        """Keep `network` as that of this machine: only a measured one. Raises FlexbenchError."""
        assert is_measured(network), network.source
        self._add("networks", _machine(), {**asdict(network), "measured_at": measured_at})

    def _add(self, part: str, key: str, entry: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                content = self._read()
                content[part][key] = entry
                _replace(self.path, {"schema_version": _SCHEMA_VERSION, **content})
        except OSError as error:
            raise FlexbenchError(
                f"{self.path}: what was measured could not be kept: {error.strerror or error}"
            ) from error

    def _read(self) -> dict[str, dict[str, Any]]:
        """Entries by their keys, of 'speeds' and of 'networks'."""
        empty: dict[str, dict[str, Any]] = {"speeds": {}, "networks": {}}
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return empty
        if not isinstance(content, dict) or content.get("schema_version") != _SCHEMA_VERSION:
            return empty
        found = {part: content.get(part) for part in empty}
        return {part: value if isinstance(value, dict) else {} for part, value in found.items()}


def _default_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification wants relative paths to be ignored. Without a home, ~ stays what it is, and
    # is a folder that cannot be used.
    folder = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    return folder / "flexbench" / "speeds.json"


def _subject(spec: DecoderSpec, setup: ComputeSetup, device_name: str) -> dict[str, Any]:
    """What a speed depends on. The name of the model is not among it."""
    values = {
        name: spec.values[name] for name in _DECISIVE_VALUES if spec.values.get(name) is not None
    }
    return {
        "model": {
            "family": spec.family,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_attention_heads,
            "num_key_value_heads": spec.num_key_value_heads,
            "block_parameters": spec.block_parameters,
            **values,
        },
        "device": device_name,
        "num_devices": len(setup.devices),
        "num_threads": _num_threads() if setup.device_type == "cpu" else None,
        "dtype": setup.torch_dtype,
        "quant_type": setup.quant_type,
        "versions": _versions(spec, setup),
    }


def _num_threads() -> int:
    """How many torch computes with in a new process: by its variable, or one a core."""
    asked = re.match(r"\s*(\d{1,4})\b", os.environ.get("OMP_NUM_THREADS", ""), re.ASCII)
    return (int(asked[1]) if asked else 0) or num_cpus()


def _machine() -> str:
    """Tells machines apart that share a home folder; a host's name is nobody's business."""
    return hashlib.sha256(platform.node().encode()).hexdigest()


def _versions(spec: DecoderSpec, setup: ComputeSetup) -> dict[str, str | int | None]:
    packages = ["torch"]
    own: dict[str, str | int | None] = {OWN_BLOCK: OWN_BLOCK_VERSION}
    if uses_petals(spec):
        packages += ["petals", "transformers", "tensor_parallel"]
        own = {}
    if setup.quant_type != "none":
        packages.append("bitsandbytes")
    return own | {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _key(subject: Mapping[str, Any]) -> str:
    text = json.dumps(subject, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse_speed(entry: Any, network: Network | None) -> CachedSpeed | None:
    """A stored entry; None unless it is whole."""
    try:
        compute = ComputeSpeed(**entry["compute"])
        measured_at = _moment(entry["measured_at"])
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    is_whole = all(map(_is_rate, (compute.inference_rps, compute.forward_rps)))
    if not is_whole or not isinstance(compute.source, str):
        return None
    return CachedSpeed(compute=compute, measured_at=measured_at, network=network)


def _parse_network(entry: Any) -> CachedNetwork | None:
    """A stored entry; None unless it is whole."""
    try:
        values = dict(entry)
        measured_at = _moment(values.pop("measured_at"))
        network = Network(**values)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    is_whole = all(map(_is_rate, (network.download_bits_per_s, network.upload_bits_per_s)))
    if not is_whole or not isinstance(network.source, str) or not is_measured(network):
        return None
    return CachedNetwork(network=network, measured_at=measured_at)


def _moment(text: Any) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(text)
    return str(text)


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < _MAX_RATE


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Imported here: who only looks something up should not wait for it.
    import portalocker

    try:
        with portalocker.Lock(path, mode="a", timeout=LOCK_TIMEOUT_S):
            yield
    except portalocker.LockException as error:
        raise OSError(None, f"{path} cannot be locked: {error}") from error


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write a new file and put it in the old one's place, so that nobody ever reads half of it."""
    with tempfile.NamedTemporaryFile(
        mode="w", encoding="utf-8", dir=path.parent, prefix=f"{path.name}.", delete=False
    ) as file:
        try:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise

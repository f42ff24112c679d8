"""Speeds that were measured before, in the person's cache folder.

A look-up takes milliseconds: it reads a file and the versions of what is installed, and imports
neither torch nor Petals.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from flexbench.core.environment import cpu_model, describe_machine, num_cpus
from flexbench.core.errors import FlexbenchError
from flexbench.core.results import LOCK_TIMEOUT_S
from flexbench.models.families import DecoderSpec
from flexbench.server_config.compute import OWN_BLOCK, OWN_BLOCK_VERSION, uses_petals
from flexbench.server_config.setup import ComputeSetup
from flexbench.server_config.speeds import ComputeSpeed, Network

_SCHEMA_VERSION = 1
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
    """What was measured at `measured_at` (UTC, ISO 8601).

    `compute` has both its rates; `network` is None where no network was measured with it.
    """

    compute: ComputeSpeed
    measured_at: str
    network: Network | None = None


def device_name(setup: ComputeSetup) -> str:
    """What computes, for people: 'CPU (AMD EPYC, 2 cores)', a GPU's name, or 'MPS'."""
    if setup.device_type == "cpu":
        return f"CPU ({cpu_model()}, {num_cpus()} cores)"
    if setup.device_type == "mps":
        return "MPS"
    gpus = [gpu["name"] for gpu in describe_machine()["gpus"]]
    names = [_gpu_name(gpus, device) for device in setup.devices]
    return " + ".join(dict.fromkeys(names))


def _gpu_name(gpus: list[str], device: str) -> str:
    number = int(device.partition(":")[2] or 0)
    # torch counts only the GPUs that this variable names.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(part.strip().isdigit() for part in visible):
        numbers = [int(part) for part in visible]
        number = numbers[number] if number < len(numbers) else len(gpus)
    return gpus[number] if number < len(gpus) else "GPU"


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
        return _parse(self._read().get(_key(_subject(spec, setup, device_name))))

    def store(
        self, spec: DecoderSpec, setup: ComputeSetup, device_name: str, speed: CachedSpeed
    ) -> None:
        """Keep `speed` instead of what was stored for the same. Raises FlexbenchError."""
        subject = _subject(spec, setup, device_name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                speeds = {**self._read(), _key(subject): {**subject, "speed": asdict(speed)}}
                _replace(self.path, {"schema_version": _SCHEMA_VERSION, "speeds": speeds})
        except OSError as error:
            raise FlexbenchError(
                f"{self.path}: what was measured could not be kept: {error.strerror or error}"
            ) from error

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("schema_version") != _SCHEMA_VERSION:
            return {}
        speeds = content.get("speeds")
        return speeds if isinstance(speeds, dict) else {}


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
        "dtype": setup.torch_dtype,
        "quant_type": setup.quant_type,
        "versions": _versions(spec, setup),
    }


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


def _parse(entry: Any) -> CachedSpeed | None:
    """A stored entry; None unless it is whole."""
    try:
        speed = dict(entry["speed"])
        compute = ComputeSpeed(**speed.pop("compute"))
        network = speed.pop("network")
        found = CachedSpeed(
            compute=compute, network=Network(**network) if network else None, **speed
        )
        datetime.fromisoformat(found.measured_at)
        rates = [compute.inference_rps, compute.forward_rps]
        texts = [compute.source]
        if found.network is not None:
            rates += [found.network.download_bits_per_s, found.network.upload_bits_per_s]
            texts.append(found.network.source)
        is_whole = all(_is_rate(rate) for rate in rates)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    return found if is_whole and all(isinstance(text, str) for text in texts) else None


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


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

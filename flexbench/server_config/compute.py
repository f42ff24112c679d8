"""How fast one block computes, by Petals' method: the worker's side, and what it can measure.

Source: measure_compute_rps in petals/server/throughput.py, which is called where Petals is
installed. torch and Petals are imported by the worker alone.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbench.core.environment import available_memory_bytes
from flexbench.core.errors import ConfigError, MissingDependencyError
from flexbench.core.units import format_bytes
from flexbench.models.families import DTYPE_BYTES, DecoderSpec
from flexbench.petals_runtime.requirement import INSTALL_COMMAND
from flexbench.server_config.compute_setup import ComputeSetup

if TYPE_CHECKING:
    import torch

    from flexbench.core.processes import WorkerChannel
    from flexbench.server_config.block import Cache, DecoderBlock

OWN_BLOCK = "flexbench's own block"
OWN_BLOCK_VERSION = 1
"""To be raised with every change of the own block that changes its speed."""

_OWN_FAMILIES = ("bloom", "opt")
_PETALS_PACKAGES = ("petals", "hivemind")
_HOW_TO_INSTALL = f"in a checkout of flexbench, install with ./scripts/setup, or: {INSTALL_COMMAND}"
# What 1024 tokens take at the peak, measured with BLOOM's, Falcon's and Llama's blocks on a CPU:
# that many copies of the attention weights, and of the hidden states, in float32.
_ATTENTION_COPIES = 4
_HIDDEN_COPIES = 16


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One of the two measurements: after a step that does not count, `num_steps` that do."""

    kind: str
    num_tokens: int
    num_steps: int

    @property
    def steps(self) -> str:
        """Its size for people: '100 steps of 1 token'."""
        tokens = "1 token" if self.num_tokens == 1 else f"{self.num_tokens} tokens"
        return f"{self.num_steps} steps of {tokens}"

    @property
    def title(self) -> str:
        """What a person is told while it runs."""
        return f"Measuring {self.kind}: {self.steps}"


INFERENCE = Pass(kind="inference", num_tokens=1, num_steps=100)
FORWARD = Pass(kind="forward", num_tokens=1024, num_steps=10)
PASSES = (INFERENCE, FORWARD)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a worker reports: `value` tokens/s through one block, in the pass `kind`.

    `block` says whose block it was.
    """

    kind: str
    value: float
    block: str


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What a worker reports instead when this machine cannot do what `option` asks for."""

    option: str
    problem: str


def is_installed(package: str) -> bool:
    """Whether `package` could be imported; it is not."""
    return find_spec(package) is not None


def uses_petals(spec: DecoderSpec) -> bool:
    """Whether the block to measure is Petals', not our own."""
    if spec.family == "opt" and spec.block_parameters != _bloom_block_parameters(spec):
        return False  # an MLP that no BLOOM has
    return all(is_installed(package) for package in (*_PETALS_PACKAGES, "torch"))


def _bloom_block_parameters(spec: DecoderSpec) -> int:
    return 12 * spec.hidden_size**2 + 13 * spec.hidden_size


def is_stand_in(spec: DecoderSpec) -> bool:
    """Whether the BLOOM block of the same dimensions is measured, because Petals has none."""
    return spec.family == "opt" and uses_petals(spec)


def check_can_measure(spec: DecoderSpec, setup: ComputeSetup) -> None:
    """Find out before anything is started what would make a measurement impossible.

    Raises MissingDependencyError with the command to type, or ConfigError for too little memory.
    """
    if not is_installed("torch"):
        raise MissingDependencyError(
            f"not installed: torch; --measure runs a real block; {_HOW_TO_INSTALL}"
        )
    if uses_petals(spec):
        _check_petals_family(spec)
    else:
        _check_own_block(spec, setup)
    if setup.quant_type != "none" and not is_installed("bitsandbytes"):
        raise MissingDependencyError(
            f"not installed: bitsandbytes; --quant-type {setup.quant_type} needs it; "
            f"{_HOW_TO_INSTALL}"
        )
    _check_memory(spec, setup)


def _check_petals_family(spec: DecoderSpec) -> None:
    found = find_spec("petals")
    folders = found.submodule_search_locations if found is not None else None
    models = [Path(folder) / "models" for folder in folders or ()]
    # An OPT block is measured as BLOOM's. Looked up as a file: an import takes seconds.
    if spec.family != "opt" and not any((folder / spec.family).is_dir() for folder in models):
        raise MissingDependencyError(
            f"petals {metadata.version('petals')}, which is installed, has no block of the family "
            f"{spec.family}; give --forward-rps and --inference-rps, or install a Petals that has"
        )


def _check_own_block(spec: DecoderSpec, setup: ComputeSetup) -> None:
    needs: str | None = None
    if spec.family not in _OWN_FAMILIES:
        needs = f"the blocks of the family {spec.family} are Petals' own"
    elif setup.quant_type != "none":
        needs = f"--quant-type {setup.quant_type} is done by Petals"
    elif len(setup.devices) > 1:
        needs = "tensor parallelism is done by Petals"
    if needs is None:
        return
    missing = [package for package in _PETALS_PACKAGES if not is_installed(package)]
    if not missing:
        raise ConfigError("--measure", f"{needs}, which has no block like that of {spec.name}")
    raise MissingDependencyError(f"not installed: {', '.join(missing)}; {needs}; {_HOW_TO_INSTALL}")


def needed_memory_bytes(spec: DecoderSpec, setup: ComputeSetup) -> tuple[int, int]:
    """Bytes of main memory that the block takes while it is built, and the 1024 tokens later.

    Blocks are built in float32 in main memory, and converted and moved afterwards.
    """
    weights = spec.block_parameters * DTYPE_BYTES["float32"]
    if len(setup.devices) > 1:
        weights += spec.block_parameters * DTYPE_BYTES[setup.torch_dtype]  # the shards
    if setup.device_type == "cuda":
        return weights, 0
    n = FORWARD.num_tokens
    attention = _ATTENTION_COPIES * spec.num_attention_heads * n * n
    hidden = _HIDDEN_COPIES * spec.hidden_size * n
    return weights, (attention + hidden) * DTYPE_BYTES["float32"]


def _check_memory(spec: DecoderSpec, setup: ComputeSetup) -> None:
    available = available_memory_bytes()
    weights, activations = needed_memory_bytes(spec, setup)
    if available is None or weights + activations <= available:
        return
    tokens = f", {FORWARD.num_tokens} tokens {format_bytes(activations)}" if activations else ""
    raise ConfigError(
        "--measure",
        f"one block of {spec.name} takes {format_bytes(weights)} while it is built in float32"
        f"{tokens}; this machine has {format_bytes(available)} of memory left; measure a smaller "
        "model, or give --forward-rps and --inference-rps",
    )


# --- the worker --------------------------------------------------------------------------------


def measure_compute(
    channel: WorkerChannel, spec: DecoderSpec, setup: ComputeSetup, with_petals: bool
) -> None:
    """Report Ready when all is imported, then a Rate for each of PASSES, or Refused.

    With `with_petals` the block and the method are Petals', else ours.
    """
    block = _PetalsBlock(spec, setup) if with_petals else _OwnBlock(spec, setup)
    channel.ready.set()
    refusal = _missing_device(setup)
    if refusal is not None:
        channel.queue.put(refusal)
        return
    for measured in PASSES:
        try:
            value = block.rps(measured)
        except Exception as error:  # bitsandbytes fails in many ways
            refusal = _refusal(error, spec, setup)
            if refusal is None:
                raise
            traceback.print_exc()
            channel.queue.put(refusal)
            return
        channel.queue.put(Rate(kind=measured.kind, value=value, block=block.name))


def _missing_device(setup: ComputeSetup) -> Refused | None:
    import torch

    if setup.device_type == "mps" and not torch.backends.mps.is_available():
        return Refused(option="--device", problem="torch cannot use MPS on this machine")
    num_gpus = torch.cuda.device_count() if setup.device_type == "cuda" else 0
    for device in setup.devices:
        if setup.device_type == "cuda" and (torch.device(device).index or 0) >= num_gpus:
            problem = f"{device}: torch finds {num_gpus} GPUs on this machine"
            return Refused(option="--device", problem=problem)
    return None


def _refusal(error: Exception, spec: DecoderSpec, setup: ComputeSetup) -> Refused | None:
    """What `error` says to a person, if it is about the machine and not a fault of ours."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return Refused(
            option="--measure",
            problem=f"the free memory of {', '.join(setup.devices)} does not hold one block of "
            f"{spec.name} and {FORWARD.num_tokens} tokens",
        )
    if setup.quant_type != "none":
        summary = traceback.format_exception_only(error)[-1].strip()
        return Refused(
            option="--quant-type",
            problem=f"{setup.quant_type} does not work on {setup.devices[0]} with bitsandbytes "
            f"{metadata.version('bitsandbytes')}: {summary}",
        )
    return None


def petals_config(spec: DecoderSpec) -> Any:
    """Petals' configuration of the model; an OPT model becomes the BLOOM of its dimensions."""
    from flexbench.petals_runtime.imports import distributed_config_class

    # The pinned transformers refuses newer kinds of rope_scaling, and all take the same time.
    values = {name: value for name, value in spec.values.items() if name != "rope_scaling"}
    family = spec.family
    if family == "opt":
        family, values = "bloom", {}
    # Configurations have these under several names.
    values |= {
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_hidden_layers,
    }
    if family == "bloom":
        values["n_embed"] = spec.hidden_size
    if family == "llama":
        values["pretraining_tp"] = 1  # as Petals does
    return distributed_config_class(family)(**values)


class _PetalsBlock:
    """The block of Petals, measured by Petals."""

    def __init__(self, spec: DecoderSpec, setup: ComputeSetup) -> None:
        self._config = petals_config(spec)
        self._setup = setup
        version = metadata.version("petals")
        self.name = f"{self._config.block_class.__name__} of petals {version}"

    def rps(self, measured: Pass) -> float:
        """Tokens/s through the block."""
        from flexbench.petals_runtime.imports import QuantType, measure_compute_rps, torch

        devices = tuple(torch.device(device) for device in self._setup.devices)
        rps: float = measure_compute_rps(
            self._config,
            devices[0],
            getattr(torch, self._setup.torch_dtype),
            quant_type=QuantType[self._setup.quant_type.upper()],
            tensor_parallel_devices=devices,
            n_tokens=measured.num_tokens,
            n_steps=measured.num_steps,
            inference=measured is INFERENCE,
        )
        return rps


class _OwnBlock:
    """Our own block, measured in the same way."""

    name = OWN_BLOCK

    def __init__(self, spec: DecoderSpec, setup: ComputeSetup) -> None:
        import torch

        self._spec = spec
        self._device = torch.device(setup.devices[0])
        self._dtype = getattr(torch, setup.torch_dtype)

    def rps(self, measured: Pass) -> float:
        """Tokens/s through the block."""
        import torch

        from flexbench.server_config.block import DecoderBlock

        with torch.inference_mode():
            block = DecoderBlock(self._spec).requires_grad_(False)
            block = block.to(self._dtype).to(self._device)
            shape = (1, measured.num_tokens, self._spec.hidden_size)
            hidden = torch.randn(shape, device=self._device, dtype=self._dtype)
            # The first step, which initializes a lot, does not count.
            _, cache = block(hidden, None)
            _synchronize(self._device)
            started_at = time.perf_counter()
            _run_steps(block, hidden, cache, measured)
            _synchronize(self._device)
            elapsed_s = time.perf_counter() - started_at
        return measured.num_steps * measured.num_tokens / elapsed_s


def _run_steps(block: DecoderBlock, hidden: torch.Tensor, cache: Cache, measured: Pass) -> None:
    """Inference goes on from step to step; forward passes begin anew."""
    for _ in range(measured.num_steps):
        _, cache = block(hidden, cache if measured is INFERENCE else None)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

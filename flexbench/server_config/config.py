"""What a person says about a server, checked: `ServerConfig`."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from flexbench.core.checks import check_count
from flexbench.core.environment import may_have_gpu, memory_bytes
from flexbench.core.errors import ConfigError
from flexbench.models.families import DTYPE_BYTES, DecoderSpec
from flexbench.server_config.budget import QUANT_TYPES, resolve_dtype
from flexbench.server_config.compute_setup import ComputeSetup
from flexbench.server_config.hardware import Detection, Gpu, GpuSet, common_cards, detect
from flexbench.server_config.speeds import Network

DEFAULT_MODEL = "bigscience/bloom"
DEFAULT_CUDA_CONTEXT_BYTES = 512 * 2**20
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
# The words of Petals' own errors, so that they can be looked up.
NO_GPU = (
    "GPU is not available. If you want to run a CPU-only server, please specify --num-blocks. "
    "CPU-only servers in the public swarm are discouraged since they are much slower"
)
NO_FLOAT16 = (
    "Type float16 is not supported on CPU. Please use --torch-dtype float32 or "
    "--torch-dtype bfloat16"
)
UNEVEN_GPUS = (
    "GPU devices have highly uneven memory, which makes tensor parallelism inefficient. Please "
    "launch individual servers on each GPU or set --num-blocks manually to override this"
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A server as its operator describes it. None stands for Petals' default."""

    model: DecoderSpec
    device: str = "auto"
    torch_dtype: str = "auto"
    quant_type: str | None = None
    gpu_memory: tuple[GpuSet, ...] = ()
    """One set of GPUs, several for a sweep, none to look at this machine."""
    tensor_parallel_devices: tuple[str, ...] = ()
    attn_cache_tokens: int | None = None
    num_blocks: int | None = None
    block_indices: str | None = None
    adapters: tuple[str, ...] = ()
    adapter_memory_bytes: int | None = None
    """Of all adapters, per block; None: read from the folders in `adapters`."""
    relay: bool = False
    network: Network | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None
    hops: int | None = None
    rtt_s: float | None = None
    num_servers: int | None = None
    cuda_context_bytes: int = DEFAULT_CUDA_CONTEXT_BYTES

    def __post_init__(self) -> None:
        """Raise ConfigError for values that Petals would refuse, or that cannot work."""
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                "--device", f"{self.device!r} is not known; accepted: auto, cpu, cuda, cuda:N, mps"
            )
        _check_choice("--torch-dtype", self.torch_dtype, ("auto", *DTYPE_BYTES))
        if self.quant_type is not None:
            _check_choice("--quant-type", self.quant_type, QUANT_TYPES)
        self._check_counts()
        self._check_blocks()
        self._check_devices()
        for option, value in (
            ("--forward-rps", self.forward_rps),
            ("--inference-rps", self.inference_rps),
        ):
            if value is not None and not 0 < value < 1e12:
                raise ConfigError(option, f"must be a number above 0, in tokens/s, not {value:g}")

    def _check_counts(self) -> None:
        for option, value in (
            ("--attn-cache-tokens", self.attn_cache_tokens),
            ("--num-blocks", self.num_blocks),
        ):
            if value is not None:
                check_count(option, value, minimum=1)
        if self.num_servers is not None:
            check_count("--num-servers", self.num_servers, minimum=1, maximum=1000)
        if self.hops is not None:
            # No request needs more servers than there are blocks.
            check_count("--hops", self.hops, minimum=1, maximum=self.model.num_hidden_layers)

    def _check_blocks(self) -> None:
        if self.block_indices is None:
            return
        if self.num_blocks is not None:
            raise ConfigError(
                "--block-indices", "Please specify --num-blocks or --block-indices, not both"
            )
        blocks = self.block_range
        layers = self.model.num_hidden_layers
        if blocks is None or not (0 <= blocks.start < blocks.stop <= layers):
            raise ConfigError(
                "--block-indices",
                f"must be start:end with 0 <= start < end <= {layers} (e.g. 0:{min(18, layers)}), "
                f"not {self.block_indices!r}",
            )

    @property
    def block_range(self) -> range | None:
        """The blocks of --block-indices; None if it is not given or cannot be read."""
        parts = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", self.block_indices or "")
        return range(int(parts[1]), int(parts[2])) if parts else None

    def _check_devices(self) -> None:
        for device in self.tensor_parallel_devices:
            if not re.fullmatch(r"cuda:\d+", device):
                raise ConfigError(
                    "--tensor-parallel-devices",
                    f"{device!r} is not known; accepted: cuda:0, cuda:1, ... (repeat the option)",
                )
        if len(set(self.tensor_parallel_devices)) < len(self.tensor_parallel_devices):
            raise ConfigError("--tensor-parallel-devices", "names a device twice")
        num_given = max((len(gpus.gpus) for gpus in self.gpu_memory), default=1)
        num_named = len(self.tensor_parallel_devices)
        if num_named and num_given > 1 and num_named != num_given:
            raise ConfigError(
                "--gpu-memory",
                f"is given for {num_given} GPUs, and --tensor-parallel-devices names {num_named}",
            )
        is_parallel = bool(num_named) or num_given > 1
        if is_parallel and self.device in ("cpu", "mps"):
            raise ConfigError(
                "--tensor-parallel-devices" if num_named else "--gpu-memory",
                f"Tensor parallelism is not supported on {self.device.upper()}",
            )
        if self.gpu_memory and self.device == "cpu":
            raise ConfigError("--gpu-memory", "a server on the CPU has no GPU memory")

    @property
    def chosen_num_blocks(self) -> int | None:
        """How many blocks the operator wants; None: as many as fit."""
        if self.block_range is not None:
            return len(self.block_range)
        if self.num_blocks is None:
            return None
        return min(self.num_blocks, self.model.num_hidden_layers)


def _check_choice(option: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ConfigError(option, f"{value!r} is not known; accepted: {', '.join(accepted)}")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs and the memory that a configuration is for, with everything resolved.

    `gpu_sets` has more than one element for a sweep, and none where nothing is known of the GPU or
    the server needs none.
    """

    setup: ComputeSetup
    gpu_sets: tuple[GpuSet, ...]
    detection: Detection


def resolve_machine(config: ServerConfig, *, is_this_machine: bool) -> Machine:
    """Find out on what a server would run.

    With `is_this_machine`, a server is going to be started here: without a GPU it runs on the CPU.
    Otherwise GPUs of common sizes stand for the one that is not here. Raises ConfigError with
    Petals' reason for what Petals would refuse.
    """
    detection = detect() if config.device.startswith(("auto", "cuda")) else Detection()
    present = detection.gpus
    device = config.device
    if device == "auto":
        has_gpu = bool(present or config.gpu_memory or config.tensor_parallel_devices)
        wants_gpu = has_gpu or may_have_gpu() or not is_this_machine
        device = "cuda" if wants_gpu else "cpu"
        if not has_gpu and _has_mps():
            device = "mps"
    if is_this_machine and device.startswith("cuda") and not (present or may_have_gpu()):
        raise ConfigError(
            "--device", f"this machine has no GPU{_reason(detection)}; accepted here: cpu"
        )
    setup = ComputeSetup(
        devices=_devices(config, device),
        torch_dtype=_dtype(config, device),
        quant_type=config.quant_type or ("nf4" if device.startswith("cuda") else "none"),
    )
    gpu_sets = _gpu_sets(config, setup, present, is_this_machine=is_this_machine)
    if config.chosen_num_blocks is None:
        if setup.device_type == "cpu":
            raise ConfigError("--num-blocks", NO_GPU)
        if not gpu_sets:
            raise ConfigError(
                "--gpu-memory",
                "the memory of the GPU cannot be read on this machine; please give it",
            )
        if any(gpus.is_uneven for gpus in gpu_sets):
            raise ConfigError("--gpu-memory", UNEVEN_GPUS)
    return Machine(setup=setup, gpu_sets=gpu_sets, detection=detection)


def _reason(detection: Detection) -> str:
    return f" ({detection.problem})" if detection.problem else ""


def _devices(config: ServerConfig, device: str) -> tuple[str, ...]:
    if config.tensor_parallel_devices:
        return config.tensor_parallel_devices
    num_gpus = max((len(gpus.gpus) for gpus in config.gpu_memory), default=1)
    if num_gpus > 1:
        return tuple(f"cuda:{number}" for number in range(num_gpus))
    return ("cuda:0",) if device == "cuda" else (device,)


def _dtype(config: ServerConfig, device: str) -> str:
    dtype = resolve_dtype(config.model, config.torch_dtype)
    if device == "cpu" and dtype == "float16":
        raise ConfigError("--torch-dtype", NO_FLOAT16)
    if device == "mps" and dtype == "bfloat16":
        return "float16"  # as Petals does, with a warning
    return dtype


def _gpu_sets(
    config: ServerConfig, setup: ComputeSetup, present: tuple[Gpu, ...], *, is_this_machine: bool
) -> tuple[GpuSet, ...]:
    if setup.device_type == "cpu":
        return ()
    if config.gpu_memory:
        return tuple(_for_all(gpus, len(setup.devices)) for gpus in config.gpu_memory)
    if setup.device_type == "mps":
        memory = memory_bytes() if _has_mps() else None
        # Petals counts with all of the machine's memory, which its GPU shares.
        gpu = Gpu(memory_bytes=memory, name="memory of this Mac") if memory else None
        return () if gpu is None else (GpuSet(gpus=(gpu,), source="detected"),)
    if present:
        numbers = [int(device.partition(":")[2]) for device in setup.devices]
        if max(numbers) >= len(present):
            raise ConfigError(
                "--tensor-parallel-devices" if config.tensor_parallel_devices else "--device",
                f"cuda:{max(numbers)} is not there; torch sees {len(present)} GPUs here",
            )
        chosen = tuple(present[number] for number in numbers)
        if config.chosen_num_blocks is not None and not all(gpu.is_known for gpu in chosen):
            return ()
        return (GpuSet(gpus=chosen, source="detected"),)
    if config.chosen_num_blocks is not None or is_this_machine:
        return ()
    return tuple(_for_all(gpus, len(setup.devices)) for gpus in common_cards())


def _has_mps() -> bool:
    """Whether this is a machine whose GPU torch uses by the name of MPS."""
    return (platform.system(), platform.machine()) == ("Darwin", "arm64")


def _for_all(gpus: GpuSet, num_devices: int) -> GpuSet:
    """One size given for several devices stands for all of them."""
    if len(gpus.gpus) == 1 and num_devices > 1:
        return GpuSet(gpus=gpus.gpus * num_devices, source=gpus.source)
    return gpus

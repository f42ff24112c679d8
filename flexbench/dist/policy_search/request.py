"""What is asked of a search: what is fixed, and within which memory it has to remain."""

from __future__ import annotations

from dataclasses import dataclass

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError

DEFAULT_MAX_BATCH = 256
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PolicyRequest:
    """What a search may choose. Raises ConfigError for limits that are none."""

    is_batch_fixed: bool = False
    """--gpu-batch-size is what the configuration says."""
    is_num_batches_fixed: bool = False
    is_percent_fixed: bool = False
    gpu_memory: float | None = None
    """GiB of a GPU to plan with; None: what is free."""
    cpu_memory: float | None = None
    """GiB of host memory, for all ranks on this host. Without CUDA 'gpu' and 'cpu' share it."""
    max_batch: int = DEFAULT_MAX_BATCH
    """Prompts of a run at most."""

    def __post_init__(self) -> None:
        """Check every value."""
        check_count("--max-batch", self.max_batch, minimum=1)
        for option, value in (
            ("--gpu-memory", self.gpu_memory),
            ("--cpu-memory", self.cpu_memory),
        ):
            if value is not None and not 0 < value < 2**20:
                raise ConfigError(option, f"must be a number of GiB above 0, not {value:g}")

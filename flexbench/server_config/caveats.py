"""Where an estimate is known to be off, or a server will not do what its operator expects."""

from __future__ import annotations

from collections.abc import Iterator

from flexbench.core.environment import memory_bytes
from flexbench.core.units import format_bytes
from flexbench.server_config.config import ServerConfig
from flexbench.server_config.estimate import Estimate, costs_of

# A card sold as 24 GB shows torch 1 to 3 percent less.
_NOMINAL_LOSS = 0.03
# From here on Petals itself calls the memory of several GPUs highly uneven.
_WASTED_SHARE = 0.05


def warnings_for(config: ServerConfig, estimate: Estimate) -> tuple[str, ...]:
    """Sentences for people, the most important first."""
    return tuple(
        text
        for check in (_fits, _free_memory, _nominal_memory, _family, _devices, _formats)
        for text in check(config, estimate)
    )


def _fits(config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    free, fitting = estimate.free_bytes, estimate.max_num_blocks
    if not estimate.num_blocks:
        yield "Not one block fits."
        return
    wanted = config.num_blocks
    if wanted is not None and wanted > estimate.num_blocks:
        yield f"The model has {estimate.num_blocks} blocks, so {wanted} are not possible."
    if fitting is not None and estimate.num_blocks > fitting:
        yield (
            f"{estimate.num_blocks} blocks are more than the {fitting} that Petals would choose: "
            f"{format_bytes(estimate.total_bytes)} are needed."
        )
    elif free is not None and free < 0:
        yield (
            "Petals does not count the CUDA context. With about "
            f"{format_bytes(estimate.cuda_context_bytes)} for it, {format_bytes(-free)} are "
            "missing when cache and backward passes need all that was reserved for them."
        )


def _free_memory(_config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    gpus = estimate.gpus
    if gpus is None or gpus.free_bytes is None or not estimate.num_blocks:
        return
    usable = gpus.free_bytes - estimate.cuda_context_bytes
    if estimate.total_bytes > usable:
        fitting = estimate.costs.blocks_in(usable, estimate.model.num_hidden_layers)
        yield (
            "Petals counts with the total memory (petals issue 308). Free are only "
            f"{format_bytes(gpus.free_bytes)}, enough for {fitting} blocks: --num-blocks {fitting}"
            if fitting
            else "Petals counts with the total memory (petals issue 308). Free are only "
            f"{format_bytes(gpus.free_bytes)}, too little for one block."
        )


def _nominal_memory(config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    gpus = estimate.gpus
    if gpus is None or gpus.source == "detected" or config.chosen_num_blocks is not None:
        return
    less = estimate.costs.blocks_in(
        round(gpus.memory_bytes * (1 - _NOMINAL_LOSS)), estimate.model.num_hidden_layers
    )
    if less < estimate.num_blocks:
        yield (
            "A real card shows up to 3 % less memory than its name says: then "
            f"{less or 'no'} {'block fits' if less == 1 else 'blocks fit'}."
        )


def _family(config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    model = estimate.model
    if model.family == "opt":
        yield (
            "Petals has no OPT blocks. The figures are those of the BLOOM block with these "
            "dimensions, which has as many parameters; run_server refuses this model itself."
        )
    if model.family == "mixtral":
        grouped = costs_of(config, estimate.setup, groups=model.num_key_value_groups)
        text = (
            "Petals reserves Mixtral's cache as if heads did not share keys and values: "
            f"{model.num_key_value_groups} times what a token takes."
        )
        if estimate.gpus is not None and config.chosen_num_blocks is None:
            fitting = grouped.blocks_in(estimate.gpus.memory_bytes, model.num_hidden_layers)
            if fitting > estimate.num_blocks:
                text += f" {fitting} blocks would fit instead of {estimate.num_blocks}."
        yield text
        yield "Mixtral needs Petals 2.3 (its source; 2.2 on the package index has none)."
    scaling = model.values.get("rope_scaling")
    if model.family == "llama" and isinstance(scaling, dict) and set(scaling) != {"type", "factor"}:
        yield "The rope_scaling of this model (Llama 3.1 and newer) needs Petals 2.3."


def _devices(config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    gpus, setup = estimate.gpus, estimate.setup
    if len(setup.devices) > 1 and estimate.model.family != "bloom":
        yield "Petals has tested tensor parallelism with BLOOM only."
    if gpus is not None and gpus.wasted_share > _WASTED_SHARE:
        yield (
            f"{gpus.wasted_share:.0%} of the GPUs' memory stay unused: the smallest one sets the "
            "measure for all."
        )
    if setup.device_type == "mps" and config.torch_dtype != "float16":
        yield "bfloat16 is not supported on MPS, so Petals uses float16 instead."
    if setup.device_type == "cpu":
        memory = memory_bytes()
        if memory is not None and estimate.total_bytes > memory:
            yield (
                f"This machine has {format_bytes(memory)} of memory, and "
                f"{format_bytes(estimate.total_bytes)} are needed."
            )
        yield "CPU servers in the public swarm are discouraged: they slow all others down."


def _formats(_config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    setup = estimate.setup
    if setup.quant_type != "none" and setup.device_type != "cuda":
        yield f"{setup.quant_type} is made for CUDA; bitsandbytes may refuse it elsewhere."

"""Where an estimate is known to be off, or a server will not do what its operator expects."""

from __future__ import annotations

from collections.abc import Iterator

from flexbench.core.environment import memory_bytes
from flexbench.core.folders import local_path
from flexbench.core.units import format_bytes
from flexbench.server_config.config import Machine, ServerConfig
from flexbench.server_config.estimate import Estimate, costs_of

# A card sold as 24 GB shows torch 1 to 3 percent less.
_NOMINAL_LOSS = 0.03
# From here on Petals itself calls the memory of several GPUs highly uneven.
_WASTED_SHARE = 0.05


def warnings_for(config: ServerConfig, machine: Machine, estimate: Estimate) -> tuple[str, ...]:
    """Sentences for people, the most important first."""
    return (*_detection(machine, estimate), *_of_estimate(config, estimate))


def _detection(machine: Machine, estimate: Estimate) -> Iterator[str]:
    detection, gpus = machine.detection, estimate.gpus
    if gpus is not None and gpus.source == "common card size" and detection.problem:
        yield f"The GPUs of this machine are not known: {detection.problem}."
    if gpus is not None and gpus.source == "detected" and detection.is_order_uncertain:
        yield (
            "The GPUs of this machine differ, and torch may number them in another order than "
            "the driver; CUDA_DEVICE_ORDER=PCI_BUS_ID makes both the same."
        )


def _of_estimate(config: ServerConfig, estimate: Estimate) -> tuple[str, ...]:
    return tuple(
        text
        for check in (
            *(_fits, _free_memory, _nominal_memory, _swarm),
            *(_model, _adapters, _family, _devices, _formats),
        )
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
    elif free is not None and free < 0 and not _is_short_of_free(estimate):
        yield (
            "Petals does not count the CUDA context. With about "
            f"{format_bytes(estimate.cuda_context_bytes)} for it, {format_bytes(-free)} are "
            "missing when cache and backward passes need all that was reserved for them."
        )


def _free_memory(_config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    gpus = estimate.gpus
    if gpus is None or gpus.free_bytes is None or not _is_short_of_free(estimate):
        return
    usable = gpus.free_bytes - estimate.cuda_context_bytes
    fitting = estimate.costs.blocks_in(usable, estimate.model.num_hidden_layers)
    enough = f"enough for {_blocks(fitting)}: use --num-blocks {fitting}"
    yield (
        "Petals counts with the total memory (petals issue 308). Free are only "
        f"{format_bytes(gpus.free_bytes)}, {enough if fitting else 'too little for one block'}."
    )


def _is_short_of_free(estimate: Estimate) -> bool:
    """Whether other programs have so much of the GPU's memory that this server does not fit."""
    gpus = estimate.gpus
    if gpus is None or gpus.free_bytes is None or not estimate.num_blocks:
        return False
    return estimate.total_bytes > gpus.free_bytes - estimate.cuda_context_bytes


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count or 'no'} blocks"


def _nominal_memory(config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    gpus = estimate.gpus
    if gpus is None or estimate.setup.device_type != "cuda":
        return
    if config.chosen_num_blocks is not None:
        return
    less = estimate.costs.blocks_in(
        round(gpus.memory_bytes * (1 - _NOMINAL_LOSS)), estimate.model.num_hidden_layers
    )
    if less < estimate.num_blocks:
        reason = "A real card shows up to 3 % less memory than its name says"
        if gpus.source == "detected":
            reason = "torch sees up to 3 % less memory than nvidia-smi shows"
        yield f"{reason}; Petals then chooses {_blocks(less)}."


def _swarm(_config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    client, swarm = estimate.client, estimate.swarm
    if client is not None and client.hops < client.fewest_hops:
        yield (
            f"{client.hops} hops are not possible: {client.fewest_hops} servers of this size hold "
            "the model."
        )
    if swarm is not None and swarm.num_servers < swarm.fewest_servers:
        yield (
            f"{swarm.num_servers} such servers leave blocks that nobody serves: no request gets "
            "through."
        )


def _adapters(config: ServerConfig, _estimate: Estimate) -> Iterator[str]:
    if any(local_path(name) is not None for name in config.adapters):
        yield (
            "Petals loads adapters from a model hub only: in the command, give their names there "
            "in place of folders."
        )


def _model(config: ServerConfig, _estimate: Estimate) -> Iterator[str]:
    path = local_path(config.model.name)
    if path is not None and path.is_file():
        yield "run_server needs a folder with a config.json and weights, not one file."


def _family(config: ServerConfig, estimate: Estimate) -> Iterator[str]:
    model = estimate.model
    is_like_bloom = model.block_parameters == 12 * model.hidden_size**2 + 13 * model.hidden_size
    if model.family == "opt" and not is_like_bloom:
        yield "Petals has no OPT blocks, and no block like this one; run_server refuses it."
    elif model.family == "opt":
        yield (
            "Petals has no OPT blocks. The figures are those of the BLOOM block with these "
            "dimensions, which has as many parameters; run_server refuses this model itself."
        )
    if model.family == "mixtral":
        grouped = costs_of(config, estimate.setup, groups=model.num_key_value_groups)
        yield (
            "Petals reserves Mixtral's cache as if heads did not share keys and values: "
            f"{model.num_key_value_groups} times what a token takes."
        )
        if estimate.gpus is not None and config.chosen_num_blocks is None:
            fitting = grouped.blocks_in(estimate.gpus.memory_bytes, model.num_hidden_layers)
            if fitting > estimate.num_blocks:
                yield f"Without that, {_blocks(fitting)} would fit."
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

"""The lines of an estimate, in the words in which people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbench.core.units import format_bit_rate, format_bytes, format_seconds
from flexbench.server_config.budget import GIB, QUANT_TYPES, server_defaults
from flexbench.server_config.estimate import Estimate
from flexbench.server_config.hardware import describe_gpus


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table. Its first column is text, the others are figures unless it `is_list`."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str | None = None
    lines: tuple[str, ...] = ()
    """What is there to be copied, and so never broken; below the note."""
    is_list: bool = False


def sections_of(estimate: Estimate) -> list[Section]:
    """One estimate in full."""
    return [_server(estimate), _memory(estimate), _speed(estimate), _simpler(estimate)]


def title_of(estimate: Estimate) -> str:
    """'bigscience/bloom: 15 of 70 blocks'."""
    model = estimate.model
    return f"{model.name}: {estimate.num_blocks} of {model.num_hidden_layers} blocks"


def _server(estimate: Estimate) -> Section:
    model, setup, gpus = estimate.model, estimate.setup, estimate.gpus
    kv = ""
    if model.num_key_value_groups > 1:
        kv = f", {model.num_key_value_heads} for keys and values"
    device = ", ".join(setup.devices)
    if gpus is not None:
        device += f": {describe_gpus(gpus)} ({gpus.source})"
        if gpus.free_bytes is not None:
            device += f", {format_bytes(gpus.free_bytes)} free"
    blocks = f"{estimate.num_blocks} of {model.num_hidden_layers}"
    if estimate.block_range is not None:
        blocks += f" ({estimate.block_range.start}:{estimate.block_range.stop})"
    heads = f"{model.num_attention_heads} heads{kv}"
    rows = [
        ("Blocks", blocks),
        ("Model", f"{model.family}, hidden size {model.hidden_size}, {heads}"),
        ("Device", device),
        ("Format", f"{setup.torch_dtype}, quantization {setup.quant_type}"),
    ]
    if estimate.blocks_by_quant_type:
        fitting = estimate.blocks_by_quant_type.items()
        rows.append(("Blocks that fit", ", ".join(f"{name}: {count}" for name, count in fitting)))
    rows.append(
        (
            "To download",
            f"about {format_bytes(estimate.download_bytes)} of weights for these blocks",
        )
    )
    return Section(title=title_of(estimate), headers=("Server", ""), rows=tuple(rows), is_list=True)


def _memory(estimate: Estimate) -> Section:
    costs, count = estimate.costs, str(estimate.num_blocks)
    rows = [
        ("Weights", format_bytes(costs.block_bytes), count, format_bytes(estimate.weights_bytes)),
        (
            f"Attention cache, {estimate.attn_cache_tokens} tokens",
            format_bytes(costs.cache_bytes_per_block),
            count,
            format_bytes(estimate.cache_bytes),
        ),
        (
            "Adapters",
            format_bytes(costs.adapter_bytes_per_block),
            count,
            format_bytes(estimate.adapter_bytes),
        ),
        ("Reserve for backward passes", "", "", format_bytes(costs.memory_for(0))),
        ("All that Petals counts", "", "", format_bytes(estimate.total_bytes)),
    ]
    if estimate.setup.device_type == "cuda":
        context = format_bytes(estimate.cuda_context_bytes)
        rows.append(("CUDA context, assumed", "", "", context))
    if estimate.gpus is not None and estimate.free_bytes is not None:
        now = " of what is free now" if estimate.gpus.free_bytes is not None else ""
        name = "Stays free" if estimate.free_bytes >= 0 else "Is missing"
        rows.append((f"{name}{now}", "", "", format_bytes(abs(estimate.free_bytes))))
        rows.append(("GPU memory", "", "", format_bytes(estimate.gpus.memory_bytes)))
    elif estimate.smallest_card_bytes is not None:
        rows.append(("Smallest common card", "", "", format_bytes(estimate.smallest_card_bytes)))
    longest = server_defaults(estimate.model).inference_max_length
    return Section(
        title="Memory",
        headers=("Memory", "per block", "blocks", "total"),
        rows=tuple(rows),
        note=(
            f"Will announce room for {estimate.announced_cache_tokens} cache tokens (keys and "
            "values of every block count apart): "
            f"{estimate.attn_cache_tokens / longest:.3g} sessions of {longest} tokens through all "
            "blocks."
        ),
    )


def _speed(estimate: Estimate) -> Section:
    compute, network = estimate.compute, estimate.network
    throughput, client, swarm = estimate.throughput, estimate.client, estimate.swarm
    # Without a block there is no server, and no speed to tell of.
    assert throughput is not None
    assert client is not None
    assert swarm is not None
    bandwidth = (
        f"{format_bit_rate(network.download_bits_per_s)} down, "
        f"{format_bit_rate(network.upload_bits_per_s)} up"
    )
    at_most = "at most " if throughput.is_upper_bound else ""
    limit = f"limited by {throughput.limited_by}"
    if throughput.is_upper_bound:
        limit = "by its network alone"
    rtt = "unknown" if client.rtt_s is None else format_seconds(client.rtt_s)
    rows = (
        ("Forward, 1024 tokens, one block", _rate(compute.forward_rps)),
        ("Inference, one token, one block", _rate(compute.inference_rps)),
        (f"Network: {bandwidth}{' (relay: a fifth counts)' if estimate.relay else ''}",
         _rate(estimate.network_rps)),
        (
            f"Announced, {limit}",
            at_most + _rate(throughput.tokens_per_s),
        ),
        (
            f"Swarm of {swarm.num_servers} such {_plural('server', swarm.num_servers)} "
            f"({swarm.fewest_servers} hold the model)",
            at_most + _rate(swarm.tokens_per_s),
        ),
        (
            f"One client, {client.hops} {_plural('hop', client.hops)}, round trip {rtt}",
            f"{client.steps_per_s:.3g} steps/s",
        ),
    )  # fmt: skip
    return Section(title="Speed", headers=("Speed", ""), rows=rows, note=_speed_note(estimate))


def _speed_note(estimate: Estimate) -> str:
    sources = [f"Network: {estimate.network.source}."]
    if estimate.compute.source:
        sources.append(f"Computing: {estimate.compute.source}.")
    if estimate.client is not None and estimate.client.is_assumed_rps:
        sources.append("The client's speed assumes 300 tokens/s a block, as Petals' clients do.")
    if estimate.client is not None and estimate.client.rtt_s is None:
        sources.append("An unknown round trip counts as 0.15 s one way (--rtt).")
    if estimate.compute.forward_rps is None and estimate.sufficient_forward_rps is not None:
        sources.append(
            "Computing was not measured (--measure, --forward-rps): from "
            f"{_rate(estimate.sufficient_forward_rps)} a block on, the network is the limit."
        )
    return "\n".join(sources)


def _simpler(estimate: Estimate) -> Section:
    seed = estimate.seed
    blocks = "not known" if seed.num_blocks is None else str(seed.num_blocks)
    at_most = "at most " if estimate.compute.forward_rps is None else ""
    return Section(
        title="The simpler formula",
        headers=("The simpler formula in descriptions of Petals", ""),
        rows=(
            ("Blocks: (0.9 x memory - cache of all layers) / block", blocks),
            ("Throughput: min(computing, network)", at_most + _rate(seed.tokens_per_s)),
        ),
    )


def sweep_section(estimates: Sequence[Estimate]) -> Section:
    """Several sizes of GPU, one line each."""
    first = estimates[0]
    layers = first.model.num_hidden_layers
    asked_for = _asked_for(estimates)
    question = f"how many of {layers} blocks fit"
    if asked_for is not None:
        question = f"{asked_for} of {layers} blocks"
    return Section(
        title=f"{first.model.name}, {', '.join(first.setup.formats)}: {question}",
        headers=(
            "GPU",
            *(f"fit as\n{quant_type}" for quant_type in reversed(QUANT_TYPES)),
            "free\nGiB",
            "servers\nneeded",
            "\ntokens/s",
            "client\nsteps/s",
            "simpler\nformula",
        ),
        rows=tuple(_sweep_row(estimate) for estimate in estimates),
        note=_sweep_note(estimates),
    )


def _asked_for(estimates: Sequence[Estimate]) -> int | None:
    """The number of blocks that all are for; None if each has what fits."""
    if all(one.num_blocks == one.max_num_blocks for one in estimates):
        return None
    return max(one.num_blocks for one in estimates)


def _sweep_row(estimate: Estimate) -> tuple[str, ...]:
    gpus = estimate.gpus
    fitting = [str(estimate.blocks_by_quant_type.get(name, "")) for name in reversed(QUANT_TYPES)]
    free = estimate.free_bytes
    row = ("" if gpus is None else describe_gpus(gpus), *fitting)
    swarm, throughput, client = estimate.swarm, estimate.throughput, estimate.client
    if swarm is None or throughput is None or client is None:
        return (*row, "-", "-", "-", "-", str(estimate.seed.num_blocks))
    return (
        *row,
        # No "-0.0".
        "-" if free is None else f"{round(free / GIB, 1) + 0.0:.1f}",
        str(swarm.fewest_servers),
        _number(throughput.tokens_per_s),
        f"{client.steps_per_s:.3g}",
        str(estimate.seed.num_blocks),
    )


def _sweep_note(estimates: Sequence[Estimate]) -> str:
    first = estimates[0]
    network, asked_for = first.network, _asked_for(estimates)
    notes = []
    if first.gpus is not None and first.gpus.source == "common card size":
        notes.append("No GPU here and no --gpu-memory: these are the sizes of common cards.")
    notes.append(
        "Blocks that fit as nf4, int8 or not quantized; all else is for "
        f"{'these' if asked_for is None else asked_for} blocks as {first.setup.quant_type}. Cache: "
        f"{first.attn_cache_tokens} tokens."
    )
    if any(one.free_bytes is not None and one.free_bytes < 0 for one in estimates):
        notes.append(
            "A 'free' below 0 is missing for the CUDA context, which Petals does not count."
        )
    if first.gpus is not None and first.gpus.source != "detected":
        notes.append("Real cards show up to 3 % less memory than their names say.")
    notes.append(
        f"Network: {format_bit_rate(network.download_bits_per_s)} down, "
        f"{format_bit_rate(network.upload_bits_per_s)} up, {network.source}."
    )
    if first.compute.forward_rps is None:
        notes.append("tokens/s are at most these: computing was not measured.")
    if first.compute.inference_rps is None:
        notes.append("steps/s assume 300 tokens/s a block, as Petals' clients do.")
    return "\n".join(notes)


def _rate(tokens_per_s: float | None) -> str:
    return "not known" if tokens_per_s is None else f"{_number(tokens_per_s)} tokens/s"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

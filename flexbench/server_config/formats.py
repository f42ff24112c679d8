"""Estimates as plain data, and as text for other programs: JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flexbench.server_config.estimate import Estimate
from flexbench.server_config.sections import Section, sections_of, sweep_section


class Format(StrEnum):
    """What an estimate can be printed as."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An estimate with what is said about it: warnings, and the command that starts the server."""

    estimate: Estimate
    warnings: tuple[str, ...]
    command: str | None


PUBLIC_SWARM_NOTE = (
    "As it stands, it joins Petals' public swarm; --initial-peers or --new-swarm change that."
)


def joins_public_swarm(command: str) -> bool:
    """Whether a run_server command names no swarm, which means the public one to Petals."""
    return "--initial_peers" not in command and "--new_swarm" not in command


def common_warnings(answers: Sequence[Answer]) -> list[str]:
    """What is to be said of all of them."""
    others = answers[1:]
    return [text for text in answers[0].warnings if all(text in one.warnings for one in others)]


def to_record(answer: Answer) -> dict[str, Any]:
    """One estimate as plain data. Sizes in bytes, rates in tokens/s; null: not known."""
    estimate = answer.estimate
    return {
        **_server(estimate),
        **_memory(estimate),
        **_speed(estimate),
        "simpler_formula": {
            "num_blocks": estimate.seed.num_blocks,
            "throughput": estimate.seed.tokens_per_s,
        },
        "warnings": list(answer.warnings),
        "command": answer.command,
    }


def _server(estimate: Estimate) -> dict[str, Any]:
    model, setup, gpus = estimate.model, estimate.setup, estimate.gpus
    blocks = estimate.block_range
    return {
        "model": model.name,
        "family": model.family,
        "num_hidden_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "block_parameters": model.block_parameters,
        "device": setup.devices[0],
        "devices": list(setup.devices),
        "torch_dtype": setup.torch_dtype,
        "quant_type": setup.quant_type,
        "gpu_memory_bytes": None if gpus is None else gpus.memory_bytes,
        "gpu_memory_free_bytes": None if gpus is None else gpus.free_bytes,
        "gpu_memory_source": None if gpus is None else gpus.source,
        "gpus": [
            {"memory_bytes": gpu.memory_bytes, "free_bytes": gpu.free_bytes, "name": gpu.name}
            for gpu in (gpus.gpus if gpus else ())
        ],
        "num_blocks": estimate.num_blocks,
        "max_num_blocks": estimate.max_num_blocks,
        "num_blocks_by_quant_type": dict(estimate.blocks_by_quant_type),
        "block_indices": f"{blocks.start}:{blocks.stop}" if blocks else None,
    }


def _memory(estimate: Estimate) -> dict[str, Any]:
    costs = estimate.costs
    return {
        "block_bytes": costs.block_bytes,
        "cache_bytes_per_block": costs.cache_bytes_per_block,
        "adapter_bytes_per_block": costs.adapter_bytes_per_block,
        "autograd_bytes": costs.memory_for(0),
        "weights_bytes": estimate.weights_bytes,
        "cache_bytes": estimate.cache_bytes,
        "adapter_bytes": estimate.adapter_bytes,
        "total_bytes": estimate.total_bytes,
        "cuda_context_bytes": estimate.cuda_context_bytes,
        "free_bytes": estimate.free_bytes,
        "smallest_card_bytes": estimate.smallest_card_bytes,
        "download_bytes": estimate.download_bytes,
        "attn_cache_tokens": estimate.attn_cache_tokens,
        "announced_cache_tokens": estimate.announced_cache_tokens,
    }


def _speed(estimate: Estimate) -> dict[str, Any]:
    throughput, client, swarm = estimate.throughput, estimate.client, estimate.swarm
    network = estimate.network
    return {
        "forward_rps": estimate.compute.forward_rps,
        "inference_rps": estimate.compute.inference_rps,
        "compute_source": estimate.compute.source,
        "network_rps": estimate.network_rps,
        "network": {
            "download_bits_per_s": network.download_bits_per_s,
            "upload_bits_per_s": network.upload_bits_per_s,
            "source": network.source,
            "relay": estimate.relay,
        },
        "throughput": throughput and throughput.tokens_per_s,
        "throughput_is_upper_bound": throughput and throughput.is_upper_bound,
        "limited_by": throughput and throughput.limited_by,
        "sufficient_forward_rps": estimate.sufficient_forward_rps,
        "client": client
        and {
            "hops": client.hops,
            "rtt_s": client.rtt_s,
            "inference_rps": client.inference_rps,
            "inference_rps_is_assumed": client.is_assumed_rps,
            "steps_per_s": client.steps_per_s,
        },
        "whole_model": swarm
        and {
            "fewest_servers": swarm.fewest_servers,
            "num_servers": swarm.num_servers,
            "throughput": swarm.tokens_per_s,
        },
    }


def to_json(answers: Sequence[Answer]) -> str:
    """An object for one estimate, a list of objects for a sweep."""
    records = [to_record(answer) for answer in answers]
    return json.dumps(records[0] if len(records) == 1 else records, indent=2, allow_nan=False)


def to_markdown(answers: Sequence[Answer]) -> str:
    """Headings and GitHub tables."""
    if len(answers) > 1:
        sections = [sweep_section([answer.estimate for answer in answers])]
    else:
        sections = sections_of(answers[0].estimate)
    parts = [markdown_of_sections(sections)]
    warnings = common_warnings(answers)
    if warnings:
        parts.append("\n".join(f"- {warning}" for warning in warnings))
    command = answers[0].command
    if len(answers) == 1 and command:
        parts.append(f"```console\n$ {command}\n```")
        if joins_public_swarm(command):
            parts.append(PUBLIC_SWARM_NOTE)
    return "\n\n".join(parts)


def markdown_of_sections(sections: Sequence[Section]) -> str:
    """Headings and GitHub tables, a blank line between them."""
    return "\n\n".join(_markdown_table(section) for section in sections)


def _markdown_table(section: Section) -> str:
    lines = [
        f"## {_escape(section.title)}",
        "",
        "| " + " | ".join(_escape(header) for header in section.headers) + " |",
        "| :--- |" + (" :--- |" if section.is_list else " ---: |") * (len(section.headers) - 1),
        *("| " + " | ".join(map(_escape, row)) + " |" for row in section.rows),
    ]
    if section.note:
        lines += ["", section.note]
    lines += [f"- `{line}`" for line in section.lines]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

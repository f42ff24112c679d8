"""Plans and results of the swarm benchmark as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from flexbench.core.metrics import MEAN_LATENCY, THROUGHPUT
from flexbench.core.results import ResultRow
from flexbench.core.units import format_bytes
from flexbench.petals.plan import Plan


def results_table(plan: Plan, rows: Sequence[ResultRow]) -> Table:
    """The runs that were measured, one line each."""
    config = plan.config
    swarm = f"{config.num_servers} servers" if config.is_embedded else "running swarm"
    table = Table(
        title=f"{config.shape.name} on Petals: {swarm}, {config.num_processes} clients",
        box=box.SIMPLE_HEAD,
    )
    figures = (f"{metric.label}\n{metric.unit}" for metric in (THROUGHPUT, MEAN_LATENCY))
    for header in ("batch", "rounds", "prompt\ntokens", "new\ntokens", *figures):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch_size),
            str(row.num_micro_batches),
            str(row.sequence_length),
            str(row.max_tokens),
            f"{row.throughput:.2f}",
            f"{row.mean_latency:.3f}",
        )
    return table


def plan_facts(plan: Plan) -> Table:
    """Model, swarm and clients of a plan."""
    config, shape = plan.config, plan.config.shape
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column()
    facts.add_column(overflow="fold")  # a path is of no use with its end cut off
    facts.add_row(
        "Model",
        f"{shape.name}: hidden size {shape.hidden_size}, {shape.num_attention_heads} heads, "
        f"{shape.num_hidden_layers} blocks, vocabulary {shape.vocab_size}",
    )
    facts.add_row("DHT prefix", Text(config.effective_dht_prefix))
    if config.is_embedded:
        facts.add_row("Swarm", f"private, {config.num_servers} servers on loopback")
        for index, server in enumerate(plan.servers):
            facts.add_row(
                f"  server {index}",
                f"blocks {server.blocks.start}:{server.blocks.stop}, "
                f"{format_bytes(plan.block_bytes * len(server.blocks))} of weights, attention "
                f"cache up to {format_bytes(plan.cache_bytes(server))}",
            )
    else:
        facts.add_row("Swarm", Text(", ".join(config.initial_peers)))
    facts.add_row(
        "Clients",
        f"{config.num_processes} (each with {format_bytes(plan.client_bytes)} of weights), "
        f"requests per client: {config.num_micro_batches}, "
        f"prompts per request: {config.batch_size}",
    )
    facts.add_row("Type, device", f"{config.dtype}, {config.device}")
    facts.add_row("Results", Text(str(config.output)))
    return facts


def plan_runs(plan: Plan) -> Table:
    """The runs of a plan, with the tokens that each will generate."""
    runs = Table(title="Runs", box=box.SIMPLE_HEAD)
    for header in ("run", "prompt tokens", "new tokens", "expected tokens"):
        runs.add_column(header, justify="right")
    for number, run in enumerate(plan.runs, start=1):
        runs.add_row(
            str(number),
            str(run.sequence_length),
            str(run.max_tokens),
            str(plan.expected_tokens_of(run)),
        )
    runs.add_section()
    runs.add_row("all", "", "", str(plan.expected_tokens))
    return runs

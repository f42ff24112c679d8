"""A search, and what became of it, for a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from flexbench.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from flexbench.dist.measurement import Measurement
    from flexbench.dist.plan import DistPlan
    from flexbench.dist.policy_search.search import PolicySearch


def search_facts(plan: DistPlan, search: PolicySearch) -> Table:
    """The chosen policy, within what, and what is expected of it."""
    config, prediction = plan.config, search.prediction
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column()
    facts.add_column(overflow="fold")
    percent = " ".join(f"{share:g}" for share in config.percent)
    options = (
        f"--gpu-batch-size {config.gpu_batch_size} --num-gpu-batches {config.num_gpu_batches} "
        f"--percent {percent}"
    )
    facts.add_row("Policy", Text(options))
    facts.add_row(
        "Within", f"{search.limits.describe()}; at most {search.request.max_batch} prompts"
    )
    facts.add_row(
        "Expected",
        f"{prediction.throughput:.4g} tokens/s: prefill {format_seconds(prediction.prefill_s)}, "
        f"decoding {format_seconds(prediction.decode_s)}",
    )
    facts.add_row(
        "Bound by",
        f"{prediction.prefill_bound} in the prefill, {prediction.decode_bound} in decoding",
    )
    rates = [
        f"{home} {format_bytes(times.weight_load)}/s"
        for home, times in search.constants.homes.items()
    ]
    threads = search.constants.num_threads
    measured = f"{search.constants.num_layers} layers, {threads} threads"
    if rates:
        measured += f"; weights from {', '.join(rates)}"
    facts.add_row("Measured", Text(measured))
    return facts


def comparison_table(search: PolicySearch, measurement: Measurement) -> Table:
    """What was expected, and what was measured."""
    figures, prediction = measurement.figures(), search.prediction
    table = Table(title="Expected and measured", box=box.SIMPLE_HEAD)
    for heading in ("", "expected", "measured", "measured / expected"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, expected, measured in (
        ("prefill s", prediction.prefill_s, figures["prefill_latency"]),
        ("decode s", prediction.decode_s, figures["decode_latency"]),
        ("total s", prediction.total_s, figures["total_latency"]),
        ("tokens/s", prediction.throughput, figures["total_throughput"]),
    ):
        ratio = f"{measured / expected:.2f}" if expected else "-"
        table.add_row(name, f"{expected:.3f}", f"{measured:.3f}", ratio)
    return table

"""Placement and results of `flexbench dist` as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from flexbench.core.environment import is_memory
from flexbench.core.units import format_bytes
from flexbench.dist.measurement import Measurement, StageReport
from flexbench.dist.placement import HomeBytes
from flexbench.dist.plan import DistPlan


def placement_table(plan: DistPlan) -> Table:
    """What each stage will hold, where: bytes, and the share that was asked and that it became."""
    title = f"Placement of {plan.model.name}, {plan.model.dtype}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in ("stage", "what", "gpu", "cpu", "disk", "asked %", "placed %"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    policy = plan.policy
    for stage in plan.stages:
        kinds = (
            ("weights", stage.weights, policy.weights),
            ("cache", stage.cache, policy.cache),
            ("activations", stage.activations, policy.activations),
        )
        for index, (name, sizes, asked) in enumerate(kinds):
            table.add_row(
                str(stage.stage.rank) if index == 0 else "",
                name,
                *_sizes(sizes),
                _shares((asked.gpu, asked.cpu, asked.disk)),
                _shares(sizes.percent),
            )
        table.add_row("", "computing", *_sizes(stage.computing), "", "estimate")
        table.add_section()
    return table


def _sizes(sizes: HomeBytes) -> Sequence[str]:
    return [format_bytes(size) if size else "-" for size in (sizes.gpu, sizes.cpu, sizes.disk)]


def _shares(shares: tuple[float, float, float]) -> str:
    return " ".join(f"{share:.3g}" for share in shares)


def plan_facts(plan: DistPlan) -> Table:
    """Model, load and pipeline of a plan."""
    config, model = plan.config, plan.model
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column()
    facts.add_column(overflow="fold")
    weights = f"random, seed {config.seed}" if plan.is_dummy else plan.weights_path
    facts.add_row(
        "Model",
        Text(
            f"{model.name}: {model.num_hidden_layers} layers, hidden size {model.hidden_size}, "
            f"{model.num_attention_heads} heads"
        ),
    )
    facts.add_row("Weights", Text(weights))
    tokens = f"{config.prompt_len} + {config.gen_len} tokens"
    if plan.config.is_projected:
        tokens += f", of which {config.num_tokens} are generated and the rest is projected"
    facts.add_row(
        "Load",
        f"{plan.num_prompts} prompts (batch {config.gpu_batch_size} x {config.num_gpu_batches} x "
        f"{plan.num_inner_iterations}), {tokens}",
    )
    stages = "1 stage" if plan.num_stages == 1 else f"{plan.num_stages} stages"
    facts.add_row("Pipeline", f"{stages}, {_communication(plan)}")
    gpu = "a CUDA GPU" if plan.has_gpu else "the CPU: there is no CUDA here"
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.sizes.items())
    facts.add_row("Sizes", f"{sizes}, all prompts, uncompressed")
    facts.add_row("'gpu' is", gpu)
    if any(stage.total.disk for stage in plan.stages):
        note = " (which is in memory: no disk is measured)" if is_memory(config.offload_dir) else ""
        facts.add_row("'disk' is", Text(f"{config.offload_dir}{note}"))
    if config.pin_weight and not plan.has_gpu:
        facts.add_row("", "memory is not page-locked, which only CUDA has use for")
    return facts


def _communication(plan: DistPlan) -> str:
    if plan.num_stages == 1:
        return "no communication"
    how = "asynchronous" if plan.config.async_comm else "synchronous"
    if plan.backend != "gloo":
        return f"{how}, from the GPU over NCCL"
    if plan.config.comm_device == "gpu" and not plan.has_gpu:
        return f"{how}, from the CPU over gloo, as there is no CUDA"
    return f"{how}, from the CPU over gloo"


def results_table(plan: DistPlan, measurement: Measurement) -> Table:
    """The figures of the run."""
    figures = measurement.figures()
    stages = "stage" if plan.num_stages == 1 else "stages"
    mark = " (projected)" if figures["projected"] else ""
    title = (
        f"{plan.model.name}, {plan.num_stages} {stages}, {plan.config.prompt_len} + "
        f"{plan.config.gen_len} tokens{mark}"
    )
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, min_width=min(len(title), 80))
    for heading in ("", "latency s", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("prefill", "decode", "total"):
        throughput = figures[f"{name}_throughput"]
        table.add_row(
            name,
            f"{figures[f'{name}_latency']:.3f}",
            "-" if throughput is None else f"{throughput:.2f}",
        )
    return table


def stages_table(measurement: Measurement) -> Table:
    """What each stage spent its time with."""
    table = Table(title="Seconds of each stage", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    headings = (
        "\nstage",
        "\nlayers",
        "com-\npute",
        "\nstall",
        "weight\nload",
        "cache\nload",
        "cache\nstore",
        "\nacts",
        "\nsend",
        "re-\nceive",
        "idle\n%",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for stage in measurement.stages:
        times = (
            stage.compute_s,
            stage.stalled_s,
            stage.weight_load_s,
            stage.cache_load_s,
            stage.cache_store_s,
            stage.hidden_s,
            stage.send_s,
            stage.receive_s,
        )
        table.add_row(
            str(stage.rank),
            f"{stage.layers[0]}-{stage.layers[1] - 1}",
            *(_seconds(value) for value in times),
            f"{100 * stage.idle_fraction(measurement.run_s):.0f}",
        )
    return table


def _seconds(seconds: float) -> str:
    """Three digits: more do not fit into the columns, and less would say nothing."""
    decimals = 2 if seconds < 10 else 1 if seconds < 100 else 0
    return f"{seconds:.{decimals}f}"


def verdict(plan: DistPlan, measurement: Measurement) -> str:
    """What bounded the run, and the pipeline's bubble beside theory."""
    slowest = measurement.bottleneck
    where = "" if plan.num_stages == 1 else f"Bottleneck: stage {slowest.rank}. "
    share = _share_of(slowest)
    text = f"{where}{share}"
    if plan.num_stages > 1:
        text += (
            f"\nBubble: {measurement.bubble_fraction:.1%} measured; "
            f"{measurement.bubble_theory:.1%} in theory for a full round, (S-1)/(T+S-1); "
            f"{measurement.bubble_of_schedule:.1%} for "
            "this schedule with equal stages."
        )
    return text


def _share_of(stage: StageReport) -> str:
    busy = stage.busy_s or 1.0
    if stage.bottleneck() == "compute":
        return f"Computing took {stage.compute_s / busy:.0%} of its own time."
    return (
        f"It stood still for loads and stores in {stage.stalled_s / busy:.0%} of its own time, and "
        f"computed in {stage.compute_s / busy:.0%}."
    )


def memory_table(plan: DistPlan, measurement: Measurement) -> Table:
    """Sizes of model, cache and activations, and each stage's peaks."""
    table = Table(title="Peak memory", box=box.SIMPLE_HEAD)
    gpu = "gpu" if plan.has_gpu else "'gpu' home"
    for heading in ("stage", gpu, "cpu (whole process)", "disk"):
        table.add_column(heading, justify="right")
    for stage in measurement.stages:
        table.add_row(
            str(stage.rank),
            format_bytes(stage.gpu_peak_bytes),
            format_bytes(stage.cpu_peak_bytes),
            format_bytes(stage.disk_peak_bytes) if stage.disk_peak_bytes else "-",
        )
    return table

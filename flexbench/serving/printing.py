"""What `flexbench serving` prints: the plan of a run, and afterwards its curves and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexbench.core.units import format_seconds
from flexbench.serving.config import Load, PromptConfig, ServingConfig
from flexbench.serving.curve import Curve
from flexbench.serving.prompts import open_prompts
from flexbench.serving.tables import (
    CurvePoint,
    curve_plot,
    curve_table,
    legend,
    saturation_sentences,
)

# More points that were client-limited are not explained one by one.
_MOST_REASONS = 4
_FEW = 0.01


def plan_table(config: ServingConfig) -> Table:
    """What would be measured, a line for each combination of prompts."""
    target = getattr(config.client_config, "api_url", None)
    title = f"--api {config.api}" + (f" at {target}" if target is not None else "")
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=False)
    for heading in ("prompts", "new tokens", "loads"):
        table.add_column(heading, overflow="fold")
    for sweep in config.sweeps:
        prompts = sweep.prompts
        loads = ", ".join(load.label for load in sweep.loads)
        if config.is_search:
            loads = f"search from {loads}"
        else:
            loads += f"; {_amount(sweep.loads)} each"
        table.add_row(
            _spread(prompts.prompt_length, prompts.prompt_length_var),
            _spread(prompts.max_new_tokens, prompts.max_new_tokens_var),
            loads,
        )
    return table


def _amount(loads: Sequence[Load]) -> str:
    """How much each load is: '30 s', or '128 to 512 requests'."""
    if loads[0].duration_s is not None:
        return format_seconds(loads[0].duration_s)
    counts = [load.num_requests or 0 for load in loads]
    least, most = min(counts), max(counts)
    return f"{least} requests" if least == most else f"{least} to {most} requests"


def print_curve(console: Console, config: ServingConfig, curve: Curve) -> None:
    """A curve as a table, with what there is to say of it."""
    points = [
        CurvePoint(
            load=point.load,
            figures=point.figures,
            is_client_limited=point.is_client_limited,
            is_timing_uncertain=point.is_timing_uncertain,
            client_busy=point.client_busy,
        )
        for point in sorted(
            curve.points, key=lambda one: (one.load.concurrency or 0, one.load.rate_per_s or 0)
        )
    ]
    title = None
    if len(config.sweeps) > 1:
        title = _describe(curve.prompts)
    console.print(curve_table(points, title=title))
    if plot := curve_plot(points):
        console.print(plot, markup=False, highlight=False)
    if curve.saturation is not None:
        for sentence in saturation_sentences(curve.saturation):
            console.print(sentence, markup=False, highlight=False)
    for sentence in _remarks(curve):
        console.print(sentence, markup=False, highlight=False)
    console.print(legend(points), markup=False, highlight=False, style="dim")


def _describe(prompts: PromptConfig) -> str:
    return (
        f"prompts of {_spread(prompts.prompt_length, prompts.prompt_length_var)} tokens, "
        f"{_spread(prompts.max_new_tokens, prompts.max_new_tokens_var)} new ones"
    )


def _spread(mean: int, fraction: float) -> str:
    return f"{mean}" if fraction == 0 else f"{mean} ± {mean * fraction:.0f}"


def _remarks(curve: Curve) -> Iterator[str]:
    """What a reader of the figures has to know, beside them."""
    if curve.ended_early is not None:
        yield f"Ended early: {curve.ended_early}."
    limited = [point for point in curve.points if point.is_client_limited]
    for point in limited[:_MOST_REASONS]:
        yield f"Client-limited at {point.load.label}: {'; '.join(point.audit.reasons)}."
    late = [point for point in curve.points if point.is_timing_uncertain]
    if late:
        worst = max(late, key=lambda point: point.audit.inputs.loop_lag_p99_s or 0)
        reasons = "; ".join(worst.audit.timing_reasons)
        yield (
            f"Late at {len(late)} of {len(curve.points)} points, most at {worst.load.label}: "
            f"{reasons}."
        )
    good = [point for point in curve.points if point.figures.goodput is not None]
    if good:
        best = max(good, key=lambda point: point.figures.goodput or 0)
        yield (
            f"Highest goodput: {best.figures.goodput:.4g} requests/s that met every condition, at "
            f"{best.load.label}."
        )
    for point in curve.points:
        for violation in point.violations:
            yield f"Not met at {point.load.label}: {violation}."
        if point.figures.failures:
            kinds = ", ".join(f"{count} {kind}" for kind, count in point.figures.failures.items())
            yield f"Failed at {point.load.label}: {kinds}."
    yield from _about_prompts(curve)
    yield from _about_tokens(curve)
    num_old = sum(point.is_from_file for point in curve.points)
    if num_old:
        yield f"{num_old} of {len(curve.points)} points had been measured before (--force repeats)."


def _about_prompts(curve: Curve) -> Iterator[str]:
    prompts = open_prompts(curve.prompts)
    if prompts.tokenizer.is_stand_in:
        yield (
            "Prompt lengths are in bytes: --model is no folder with a tokenizer, and --tokenizer "
            "names none."
        )
    total = sum(point.figures.num_requests for point in curve.points)
    if prompts.num_distinct is not None and prompts.num_distinct < total:
        yield (
            f"The dataset has {prompts.num_distinct} prompts for {total} requests: some came "
            "again, which a server's prefix cache makes quicker."
        )


def _about_tokens(curve: Curve) -> Iterator[str]:
    figures = [point.figures for point in curve.points]
    if any((one.tokens_per_chunk or 1) > 1 + _FEW for one in figures):
        most = max(one.tokens_per_chunk or 1 for one in figures)
        yield (
            f"Chunks have up to {most:.3g} tokens on average: ITL is between chunks, TPOT between "
            "tokens."
        )
    if any(
        one.share_counted_by_server is not None and one.share_counted_by_server < 1
        for one in figures
    ):
        how = "by the tokenizer"
        if open_prompts(curve.prompts).tokenizer.is_stand_in:
            how = "as chunks" if curve.prompts.streaming else "in bytes"
        yield f"Output tokens were counted {how} where the server did not say."
    differences = [
        one.mean_prompt_length_difference for one in figures if one.share_other_prompt_length
    ]
    if known := [one for one in differences if one is not None]:
        mean = sum(known) / len(known)
        yield (
            f"The server counts {mean:+.3g} tokens a prompt more or less than --tokenizer: its "
            "template, special tokens, or another tokenizer."
        )
    short = max((one.share_short_outputs or 0 for one in figures), default=0)
    if short > _FEW:
        yield f"Up to {short:.0%} of the answers have fewer tokens than were asked for."

"""The plan, and what is said beside a curve."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexbench.serving.audit import AuditInput, audit
from flexbench.serving.clients.dummy import DummyConfig
from flexbench.serving.config import Arrival, Load, PromptConfig, ServingConfig, Sweep
from flexbench.serving.curve import Curve, Point
from flexbench.serving.figures import PointFigures, compute_figures
from flexbench.serving.printing import plan_table, print_curve
from flexbench.serving.traces import RequestTrace

MS = 1_000_000
PROMPTS = PromptConfig(model="m", tokenizer="byte", prompt_length=100, max_new_tokens=4)


def config(*sweeps: Sweep, **more: Any) -> ServingConfig:
    return ServingConfig(api="dummy", client_config=DummyConfig(), sweeps=sweeps, **more)


def trace(index: int, **changes: Any) -> RequestTrace:
    """TTFT 50 ms, then three tokens every 10 ms: 80 ms in all."""
    sent = index * 80 * MS
    values: dict[str, Any] = {
        "index": index, "worker": 0, "scheduled_ns": sent, "sent_ns": sent, "connected_ns": None,
        "content_ns": [sent + (50 + 10 * token) * MS for token in range(4)],
        "ended_ns": sent + 80 * MS, "prompt_tokens": 100, "max_new_tokens": 4, "output_tokens": 4,
        "is_counted_by_server": True, "server_prompt_tokens": 100, "finish_reason": "length",
        "is_unfinished": False, "failure": None, "failure_message": None,
    }  # fmt: skip
    return RequestTrace(**values | changes)


def figures(*traces: RequestTrace, **changes: Any) -> PointFigures:
    found = compute_figures(traces, window_s=0.8, is_streaming=True)
    return replace(found, **changes)


def point(concurrency: int = 1, *, busy: float = 0.1, **changes: Any) -> Point:
    values: dict[str, Any] = {
        "load": Load(concurrency=concurrency, num_requests=10),
        "figures": figures(*(trace(index) for index in range(10))),
        "audit": audit(AuditInput(worker_busy=(busy,))),
        "violations": [],
        "file": Path("point.json"),
    }
    return Point(**values | changes)


def printed(*points: Point, sweeps: int = 1, **changes: Any) -> str:
    console = Console(file=io.StringIO(), width=80)
    curve = Curve(prompts=PROMPTS, points=list(points), **changes)
    print_curve(console, config(*[Sweep(prompts=PROMPTS, loads=())] * sweeps), curve)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    return text


def said(*points: Point, **changes: Any) -> str:
    """The same without the ends of lines."""
    return " ".join(printed(*points, **changes).split())


def row(text: str, first: str) -> list[str]:
    (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == [first])
    return line


def test_a_point_is_a_line_of_figures():
    # 10 answers of 4 tokens in 0.8 s.
    assert row(printed(point()), "1") == ["1", "12.5", "50", "50", "50", "10", "10", "80", "80", "1", "10", "0"]  # fmt: skip


def test_points_stand_from_light_to_heavy():
    text = printed(point(8), point(2), point(4))
    lines = [
        line.split()[0] for line in text.splitlines() if line.split()[:1] in (["2"], ["4"], ["8"])
    ]
    assert lines == ["2", "4", "8"]


def test_nothing_is_said_that_there_is_no_need_for():
    text = said(point())
    for word in ("Ended early", "limited", "Not met", "Failed", "measured before", "tokenizer did", "fewer tokens", "template", "Chunks", "goodput"):  # fmt: skip
        assert word not in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"busy": 0.97}, "Client-limited at 1 client: a worker's event loop was busy 97% of the time."),
        ({"violations": ["ttft p99 is 50 ms, not < 40 ms"]}, "Not met at 1 client: ttft p99 is 50 ms, not < 40 ms."),
        ({"is_from_file": True}, "1 of 1 points had been measured before (--force repeats)."),
        ({"figures": figures(trace(0), trace(1, failure="timeout", content_ns=[]), trace(2, failure="closed"), trace(3, failure="closed"))}, "Failed at 1 client: 2 closed, 1 timeout."),
        ({"figures": figures(trace(0, is_counted_by_server=False))}, "Output tokens were counted by the tokenizer where the server did not say."),
        ({"figures": figures(trace(0, server_prompt_tokens=108))}, "The server counts +8 tokens a prompt more or less than --tokenizer"),
        ({"figures": figures(trace(0), trace(1, output_tokens=2))}, "Up to 50% of the answers have fewer tokens than were asked for."),
        ({"figures": figures(trace(0, content_ns=[50 * MS, 70 * MS]))}, "Chunks have up to 2 tokens on average"),
        ({"figures": figures(trace(0), goodput=7.5)}, "Highest goodput: 7.5 requests/s that met every condition, at 1 client."),
    ],
)  # fmt: skip
def test_what_a_reader_has_to_know(changes, sentence):
    assert sentence in said(point(**changes))


def test_only_some_points_are_explained_one_by_one():
    text = said(*(point(number, busy=0.95) for number in range(1, 8)))
    assert text.count("Client-limited at") == 4


def test_why_a_curve_has_ended_early():
    assert "Ended early: mean latency 12 s." in said(point(), ended_early="mean latency 12 s")


def test_curves_of_several_prompts_have_titles():
    title = "prompts of 100 ± 30 tokens, 4 ± 1 new ones"
    assert title not in said(point())
    assert title in said(point(), sweeps=2)


def test_a_point_without_an_answer_is_shown():
    nothing = figures(trace(0, failure="refused", content_ns=[]))
    assert "Failed at 1 client: 1 refused." in said(point(figures=nothing))


def test_words_of_others_are_no_markup():
    text = said(point(violations=["[bold]no[/bold] markup"]), ended_early="[red]x[/nothing]")
    assert "[bold]no[/bold] markup" in text
    assert "[red]x[/nothing]" in text


# --- the plan ------------------------------------------------------------------------------------


def shown(chosen: ServingConfig) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=80)
    console.print(plan_table(chosen))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(line.split()).split(" | ") for line in text.splitlines() if line.strip()]


def test_the_plan_has_a_line_for_each_sweep():
    rate = Load(rate_per_s=2.5, arrival=Arrival.POISSON, duration_s=1)
    sweeps = (
        Sweep(prompts=PROMPTS, loads=(Load(concurrency=1, duration_s=1), Load(concurrency=8, duration_s=1))),
        Sweep(prompts=replace(PROMPTS, prompt_length_var=0), loads=(rate,)),
    )  # fmt: skip
    lines = [line[0] for line in shown(config(*sweeps))]
    assert lines[:2] == ["--api dummy", "prompts new tokens loads"]
    assert lines[3:] == [
        "100 ± 30 4 ± 1 1 client, 8 clients; 1.0 s each",
        "100 4 ± 1 2.5 requests/s, poisson; 1.0 s each",
    ]


def test_the_plan_of_a_search_says_where_it_begins():
    sweep = Sweep(prompts=PROMPTS, loads=(Load(concurrency=4, duration_s=1),))
    assert shown(config(sweep, is_search=True))[-1] == ["100 ± 30 4 ± 1 search from 4 clients"]

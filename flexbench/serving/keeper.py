"""Computes a point's figures, judges it, and writes it down; finds what was written before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexbench.core import environment
from flexbench.core.errors import FlexbenchError, Interrupted
from flexbench.core.results import ResultRow, utc_now
from flexbench.serving import slo
from flexbench.serving.audit import Audit, AuditInput, audit
from flexbench.serving.config import Load, PromptConfig, ServingConfig, Sweep
from flexbench.serving.curve import Curve, Point
from flexbench.serving.figures import (
    Distribution,
    PointFigures,
    compute_figures,
    distribution,
    measured_window,
)
from flexbench.serving.generator import LoopReport, event_loop_name
from flexbench.serving.generators import PartialRun, PointRun
from flexbench.serving.load import Calibration, LoadedPoint
from flexbench.serving.point_files import PointStore, result_row
from flexbench.serving.prompts import open_prompts

# A loop that was done so soon, or had no client, says nothing of how busy it was.
_LEAST_WALL_S = 0.05
PACKAGES = ("httptools", "orjson", "uvloop")


class PointKeeper:
    """The points of a run, in its result folder."""

    def __init__(
        self,
        config: ServingConfig,
        store: PointStore,
        *,
        packages: Sequence[str],
    ) -> None:
        """`packages` are those whose versions matter."""
        self.conditions = slo.parse_slo(config.slo)
        self._config = config
        self._store = store
        self._packages = (*PACKAGES, *packages)

    def point_from(self, record: dict[str, Any], load: Load) -> Point:
        """The point that a record of an earlier run tells of."""
        return Point(
            load=load,
            figures=PointFigures.from_record(record["figures"]),
            audit=Audit.from_record(record["audit"]),
            violations=list(record["violations"]),
            file=self._store.path(record["configuration"]),
            is_from_file=True,
        )

    def begin(
        self, configuration: dict[str, Any], prompts: PromptConfig, service: dict[str, Any]
    ) -> dict[str, Any]:
        """The beginning of a point's record."""
        return {
            "system": "serving",
            "status": "ok",
            "started_at": utc_now(),
            "configuration": configuration,
            "service": service,
            "prompts": open_prompts(prompts).describe(),
        }

    def figures(self, prompts: PromptConfig, load: Load, run: PointRun) -> PointFigures:
        """The figures of what was measured."""
        last_s = max((trace.ended_ns or 0 for trace in run.traces), default=0) / 1e9
        is_whole = bool(run.reports) and run.stopped_by is None
        window = measured_window(load, run.traces, stopped_after_s=None if is_whole else last_s)
        conditions = self.conditions
        return compute_figures(
            run.traces,
            window_s=window.window_s,
            steady_end_s=window.steady_end_s,
            is_streaming=prompts.streaming,
            is_open_loop=load.concurrency is None,
            meets=(lambda trace: slo.meets(trace, conditions)) if conditions else None,
        )

    def keep(
        self,
        record: dict[str, Any],
        loaded: LoadedPoint,
        figures: PointFigures,
        calibration: Calibration | None,
        *,
        prompts: PromptConfig,
        load: Load,
    ) -> Point:
        """Judge a point and write it down."""
        run = loaded.run
        verdict = audit(
            _audit_input(load, run, figures, calibration, loaded.hosts.get("num_ranks", 1))
        )
        violations = slo.check(self.conditions, figures)
        problem = self._problem_of(run, figures)
        if problem is not None:
            record = record | {"status": "failed", "error": problem}
        record = record | {
            "released_at_ns": run.released_ns,
            "figures": figures.as_record(),
            "audit": verdict.as_record(),
            "violations": violations,
            "calibration": None if calibration is None else asdict(calibration),
            "warmup_failures": Counter(failure.kind for failure in loaded.warmup_failures),
            "generators": _describe_generators(loaded),
            **environment.describe_run(self._packages),
        }
        row = result_row(prompts, load, figures) if problem is None else None
        file = self._write(record, run, row)
        return Point(
            load=load,
            figures=figures,
            audit=verdict,
            violations=violations,
            file=file,
            stopped_by=problem,
        )

    def _problem_of(self, run: PointRun, figures: PointFigures) -> str | None:
        """Why a point is no result, with the failure that most requests had."""
        limits = self._config.limits
        problem = run.stopped_by or limits.final_problem(figures.num_failed, figures.num_ok)
        failures = Counter((one.failure, one.failure_message) for one in run.traces if one.failure)
        if problem is None or not failures:
            return problem
        (((kind, message), count),) = failures.most_common(1)
        return f"{problem}; {count} of them {kind}: {message}"

    def _write(self, record: dict[str, Any], run: PointRun, row: ResultRow | None) -> Path:
        """Write down a point; if there is no room for its requests, at least its figures."""
        try:
            file = self._store.write(record, run.traces)
        except FlexbenchError as error:
            try:
                self._store.append_row(row, record, self._store.path(record["configuration"]))
            except FlexbenchError as lost:
                error.add_details(f"{lost.message}\n{lost.details}")
            else:
                error.add_details("Its figures, without its requests, are in serving.jsonl")
            raise
        self._store.append_row(row, record, file)
        return file

    def keep_curve(
        self, curve: Curve, configurations: Sequence[dict[str, Any]], sweep: Sweep
    ) -> Path:
        """Write down where a curve's points are, and what its search found."""
        first = {
            name: value
            for name, value in configurations[0].items()
            if name not in ("load", "number_of_try")
        }
        first |= {
            "is_search": self._config.is_search,
            "loads": [asdict(load) for load in sweep.loads],
        }
        points = [
            {
                "load": asdict(point.load),
                "file": point.file.name,
                "requests_per_s": point.figures.requests_per_s,
                "steady_requests_per_s": point.figures.steady_requests_per_s,
                "output_tokens_per_s": point.figures.output_tokens_per_s,
                "goodput": point.figures.goodput,
                "e2e_p50_s": None if point.figures.e2e is None else point.figures.e2e.p50,
                "ttft_p50_s": None if point.figures.ttft is None else point.figures.ttft.p50,
                "in_flight": point.figures.in_flight,
                "client_busy": point.client_busy,
                "is_client_limited": point.is_client_limited,
                "is_timing_uncertain": point.is_timing_uncertain,
                "violations": point.violations,
            }
            for point in curve.points
        ]
        found = curve.saturation
        return self._store.write_curve(
            {
                "written_at": utc_now(),
                "configuration": first,
                "points": points,
                "ended_early": curve.ended_early,
                "saturation": None if found is None else found.as_record(),
            }
        )

    def keep_partial(
        self, record: dict[str, Any], partial: PartialRun, figures: PointFigures, label: str
    ) -> None:
        """Write down what was measured of a point before an error ended it."""
        error = partial.error
        record = record | {
            "status": "interrupted" if isinstance(error, Interrupted) else "failed",
            "error": error.message,
            "released_at_ns": partial.run.released_ns,
            "figures": figures.as_record(),
            **environment.describe_run(self._packages),
        }
        try:
            file = self._store.write(record, partial.run.traces)
            self._store.append_row(None, record, file)
        except FlexbenchError as lost:
            error.add_details(lost.message)
        else:
            error.add_details(f"What was measured of {label} until then is in {file}")


def _describe_generators(loaded: LoadedPoint) -> dict[str, Any]:
    return {
        "num_workers_per_rank": loaded.topology.num_workers,
        "num_loops": loaded.topology.num_parts,
        "event_loop": event_loop_name(),
        "loops": [
            {
                "part": report.part,
                "cpu_s": report.cpu_s,
                "wall_s": report.wall_s,
                "lag": asdict(found) if (found := _lags(report)) is not None else None,
                "num_prepared_late": report.num_prepared_late,
                "niceness": report.niceness,
            }
            for report in loaded.run.reports
        ],
        **loaded.hosts,
    }


def _lags(report: LoopReport) -> Distribution | None:
    return distribution(lag * 1e9 for lag in report.lags_s)


def _audit_input(
    load: Load,
    run: PointRun,
    figures: PointFigures,
    calibration: Calibration | None,
    num_ranks: int,
) -> AuditInput:
    lags = [found for report in run.reports if (found := _lags(report)) is not None]
    worst = max(lags, key=lambda one: one.p99, default=None)
    return AuditInput(
        worker_busy=tuple(r.cpu_s / r.wall_s for r in run.reports if r.wall_s > _LEAST_WALL_S),
        loop_lag_p50_s=None if worst is None else worst.p50,
        loop_lag_p99_s=None if worst is None else worst.p99,
        ttft_p50_s=None if figures.ttft is None else figures.ttft.p50,
        e2e_p50_s=None if figures.e2e is None else figures.e2e.p50,
        send_lateness_p99_s=None if figures.send_lateness is None else figures.send_lateness.p99,
        concurrency=load.concurrency,
        steady_in_flight=figures.steady_in_flight,
        error_rate=figures.error_rate,
        scheduled_per_s=figures.scheduled_per_s,
        sent_per_s=figures.sent_per_s,
        requests_per_s=figures.requests_per_s,
        generator_requests_per_s=(
            None if calibration is None else num_ranks * calibration.max_requests_per_s
        ),
        generator_error_p99_s=None if calibration is None else calibration.error_p99_s,
    )

"""The benchmark: measure point after point, keep each, find the saturation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbench.core.endpoint import Client
from flexbench.core.errors import FlexbenchError, RunError
from flexbench.core.folders import WorkFolders, work_folders
from flexbench.core.processes import Crew
from flexbench.core.progress import Progress
from flexbench.core.signals import SignalWatch
from flexbench.core.units import format_seconds
from flexbench.serving.clients import find_client
from flexbench.serving.config import (
    AUTO_MODEL,
    Arrival,
    Load,
    Meeting,
    PromptConfig,
    ServingConfig,
    Sweep,
)
from flexbench.serving.curve import Curve, Point
from flexbench.serving.generators import Generators, PartialRun, PointSpec
from flexbench.serving.identity import configuration_of, series_of
from flexbench.serving.live import shows, total_of
from flexbench.serving.load import Calibration, LoadedPoint, LocalLoad, calibrate
from flexbench.serving.point_files import PointStore
from flexbench.serving.service import Service

if TYPE_CHECKING:
    from flexbench.serving.figures import PointFigures
    from flexbench.serving.keeper import PointKeeper

# A point of a search lasts so long, or so many times the mean latency before it if that is more.
_SEARCH_POINT_S = 2.5
_SEARCH_POINT_LATENCIES = 10
_SEARCH_POINT_BURSTS = 5
_LONGEST_SEARCH_POINT_S = 120.0
# A calibration says something of points with up to so many times as many requests in flight, and
# not many times less.
_CALIBRATION_REACH = 2


def run_serving(
    config: ServingConfig,
    *,
    meeting: Meeting | None = None,
    progress: Progress,
    log_folder: Path | None = None,
    on_curve: Callable[[Curve], None] = lambda _: None,
) -> list[Curve]:
    """Measure all sweeps, or search for the saturation of each.

    With a `meeting` of several ranks, all of them call it: rank 0 gets the curves, the others help
    to send the load and get none. Raises ConfigError and InputFileError before anything is sent,
    RunError when the service, a worker or a rank failed, Interrupted when told to stop; what was
    measured is in the files by then. `on_curve` gets each curve before it has points; they are
    added to it as they are measured.
    """
    if meeting is None or meeting.launch.world_size == 1:
        with _Workplace.open(config, log_folder) as place:
            generators = place.generators(config)
            load = LocalLoad(generators, place.client_class, config=config)
            return _measure_all(config, load, place, generators, progress, on_curve)
    return _run_ranked(config, meeting, progress, log_folder, on_curve)


def _run_ranked(
    config: ServingConfig,
    meeting: Meeting,
    progress: Progress,
    log_folder: Path | None,
    on_curve: Callable[[Curve], None],
) -> list[Curve]:
    from flexbench.ranks.group import open_ranks
    from flexbench.serving.ranked_load import RankedLoad, fingerprint

    with ExitStack() as stack:
        # Around the workplace: its handlers of signals raise nothing, but others have to end the
        # wait for the other ranks.
        checks: list[Callable[[], None]] = []

        def raise_if_stopped() -> None:
            for check in checks:
                check()

        with progress.phase(f"Waiting for {meeting.launch.world_size} ranks", total=1):
            group = stack.enter_context(
                open_ranks(
                    meeting.launch,
                    purpose="serving",
                    head_ip=meeting.head_ip,
                    port=meeting.port,
                    timeout_s=meeting.timeout_s,
                    fingerprint=fingerprint(config),
                    raise_if_stopped=raise_if_stopped,
                )
            )
        place = stack.enter_context(_Workplace.open(config, log_folder))
        checks.append(place.signals.raise_if_stopped)
        generators = place.generators(config, check=group.check)
        load = RankedLoad(group, generators, place.client_class, config=config)
        if group.rank > 0:
            load.follow()
            return []
        curves = _measure_all(config, load, place, generators, progress, on_curve)
        load.end()
        return curves


@dataclass(frozen=True, kw_only=True)
class _Workplace:
    """What a run needs on its machine: processes, folders, and an ear for signals."""

    client_class: type[Client]
    signals: SignalWatch
    folders: WorkFolders
    crew: Crew

    @classmethod
    @contextmanager
    def open(cls, config: ServingConfig, log_folder: Path | None) -> Iterator[_Workplace]:
        """All of it is gone when the block is left; the logs stay if a run failed."""
        client_class = find_client(config.api)
        with (
            SignalWatch() as signals,
            work_folders(log_folder) as folders,
            Crew(
                log_folder=folders.logs,
                scratch_folder=folders.scratch,
                signals=signals,
                preload=client_class.preload,
                is_forked=not client_class.preload,
            ) as crew,
        ):
            yield cls(client_class=client_class, signals=signals, folders=folders, crew=crew)

    def generators(
        self, config: ServingConfig, check: Callable[[], None] = lambda: None
    ) -> Generators:
        """The load generators of this machine; `check` is called in every wait."""
        return Generators(
            self.crew,
            spool_folder=self.folders.scratch,
            prepare_timeout_s=config.limits.warmup_timeout_s,
            check=check,
        )


def _measure_all(
    config: ServingConfig,
    load: LocalLoad,
    place: _Workplace,
    generators: Generators,
    progress: Progress,
    on_curve: Callable[[Curve], None],
) -> list[Curve]:
    store = PointStore(config.result_dir)
    store.check()
    service = Service(
        place.client_class,
        config,
        progress=progress,
        folders=place.folders,
        raise_if_stopped=place.signals.raise_if_stopped,
    )
    bench = _Bench(config, store, service, generators, load, progress)
    with _ended(place.crew, service):
        curves = []
        for sweep in config.sweeps:
            curves.append(Curve(prompts=sweep.prompts))
            on_curve(curves[-1])
            bench.measure_curve(sweep, curves[-1])
        return curves


@contextmanager
def _ended(crew: Crew, service: Service) -> Iterator[None]:
    try:
        yield
    finally:
        # The generators first: requests that lose their server would fail for no reason.
        try:
            crew.end_all()
        finally:
            service.stop()


class _Bench:
    """Measures curves, point by point."""

    def __init__(
        self,
        config: ServingConfig,
        store: PointStore,
        service: Service,
        generators: Generators,
        load: LocalLoad,
        progress: Progress,
    ) -> None:
        self._config = config
        self._store = store
        self._service = service
        self._generators = generators
        self._load = load
        self._progress = progress
        self._calibration: Calibration | None = None
        self._configurations: list[dict[str, Any]] = []
        """Of the points of the curve that is being measured."""

    @cached_property
    def _keeper(self) -> PointKeeper:
        # Imported late: the first request should not wait for what computes figures.
        from flexbench.serving.keeper import PointKeeper

        return PointKeeper(
            self._config, self._store, packages=find_client(self._config.api).packages
        )

    def measure_curve(self, sweep: Sweep, curve: Curve) -> None:
        """Measure all loads of a sweep, or those that the search for its saturation asks for."""
        self._configurations = []
        try:
            if self._config.is_search:
                self._search(sweep.loads[0], curve)
            else:
                self._sweep(sweep.loads, curve)
        finally:
            if curve.points:
                curve.file = self._keeper.keep_curve(curve, self._configurations, sweep)

    def _sweep(self, loads: tuple[Load, ...], curve: Curve) -> None:
        limit_s = self._config.limits.early_stop_latency_s
        for load in loads:
            point = self._measure(curve, load)
            e2e = point.figures.e2e
            if point.stopped_by is not None:
                curve.ended_early = f"{point.stopped_by}, at {load.label}"
                return
            if limit_s and e2e is not None and e2e.mean > limit_s and load != loads[-1]:
                curve.ended_early = (
                    f"mean latency {format_seconds(e2e.mean)} at {load.label}, above "
                    f"--early-stop-latency {limit_s:g}"
                )
                return

    def _search(self, first: Load, curve: Curve) -> None:
        from flexbench.serving.saturation import Observation

        search = self._new_search(first)
        tries: Counter[float] = Counter()
        latencies: list[float] = []
        while (level := search.next_level()) is not None:
            tries[level] += 1
            # Beyond the knee latency is that of the queue: what it is without comes first.
            latency_s = min(latencies, default=0.0)
            load = self._search_load(first, level, latency_s, search.length_factor(level))
            point = self._measure(curve, load, tries[level])
            if point.figures.e2e is not None:
                latencies.append(point.figures.e2e.mean)
            observation = Observation.from_figures(
                point.figures,
                meets_slo=not point.violations,
                # A latency that is too long by our doing is no violation of the service's.
                is_client_limited=point.is_client_limited
                or (bool(point.violations) and point.is_timing_uncertain),
                is_gross_violation=len(point.violations) > 1,
                is_stopped=point.stopped_by is not None,
            )
            search.add(level, observation)
        curve.saturation = search.result()

    def _new_search(self, first: Load) -> Any:
        from flexbench.serving.observations import DEFAULT_MAX_ERROR_RATE
        from flexbench.serving.saturation import RateSearch, SaturationSearch
        from flexbench.serving.slo import ERRORS

        has_slo = bool(self._config.slo)
        # A condition on errors is the person's own word on how many there may be.
        has_errors = any(one.metric == ERRORS for one in self._keeper.conditions)
        max_error_rate = 1.0 if has_errors else DEFAULT_MAX_ERROR_RATE
        if first.rate_per_s is not None:
            return RateSearch(
                max_rate=self._config.max_rate,
                start_rate=first.rate_per_s,
                has_slo=has_slo,
                max_error_rate=max_error_rate,
            )
        assert first.concurrency is not None
        return SaturationSearch(
            max_level=self._config.max_clients,
            start_level=first.concurrency,
            has_slo=has_slo,
            max_error_rate=max_error_rate,
        )

    def _search_load(self, first: Load, level: float, latency_s: float, factor: int) -> Load:
        """The load of a level; `factor` times as long as usual, where it was too short before."""
        duration_s = self._config.search_point_s or max(
            _SEARCH_POINT_S, _SEARCH_POINT_LATENCIES * latency_s
        )
        if first.arrival is Arrival.BURST:
            duration_s = max(duration_s, _SEARCH_POINT_BURSTS * first.burst_size / level)
        duration_s = min(factor * duration_s, max(duration_s, _LONGEST_SEARCH_POINT_S))
        if first.rate_per_s is not None:
            return replace(first, rate_per_s=level, duration_s=duration_s)
        return replace(first, concurrency=round(level), duration_s=duration_s)

    # --- one point ---

    def _model(self) -> str | None:
        """The model that an endpoint was found to have, where nobody has named one."""
        has_to_ask = getattr(find_client(self._config.api), "finds_model", False)
        if not has_to_ask or self._config.client_config.model not in (None, AUTO_MODEL):
            return None
        model: str | None = self._service.start().model
        return model

    def _measure(self, curve: Curve, load: Load, number_of_try: int = 1) -> Point:
        """Measure a point and keep it; or read it, if it had been measured before."""
        configuration = configuration_of(
            self._config,
            curve.prompts,
            load,
            model=self._model(),
            number_of_try=number_of_try,
            num_ranks=self._load.num_ranks,
        )
        self._configurations.append(configuration)
        record = None
        if not self._config.force:
            record = self._store.find(configuration, tell=self._progress.note)
        if record is not None:
            point = self._keeper.point_from(record, load)
        else:
            point = self._send(curve.prompts, load, configuration)
        curve.points.append(point)
        return point

    def _send(self, prompts: PromptConfig, load: Load, configuration: dict[str, Any]) -> Point:
        client_config = self._service.start()
        spec = PointSpec(
            api=self._config.api,
            client_config=client_config,
            prompts=prompts,
            load=load,
            series=series_of(configuration),
            warmup_requests=self._config.warmup_requests,
            request_timeout_s=self._config.limits.request_timeout_s,
        )
        record = self._keeper.begin(configuration, prompts, self._service.description)
        with self._progress.phase(
            load.label[:1].upper() + load.label[1:], total=total_of(load)
        ) as phase:
            phase.show("connecting and warming up", 0)
            try:
                loaded = self._load.send(spec, shows(phase, load))
            except RunError:
                self._service.check()  # if it has ended, that is the reason
                raise
            except PartialRun as partial:
                figures = self._keeper.figures(prompts, load, partial.run)
                self._keeper.keep_partial(record, partial, figures, load.label)
                raise partial.error from partial
            figures = self._keeper.figures(prompts, load, loaded.run)
            try:
                calibration = self._calibrate(prompts, loaded, figures)
            except FlexbenchError as error:
                # The point itself is whole, and stays.
                self._keeper.keep(record, loaded, figures, None, prompts=prompts, load=load)
                raise error.error if isinstance(error, PartialRun) else error from error
        point = self._keeper.keep(record, loaded, figures, calibration, prompts=prompts, load=load)
        if figures.num_failed:
            self._service.check()
        return point

    def _calibrate(
        self, prompts: PromptConfig, loaded: LoadedPoint, figures: PointFigures
    ) -> Calibration:
        """The generators' own speed and error with about as many requests in flight."""
        in_flight = max(1, figures.max_in_flight // self._load.num_ranks)
        known = self._calibration
        if (
            known is None
            or known.is_streaming != prompts.streaming
            or not known.concurrency / _CALIBRATION_REACH**2
            <= in_flight
            <= known.concurrency * _CALIBRATION_REACH
            or loaded.topology.num_parts != known.num_loops
        ):
            self._calibration = known = calibrate(
                self._generators, loaded.topology, in_flight, is_streaming=prompts.streaming
            )
        return known

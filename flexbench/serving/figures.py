"""What the traces of a point say: latencies, rates, and what was really in flight.

The definitions are those of docs/metrics.md. Only the standard library is used, and everything is
sorted once at most: a point may have millions of gaps between tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from flexbench.serving.config import Load
from flexbench.serving.traces import RequestTrace

NS_PER_S = 1e9
_MIN_SLICES = 3
_MAX_SLICES = 20
_MIN_ANSWERS = 8  # fewer say nothing of how a throughput varies
_Z_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """`count` values in seconds. Percentiles are interpolated linearly between the neighbours."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float

    def statistic(self, name: str) -> float:
        """One of them by its name for people: 'p99.9' is p99_9."""
        return float(getattr(self, name.replace(".", "_")))

    @staticmethod
    def from_record(record: dict[str, Any] | None) -> Distribution | None:
        """What `dataclasses.asdict` made a record of. Raises TypeError for something else."""
        return None if record is None else Distribution(**record)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the `ordered` values lie.

    It stands at position (n - 1) * share, counted from 0, and between two values it is interpolated
    linearly, as in numpy's default method.
    """
    position = (len(ordered) - 1) * share
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(values_ns: Iterable[float]) -> Distribution | None:
    """The distribution of times in nanoseconds; None of none."""
    ordered = sorted(values_ns)
    if not ordered:
        return None

    def seconds(share: float) -> float:
        return percentile(ordered, share) / NS_PER_S

    return Distribution(
        count=len(ordered),
        mean=sum(ordered) / len(ordered) / NS_PER_S,
        min=seconds(0.0),
        p50=seconds(0.5),
        p90=seconds(0.9),
        p95=seconds(0.95),
        p99=seconds(0.99),
        p99_9=seconds(0.999),
        max=seconds(1.0),
    )


@dataclass(frozen=True, kw_only=True)
class PointFigures:
    """The figures of one point. Times are in seconds; None: there is nothing to compute it from.

    Each figure that is named in `flexbench.core.metrics` is defined there.
    """

    window_s: float
    """From the release to the end of what is measured."""
    num_requests: int
    """Requests that the load asked for."""
    num_ok: int
    num_failed: int
    num_unfinished: int
    """Neither done nor failed when the point ended; not in the latencies."""
    failures: dict[str, int]
    """How many failed, by their FailureKind."""
    error_rate: float | None

    requests_per_s: float | None
    output_tokens_per_s: float | None
    input_tokens_per_s: float | None
    goodput: float | None
    """None also where there are no conditions."""

    steady_start_s: float | None
    steady_end_s: float | None
    steady_requests_per_s: float | None
    steady_standard_error: float | None
    """Of steady_requests_per_s, from slices of the window; None: the window is too short for one.

    1.96 of it on either side are the 95 % interval, also where there were few slices."""
    steady_output_tokens_per_s: float | None
    steady_in_flight: float | None
    steady_scheduled_per_s: float | None = None
    """Open loop: rate of what was due in the steady window;"""
    steady_scheduled_error: float | None = None
    """and by how much it differs by chance from the same number of answers, as a standard error."""

    in_flight: float | None
    max_in_flight: int
    scheduled_per_s: float | None
    """Rate of what the load asked for, from its first moment to its last;"""
    sent_per_s: float | None
    """and of what was sent."""

    ttft: Distribution | None
    ttft_scheduled: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    e2e_scheduled: Distribution | None
    send_lateness: Distribution | None

    output_tokens: float
    """That arrived in the window. Of a chunk with several tokens, all arrive at once."""
    tokens_per_chunk: float | None
    num_new_connections: int
    """Requests that had to open a connection first."""
    share_counted_by_server: float | None
    """Answers whose output tokens the server counted; the others' are the tokenizer's."""
    share_short_outputs: float | None
    """Answers with fewer tokens than were asked for."""
    share_other_prompt_length: float | None
    """Of answers whose server tells the length of the prompt, those where it is not ours;"""
    mean_prompt_length_difference: float | None
    """and by how many tokens it is longer, on average over all of these."""

    def as_record(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> PointFigures:
        """The figures that `as_record` made a record of. Raises TypeError for something else."""
        values = dict(record)
        for name in LATENCIES:
            values[name] = Distribution.from_record(values.get(name))
        return PointFigures(**values)

    def latency(self, name: str) -> Distribution | None:
        """One of LATENCIES."""
        found = getattr(self, name)
        assert found is None or isinstance(found, Distribution), name
        return found


LATENCIES = tuple(
    field.name for field in fields(PointFigures) if field.type == "Distribution | None"
)


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is measured of a point, in seconds since its release."""

    window_s: float
    steady_end_s: float
    """When nothing was left to be sent: from there on, the load runs out."""


def measured_window(
    load: Load, traces: Sequence[RequestTrace], *, stopped_after_s: float | None = None
) -> Window:
    """The window of a point under `load`.

    It ends with the last answer where all requests were sent, and with the duration where that
    ended the load. `stopped_after_s`: the point was ended from outside.
    """
    sent = [trace.sent_ns for trace in traces if trace.sent_ns is not None]
    last_sent_s = max(sent, default=0) / NS_PER_S
    last_end_s = max((trace.ended_ns or 0 for trace in traces), default=0) / NS_PER_S
    are_all_sent = load.num_requests is not None and len(sent) >= load.num_requests
    bounds = [bound for bound in (load.duration_s, stopped_after_s) if bound is not None]
    if are_all_sent or not bounds:
        bounds.append(last_end_s)
    end_s = min(bounds)
    return Window(window_s=end_s, steady_end_s=min(last_sent_s, end_s) if are_all_sent else end_s)


def ttft_ns(trace: RequestTrace) -> int | None:
    """From sending to the first content, in ns."""
    if trace.sent_ns is None or not trace.content_ns:
        return None
    return trace.content_ns[0] - trace.sent_ns


def e2e_ns(trace: RequestTrace) -> int | None:
    """From sending to the last content, in ns."""
    if trace.sent_ns is None or not trace.content_ns:
        return None
    return trace.content_ns[-1] - trace.sent_ns


def tpot_ns(trace: RequestTrace) -> float | None:
    """Mean time of each output token after the first, in ns; None with a single token.

    Also None of several tokens that came in one chunk: nothing is known of their times.
    """
    if trace.output_tokens < 2 or len(trace.content_ns) < 2:
        return None
    return (trace.content_ns[-1] - trace.content_ns[0]) / (trace.output_tokens - 1)


def gaps_ns(trace: RequestTrace) -> list[int]:
    """Gaps between consecutive chunks with content, in ns."""
    return [later - earlier for earlier, later in pairwise(trace.content_ns)]


def compute_figures(
    traces: Sequence[RequestTrace],
    *,
    window_s: float,
    is_streaming: bool,
    is_open_loop: bool = False,
    steady_end_s: float | None = None,
    meets: Callable[[RequestTrace], bool] | None = None,
) -> PointFigures:
    """All figures of a point.

    `window_s` and `steady_end_s` are those of `measured_window`. `meets` says whether an answer met
    every condition. Answers that end after the window are in the latencies: they were sent in it,
    and without them the slowest would be missing.
    """
    window = round(window_s * NS_PER_S)
    answers = [trace for trace in traces if trace.is_ok and _arrivals(trace)]
    num_failed = sum(trace.failure is not None for trace in traces)
    steady = _steady(
        traces,
        answers,
        window if steady_end_s is None else round(steady_end_s * NS_PER_S),
        is_open_loop=is_open_loop,
    )
    return PointFigures(
        window_s=window_s,
        num_requests=len(traces),
        num_ok=len(answers),
        num_failed=num_failed,
        num_unfinished=sum(trace.failure is None and trace.is_unfinished for trace in traces),
        failures=dict(
            Counter(trace.failure for trace in traces if trace.failure is not None).most_common()
        ),
        error_rate=_share(num_failed, num_failed + len(answers)),
        max_in_flight=_max_in_flight(traces),
        scheduled_per_s=_rate_of((trace.scheduled_ns, trace.scheduled_ns) for trace in traces),
        sent_per_s=_rate_of(
            (trace.scheduled_ns, trace.sent_ns) for trace in traces if trace.sent_ns is not None
        ),
        num_new_connections=sum(trace.connected_ns is not None for trace in traces),
        **_rates(traces, answers, window, meets),
        **steady,
        **_latencies(answers, is_streaming=is_streaming),
        send_lateness=distribution(
            trace.sent_ns - trace.scheduled_ns for trace in traces if trace.sent_ns is not None
        ),
        **_counts(answers, is_streaming=is_streaming),
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _rate_of(events: Iterable[tuple[int, int]]) -> float | None:
    """Per second, of events that are each given by the moment they were due and their own time.

    What was due at the same moment is a burst. The last burst ends the time and is not counted: the
    time after it would belong to it, and is not known. None with less than two moments.
    """
    bursts: dict[int, list[int]] = {}
    for due, at in events:
        bursts.setdefault(due, []).append(at)
    if len(bursts) < 2:
        return None
    last = bursts.pop(max(bursts))
    first_ns = min(map(min, bursts.values()))
    return _share(sum(map(len, bursts.values())), (min(last) - first_ns) / NS_PER_S)


def _end_of(trace: RequestTrace) -> int:
    """When an answer was there; of the end of the stream, only the last content is certain."""
    return trace.ended_ns if trace.ended_ns is not None else trace.content_ns[-1]


def _arrivals(trace: RequestTrace) -> list[int]:
    """When its tokens arrived.

    Tokens that have no text, such as half a character, are counted by the server alone: of an
    answer with no others it is only known that they were there at its end. It has no latencies.
    """
    if trace.content_ns or trace.ended_ns is None or not trace.is_ok:
        return trace.content_ns
    return [trace.ended_ns] if trace.output_tokens > 0 else []


def _rates(
    traces: Sequence[RequestTrace],
    answers: Sequence[RequestTrace],
    window: int,
    meets: Callable[[RequestTrace], bool] | None,
) -> dict[str, Any]:
    ended = [trace for trace in answers if _end_of(trace) <= window]
    # Tokens of an answer that never came to its end were generated all the same.
    begun = [trace for trace in traces if trace.failure is None and _arrivals(trace)]
    output_tokens = sum(
        trace.output_tokens * bisect_right(_arrivals(trace), window) / len(_arrivals(trace))
        for trace in begun
    )
    input_tokens = sum(
        trace.prompt_tokens if trace.server_prompt_tokens is None else trace.server_prompt_tokens
        for trace in begun
        if _arrivals(trace)[0] <= window
    )
    window_s = window / NS_PER_S
    in_flight = _time_in_flight(traces, 0, window) if window > 0 else 0
    return {
        "requests_per_s": _share(len(ended), window_s),
        "output_tokens": output_tokens,
        "output_tokens_per_s": _share(output_tokens, window_s),
        "input_tokens_per_s": _share(input_tokens, window_s),
        "goodput": _share(sum(map(meets, ended)), window_s) if meets is not None else None,
        "in_flight": _share(in_flight, window),
    }


def _time_in_flight(traces: Sequence[RequestTrace], start: int, end: int) -> int:
    """The sum over requests of their time in the window, in ns."""
    return sum(
        max(0, min(end if trace.ended_ns is None else trace.ended_ns, end) - max(sent, start))
        for trace in traces
        if (sent := trace.sent_ns) is not None
    )


def _max_in_flight(traces: Sequence[RequestTrace]) -> int:
    # An end sorts before a sending of the same moment: the two did not overlap.
    changes = [(trace.sent_ns, 1) for trace in traces if trace.sent_ns is not None]
    changes += [
        (trace.ended_ns, -1)
        for trace in traces
        if trace.sent_ns is not None and trace.ended_ns is not None
    ]
    changes.sort()
    current = highest = 0
    for _, change in changes:
        current += change
        highest = max(highest, current)
    return highest


def _latencies(all_answers: Sequence[RequestTrace], *, is_streaming: bool) -> dict[str, Any]:
    answers = [trace for trace in all_answers if trace.content_ns]
    from_schedule = distribution(trace.content_ns[-1] - trace.scheduled_ns for trace in answers)
    found: dict[str, Any] = {
        "e2e": distribution(_known(map(e2e_ns, answers))),
        "e2e_scheduled": from_schedule,
    }
    if not is_streaming:
        # All tokens come at once: their time is the end-to-end latency, and no other.
        return found | dict.fromkeys(("ttft", "ttft_scheduled", "itl", "tpot"))
    return found | {
        "ttft": distribution(_known(map(ttft_ns, answers))),
        "ttft_scheduled": distribution(
            trace.content_ns[0] - trace.scheduled_ns for trace in answers
        ),
        "itl": distribution(gap for trace in answers for gap in gaps_ns(trace)),
        "tpot": distribution(_known(map(tpot_ns, answers))),
    }


def _known(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None)


def _counts(answers: Sequence[RequestTrace], *, is_streaming: bool) -> dict[str, Any]:
    chunks = sum(len(trace.content_ns) for trace in answers)
    tokens = sum(trace.output_tokens for trace in answers)
    differences = [
        trace.server_prompt_tokens - trace.prompt_tokens
        for trace in answers
        if trace.server_prompt_tokens is not None
    ]
    short = sum(trace.output_tokens < trace.max_new_tokens for trace in answers)
    counted = sum(trace.is_counted_by_server for trace in answers)
    return {
        "tokens_per_chunk": _share(tokens, chunks) if is_streaming else None,
        "share_counted_by_server": _share(counted, len(answers)),
        "share_short_outputs": _share(short, len(answers)),
        "share_other_prompt_length": _share(sum(map(bool, differences)), len(differences)),
        "mean_prompt_length_difference": _share(sum(differences), len(differences)),
    }


def _steady(
    traces: Sequence[RequestTrace],
    answers: Sequence[RequestTrace],
    end: int,
    *,
    is_open_loop: bool,
) -> dict[str, Any]:
    """Figures of the steady window, all None where there is none."""
    start = _ramp_up_end(traces, end)
    length = end - start
    if length <= 0 or not answers:
        names = ("start_s", "end_s", "requests_per_s", "standard_error", "output_tokens_per_s")
        return dict.fromkeys((*(f"steady_{name}" for name in names), "steady_in_flight"))
    inside = [one for one in answers if _end_of(one) > start and (one.sent_ns or 0) < end]
    memory = _memory_ns(inside, is_open_loop=is_open_loop)
    num_slices = max(1, min(_MAX_SLICES, int(length / memory)))
    requests, tokens = _slices(inside, start, length, num_slices, is_open_loop=is_open_loop)
    seconds = length / NS_PER_S
    per_s = [count * num_slices / seconds for count in requests]
    is_long = num_slices >= _MIN_SLICES and sum(requests) >= _MIN_ANSWERS
    return {
        "steady_start_s": start / NS_PER_S,
        "steady_end_s": end / NS_PER_S,
        "steady_requests_per_s": sum(requests) / seconds,
        "steady_standard_error": _standard_error(per_s, length / memory) if is_long else None,
        "steady_output_tokens_per_s": tokens / seconds,
        "steady_in_flight": _time_in_flight(traces, start, end) / length,
        **(_steady_schedule(traces, start, end) if is_open_loop else {}),
    }


def _memory_ns(answers: Sequence[RequestTrace], *, is_open_loop: bool) -> float:
    """For how long the rate of a moment is still seen in the rate after it, in ns.

    In a closed loop an answer is spread over its latency, and a moment meets answers in proportion
    to their latencies: their mean is the sum of squares over the sum. In an open loop the queue is
    part of the latency, but not of the service's memory: the shortest latency is nearest to that.
    """
    latencies = [max(1, _end_of(one) - (one.sent_ns or 0)) for one in answers]
    if not latencies:
        return math.inf
    if is_open_loop:
        return float(min(latencies))
    return sum(latency**2 for latency in latencies) / sum(latencies)


def _standard_error(per_s: Sequence[float], num_memories: float) -> float:
    """Of the mean of the slices' rates, such that 1.96 of it are a 95 % interval.

    A rate that is a moving mean over a time m has, in slices of width k m, the share 1 - 1 / (3 k)
    of the variance that independent slices would have: the rest is in what neighbours have in
    common. Few slices are paid for with Student's t, as an expansion about the normal quantile
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    number = len(per_s)
    mean = sum(per_s) / number
    variance = sum((rate - mean) ** 2 for rate in per_s) / (number - 1)
    independent = variance / (1 - number / (3 * max(num_memories, number)))
    freedom = number - 1
    student = 1 + (_Z_95**2 + 1) / (4 * freedom)
    student += (5 * _Z_95**4 + 16 * _Z_95**2 + 3) / (96 * freedom**2)
    return student * math.sqrt(independent / number)


def _steady_schedule(traces: Sequence[RequestTrace], start: int, end: int) -> dict[str, Any]:
    """The rate at which requests were due in the window, and by how much that says little.

    The number of arrivals has the variance of their gaps; and a burst more or less may be due, or
    done, just inside.
    """
    bursts = Counter(t.scheduled_ns for t in traces if start <= t.scheduled_ns < end)
    moments = sorted(bursts)
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    rate = _rate_of((moment, moment) for moment in bursts.elements())
    if rate is None:
        return {}
    size = bursts.total() / len(bursts)
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2
    if len(gaps) < _MIN_ANSWERS:
        variance = max(1.0, variance)  # too few to say: as much as of a Poisson process
    share = math.sqrt(variance / len(moments) + (size / 2 / bursts.total()) ** 2)
    return {"steady_scheduled_per_s": rate, "steady_scheduled_error": rate * share}


def _ramp_up_end(traces: Sequence[RequestTrace], end: int) -> int:
    """When the requests that met an idle server were all done; half of the window at most.

    Those behind them in a queue wait from their first moment on; the first ones do not, and would
    make a saturated server look faster than it is.
    """
    first_end = min((t.ended_ns for t in traces if t.ended_ns is not None), default=end)
    first = [t for t in traces if t.sent_ns is not None and t.sent_ns < first_end]
    last = max((end if t.ended_ns is None else t.ended_ns for t in first), default=end)
    return min(last, end // 2)


def _slices(
    answers: Sequence[RequestTrace],
    start: int,
    length: int,
    num_slices: int,
    *,
    is_open_loop: bool,
) -> tuple[list[float], float]:
    """Answers in each slice of the window, and the tokens of all slices.

    In a closed loop an answer counts with the part of its time that lies in the slice, so that
    nothing depends on whether a handful of answers ended just before or after the window. In an
    open loop a queue may grow without end, and an answer counts where it ended.
    """
    requests = [0.0] * num_slices
    tokens = 0.0
    width = length / num_slices
    for trace in answers:
        ended = _end_of(trace)
        sent = ended if is_open_loop or trace.sent_ns is None else trace.sent_ns
        first = max(0, int((sent - start) // width))
        last = min(num_slices - 1, int((ended - start) // width))
        for index in range(first, last + 1):
            low, high = start + index * width, start + (index + 1) * width
            part = (min(ended, high) - max(sent, low)) / (ended - sent) if ended > sent else 1.0
            requests[index] += part
            tokens += part * trace.output_tokens
    return requests, tokens

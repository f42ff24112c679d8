"""The best placement for given batches: the paper's linear programme, with its costs made ours.

The nine variables are the shares of weights, cache and activations on gpu, cpu and disk. A block's
prefill takes T_p, a decoding step T_d, of every stage at least

    computing + what loads beside it cost it           (with overlap)
    all loads and stores of one home, one after the other

and what is minimized is T_p + (tokens - 1) T_d under the memory limits. Two further variables are 0
or 1: whether any weights, and any activations, are not on the gpu, as buffers then are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)

from flexbench.dist.placement import HomeBytes
from flexbench.dist.policy_search.memory import Demand, Limits

KINDS = ("weights", "cache", "activations")
HOMES = ("gpu", "cpu", "disk")
_NUM_SHARES = len(KINDS) * len(HOMES)
_IS_WEIGHT_AWAY, _IS_ACTIVATION_AWAY, _PREFILL, _DECODE = range(_NUM_SHARES, _NUM_SHARES + 4)
_NUM_VARIABLES = _NUM_SHARES + 4
_TOLERANCE = 1e-4  # of the solver, in percent

Row = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What moves in one pass of a block if all of a kind is at a home."""

    kind: str
    home: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """One stage's pass of a block: its prefill, or a decoding step. Seconds."""

    computing: float
    """With everything on the gpu."""
    loaded_computing: float
    """What is added if all weights are loaded."""
    loads: Sequence[Load]
    is_overlapped: bool = True
    serial_kinds: frozenset[str] = frozenset()
    """What computing has to wait for even so."""


@dataclass(frozen=True, kw_only=True)
class HomeSpeeds:
    """As in `constants.HomeTimes`."""

    computing: float = 1.0
    loading: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be placed."""

    prefill: Sequence[PassCost]
    """By stage."""
    decode: Sequence[PassCost]
    num_tokens: int
    demands: Sequence[Demand]
    limits: Limits
    speeds: dict[str, HomeSpeeds] = field(default_factory=dict)
    """Of 'cpu' and 'disk'. A home that is missing cannot be used."""
    percent: tuple[float, ...] | None = None
    """Shares that are fixed: weights, cache, activations, on gpu and cpu each."""


@dataclass(frozen=True)
class Placement:
    """What the programme found."""

    percent: tuple[float, ...]
    """Of weights, cache and activations, on gpu and cpu each: whole numbers, and rounded so that
    the gpu has rather less."""
    seconds: float
    """Of a block, before rounding."""


def best_placement(problem: Problem) -> Placement | None:
    """The fastest placement within the limits; None if there is none."""
    rows: list[Row] = []
    highest: list[float] = []

    def at_most(row: Row, value: float) -> None:
        rows.append(row)
        highest.append(value)

    for index, kind in ((_IS_WEIGHT_AWAY, "weights"), (_IS_ACTIVATION_AWAY, "activations")):
        row = _row({(kind, "gpu"): -1.0})
        row[index] = -1.0
        at_most(row, -1.0)  # share on the gpu >= 1 - is_away
    for row, value in _memory_rows(problem):
        at_most(row, value)
    for variable, passes in ((_PREFILL, problem.prefill), (_DECODE, problem.decode)):
        for cost in passes:
            for row, value in _time_rows(cost, variable, problem.speeds):
                at_most(row, value)
    sums = [_row({(kind, home): 1.0 for home in HOMES}) for kind in KINDS]
    objective = np.zeros(_NUM_VARIABLES)
    objective[_PREFILL], objective[_DECODE] = 1.0, problem.num_tokens - 1
    # Of placements that take the same time, that with most on the gpu, then on the cpu.
    for kind in KINDS:
        objective += _row({(kind, "cpu"): 1e-9, (kind, "disk"): 2e-9})
    integrality = np.zeros(_NUM_VARIABLES)
    integrality[[_IS_WEIGHT_AWAY, _IS_ACTIVATION_AWAY]] = 1
    solved = milp(
        objective,
        constraints=[
            LinearConstraint(np.array(rows), -np.inf, np.array(highest)),
            LinearConstraint(np.array(sums), 1.0, 1.0),
        ],
        integrality=integrality,
        bounds=_bounds(problem),
    )
    if solved.x is None:
        return None
    percent = problem.percent
    if percent is None:
        shares = [100 * float(share) for share in solved.x[:_NUM_SHARES]]
        percent = _round(shares, with_cpu="cpu" in problem.speeds)
    seconds = solved.x[_PREFILL] + (problem.num_tokens - 1) * solved.x[_DECODE]
    return Placement(percent, float(seconds))


def _row(values: dict[tuple[str, str], float]) -> Row:
    row = np.zeros(_NUM_VARIABLES)
    for (kind, home), value in values.items():
        row[KINDS.index(kind) * len(HOMES) + HOMES.index(home)] = value
    return row


def _bounds(problem: Problem) -> Bounds:
    low, high = np.zeros(_NUM_VARIABLES), np.ones(_NUM_VARIABLES)
    high[[_PREFILL, _DECODE]] = np.inf
    for home in ("cpu", "disk"):
        if home not in problem.speeds:
            high -= _row({(kind, home): 1.0 for kind in KINDS})
    if problem.percent is not None:
        for index, (gpu, cpu) in enumerate(
            zip(problem.percent[::2], problem.percent[1::2], strict=True)
        ):
            shares = np.array((gpu, cpu, 100 - gpu - cpu)) / 100
            fixed = slice(len(HOMES) * index, len(HOMES) * (index + 1))
            low[fixed] = high[fixed] = shares
    return Bounds(low, high)


def _memory_rows(problem: Problem) -> list[tuple[Row, float]]:
    """Bytes are in MiB here: solvers want numbers of like size."""
    parts = [_bytes_at(demand) for demand in problem.demands]
    host_homes = ("cpu",) if problem.limits.gpu is not None else ("cpu", "gpu")
    host = [part[home] for part in parts for home in host_homes]
    found = [_total(host, problem.limits.cpu)]
    found.append(_total([part["disk"] for part in parts], problem.limits.disk))
    if problem.limits.gpu is not None:
        found += [_total([part["gpu"]], problem.limits.gpu) for part in parts]
    return found


def _total(parts: Sequence[tuple[Row, float]], limit: int) -> tuple[Row, float]:
    row = np.sum([row for row, _ in parts], axis=0)
    return row, limit / 2**20 - sum(fixed for _, fixed in parts)


def _bytes_at(demand: Demand) -> dict[str, tuple[Row, float]]:
    """By home: MiB a variable, and MiB that are there anyway."""
    found = {}
    for home in HOMES:

        def at(sizes: HomeBytes, home: str = home) -> float:
            return float(getattr(sizes, home)) / 2**20

        row = _row(
            {
                ("weights", home): demand.weights / 2**20,
                ("cache", home): demand.cache / 2**20,
                ("activations", home): demand.activations / 2**20,
            }
        )
        for other, buffers in demand.cache_buffers.items():
            row += _row({("cache", other): at(buffers)})
        row[_IS_WEIGHT_AWAY] += at(demand.weight_buffers)
        row[_IS_ACTIVATION_AWAY] += at(demand.activation_buffers)
        found[home] = (row, at(demand.fixed))
    return found


def _time_rows(
    cost: PassCost, variable: int, speeds: dict[str, HomeSpeeds]
) -> list[tuple[Row, float]]:
    """Rows of `... - T <= -fixed`."""
    loads = [load for load in cost.loads if load.home in speeds]
    computing = _row({("weights", home): cost.loaded_computing for home in ("cpu", "disk")})
    computing[variable] = -1.0
    serial = np.zeros(_NUM_VARIABLES)
    for load in loads:
        speed = speeds[load.home]
        row = _row({(load.kind, load.home): load.seconds})
        if not cost.is_overlapped or load.kind in cost.serial_kinds:
            serial += row
        else:
            # While it loads, computing goes on at a lower speed.
            computing += row * (1 - speed.computing) / speed.loading
    found = [(computing + serial, -cost.computing)]
    for home, speed in speeds.items():
        row = sum(
            (_row({(load.kind, home): load.seconds}) for load in loads if load.home == home),
            np.zeros(_NUM_VARIABLES),
        )
        if row.any():
            row[variable] = -1.0
            found.append((row, -cost.computing * (1 - speed.loading) / max(speed.computing, 0.01)))
    return found


def _round(percent: list[float], *, with_cpu: bool) -> tuple[float, ...]:
    """To whole numbers: up on disk, down on the gpu, and what is between on the cpu."""
    rounded: list[float] = []
    for start in range(0, len(percent), len(HOMES)):
        gpu, _, disk = percent[start : start + len(HOMES)]
        whole_disk = min(100, int(np.ceil(disk - _TOLERANCE)))
        whole_gpu = 100 - whole_disk
        if with_cpu:
            whole_gpu = min(whole_gpu, int(np.floor(gpu + _TOLERANCE)))
        rounded += [float(whole_gpu), float(100 - whole_disk - whole_gpu)]
    return tuple(rounded)

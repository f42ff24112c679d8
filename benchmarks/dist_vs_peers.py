"""`flexbench dist` beside transformers, vLLM and CTranslate2 on CPUs: the same models and prompts.

The models have OPT's shapes and random weights; every system reads the same folders, has the same
number of threads, generates greedily and ends no prompt early. Systems take turns, point by point
and repeat by repeat, in another order each time; those that wait are frozen. Where they do not fit
into memory together, they take turns with loading, too. Before a point is timed, it is done once,
unless its first token alone takes 20 s or more; when the machine was busy with something else
meanwhile, it is timed again, up to three times, and the try with the least of that counts.

Timed is the whole call, from token ids to token ids. "first" is a call for one token, which is the
prefill; what the whole call takes longer is the decoding. The ratio at the end is the median, over
the repeats, of flexbench's tokens/s by those of the best peer in the same precision; int8 is shown
beside. In float32, how many tokens are those that transformers chose is told as well.

The last lines say what bounds it. A roofline is the time with memory read and matrices multiplied
at the highest speeds that were seen on this machine right before and after the turn, and nothing
else to do. Shown is its share of what flexbench and the best peer took, and the ratio to that peer
that a program without any loss would have had in the peer's minutes. (A share can be above 100 %:
on a shared host, memory may be faster within a turn than around it.)

Peers are installed into environments of their own where they are missing; models are written once.

    .venv/bin/python benchmarks/dist_vs_peers.py
    .venv/bin/python benchmarks/dist_vs_peers.py --models opt-125m --dtypes bfloat16 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.dist_peers import (
    DEFAULT_ENVIRONMENTS,
    FLEXBENCH,
    SYSTEMS,
    TRANSFORMERS,
    SystemFailedError,
    find_python,
    model_folder,
)
from benchmarks.dist_turns import Group, Point, Turns, Visit, tell

if TYPE_CHECKING:
    from benchmarks.dist_bounds import Bounds, Floor

MODELS = ("opt-125m", "opt-1.3b")
DTYPES = ("float32", "bfloat16")
POINTS = ("1x128+32", "4x128+32", "16x128+32", "64x128+32", "4x512+32")
GOAL = 1.3

Floors = dict[Visit, "Floor"]
"""What each visit would have taken at the ceilings around it; of systems that are compared."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Flexbench at one point, beside the peer that was best there."""

    best_peer: str
    ratio: float
    """Of tokens/s: the median over the repeats."""


# --- what follows from the visits ---


def median_rate(visits: Sequence[Visit]) -> float:
    """Tokens/s of the median call."""
    return statistics.median(visit.tokens_per_s for visit in visits)


def best_peer(visits: Sequence[Visit]) -> list[Visit]:
    """Those of the best peer, among visits at one point in one precision.

    Empty: no peer was there.
    """
    peers: dict[str, list[Visit]] = {}
    for visit in visits:
        if SYSTEMS[visit.system].is_compared and visit.system != FLEXBENCH:
            peers.setdefault(visit.system, []).append(visit)
    return max(peers.values(), key=median_rate, default=[])


def compare(visits: Sequence[Visit]) -> Comparison | None:
    """Flexbench against the best peer, among visits at one point in one precision.

    None: one of the two is missing.
    """
    mine = {visit.repeat: visit for visit in visits if visit.system == FLEXBENCH}
    best = best_peer(visits)
    ratios = [
        mine[peer.repeat].tokens_per_s / peer.tokens_per_s for peer in best if peer.repeat in mine
    ]
    if not ratios:
        return None
    return Comparison(best_peer=best[0].system, ratio=statistics.median(ratios))


# --- the whole ---


def find_groups(args: argparse.Namespace) -> Iterator[Group]:
    """Every model in every precision, one after the other; folders and environments are made."""
    pythons: dict[str, Path] = {}
    for name in args.systems:
        try:
            pythons[name] = find_python(SYSTEMS[name], args.environments, sys.executable)
        except SystemFailedError as error:
            tell(f"{name} is left out: {error}")
    maker = find_python(SYSTEMS[TRANSFORMERS], args.environments, sys.executable)
    for model in args.models:
        for dtype in args.dtypes:
            folder, config = model_folder(model, dtype, args.folder, maker)
            systems = [
                SYSTEMS[name]
                for name in pythons
                # What has a precision of its own comes once for each model.
                if SYSTEMS[name].is_compared or dtype == args.dtypes[-1]
            ]
            yield Group(
                folder=folder,
                config=config,
                points=args.points,
                systems=systems,
                pythons=pythons,
                num_threads=args.threads,
            )


def find_floors(turns: Turns, group: Group, bounds: Bounds) -> Floors:
    """Of the visits in the precision of the group; one that nothing was measured after has none."""
    from benchmarks.dist_bounds import floor_of

    folder = group.folder
    return {
        visit: floor_of(
            visit.point,
            str(folder.path),
            visit.dtype,
            bounds.around(visit.began_at, visit.ended_at),
        )
        for visit in turns.visits
        if visit.dtype == folder.dtype and bounds.last_began_at >= visit.ended_at
    }


# --- what is shown ---


def show(
    visits: Sequence[Visit], versions: dict[str, dict[str, str]], floors: Floors, args: Any
) -> None:
    """A table a model: tokens/s at every point, and what they consist of."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    for model in args.models:
        of_model = [visit for visit in visits if visit.model == model]
        table = Table(
            title=f"{model}, {args.threads} threads: tokens/s (s to the first, s a token)"
        )
        table.add_column("system")
        for point in args.points:
            table.add_column(str(point), justify="right")
        for dtype in dict.fromkeys(visit.dtype for visit in of_model):
            for row in _rows(of_model, dtype, versions, args.points):
                table.add_row(*row)
            for row in _floor_rows(of_model, dtype, floors, args.points):
                table.add_row(*row)
            table.add_section()
        console.print(table)
        others = max((visit.others for visit in of_model), default=0.0)
        console.print(f"of the machine's CPU time, others had at most {others:.0%}")


def _rows(
    visits: Sequence[Visit],
    dtype: str,
    versions: dict[str, dict[str, str]],
    points: Sequence[Point],
) -> Iterator[list[str]]:
    here = [visit for visit in visits if visit.dtype == dtype]
    for name in dict.fromkeys(visit.system for visit in here):
        version = next(iter(versions[name].values()))
        yield [f"{name} {version} {dtype}", *(_cell(_of(here, name, point)) for point in points)]
    comparisons = [compare([v for v in here if v.point == point]) for point in points]
    if not any(comparisons):
        return
    yield [
        f"flexbench / best peer (goal {GOAL})",
        *(f"{c.ratio:.2f} {c.best_peer}" if c else "-" for c in comparisons),
    ]
    if dtype == "float32":
        shares = [_of(here, FLEXBENCH, point) for point in points]
        told = [
            f"{s[0].same_tokens:.1%}" if s and s[0].same_tokens is not None else "-" for s in shares
        ]
        yield ["tokens the same as transformers'", *told]


def _floor_rows(
    visits: Sequence[Visit], dtype: str, floors: Floors, points: Sequence[Point]
) -> Iterator[list[str]]:
    """How near each point came to its roofline, and how far that is from the best peer."""
    here = [visit for visit in visits if visit.dtype == dtype and visit in floors]
    if not here:
        return
    best = [best_peer([visit for visit in here if visit.point == point]) for point in points]
    mine = [_of(here, FLEXBENCH, point) for point in points]
    yield ["flexbench, of the roofline", *(_share_cell(each, floors) for each in mine)]
    yield ["best peer, of the roofline", *(_share_cell(each, floors) for each in best)]
    told = [f"{most_ratio(each, floors):.2f}" if each else "-" for each in best]
    yield ["the roofline / best peer", *told]


def _share_cell(visits: Sequence[Visit], floors: Floors) -> str:
    """Of the whole; in parentheses of the first tokens and of the later ones."""
    if not visits:
        return "-"
    pairs = [(visit, floors[visit]) for visit in visits]
    whole = statistics.median(floor.total_s / visit.total_s for visit, floor in pairs)
    first = statistics.median(floor.first_s / visit.first_s for visit, floor in pairs)
    step = statistics.median(floor.step_s / visit.step_s for visit, floor in pairs)
    return f"{whole:.0%} ({first:.0%}, {step:.0%})"


def most_ratio(visits: Sequence[Visit], floors: Floors) -> float:
    """Times as many tokens/s as these visits had, for a program without any loss: the median."""
    return statistics.median(visit.total_s / floors[visit].total_s for visit in visits)


def _of(visits: Sequence[Visit], system: str, point: Point) -> list[Visit]:
    return [visit for visit in visits if (visit.system, visit.point) == (system, point)]


def _cell(visits: Sequence[Visit]) -> str:
    if not visits:
        return "-"
    first_s = statistics.median(visit.first_s for visit in visits)
    step_s = statistics.median(visit.step_s for visit in visits)
    return f"{median_rate(visits):,.1f} ({first_s:.3f}, {step_s:.4f})"


def to_json(
    visits: Sequence[Visit], versions: dict[str, dict[str, str]], floors: Floors, args: Any
) -> dict[str, Any]:
    """Versions, the machine, and every visit with its roofline."""
    return {
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {
            "cpu": cpu_name(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
            "load_average": os.getloadavg(),
        },
        "num_threads": args.threads,
        "visits": [
            asdict(visit)
            | {"point": str(visit.point), "tokens_per_s": visit.tokens_per_s}
            | _floor_fields(floors.get(visit))
            for visit in visits
        ],
    }


def _floor_fields(floor: Floor | None) -> dict[str, float]:
    """In seconds; none of a system that has a precision of its own."""
    if floor is None:
        return {}
    return {"floor_first_s": floor.first_s, "floor_decode_s": floor.decode_s}


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--points",
        nargs="+",
        type=Point.parse,
        metavar="BATCHxPROMPT+NEW",
        default=[Point.parse(text) for text in POINTS],
        help=f"default: {' '.join(POINTS)}",
    )
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--environments", type=Path, default=DEFAULT_ENVIRONMENTS)
    parser.add_argument(
        "--folder", type=Path, help="where the models are kept; default: in the environments"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every single figure goes")
    return parser


def main() -> None:
    """Measure, and print."""
    # It needs torch, of which the rest of this file does without.
    from benchmarks.dist_bounds import Bounds

    args = make_parser().parse_args()
    args.environments = args.environments.expanduser().absolute()
    args.folder = (args.folder or args.environments / "models").expanduser().absolute()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    visits: list[Visit] = []
    versions: dict[str, dict[str, str]] = {}
    floors: Floors = {}
    with tempfile.TemporaryDirectory(prefix="fb-") as logs:
        try:
            for group in find_groups(args):
                bounds = Bounds(group.folder.dtype, group.num_threads)
                turns = Turns(group, Path(logs), on_pause=bounds.measure)
                try:
                    turns.take(args.repeats)
                finally:  # the whole takes long: one that is interrupted keeps what it has
                    visits += turns.visits
                    floors |= find_floors(turns, group, bounds)
                    versions |= turns.versions
                    if args.json is not None:
                        found = to_json(visits, versions, floors, args)
                        args.json.write_text(json.dumps(found, indent=1) + "\n")
        finally:
            show(visits, versions, floors, args)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Workers are ended on the way, and what was measured is shown."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()

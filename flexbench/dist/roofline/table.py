"""The roofline as a table for a terminal of 80 columns, and the ceilings under it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.lines import HIDDEN, Line, StageRoofline

_NAMES = {HIDDEN: "acts"}


def roofline_table(stages: Sequence[StageRoofline]) -> Table:
    """Work, floor and time of each kind of work, stage by stage."""
    table = Table(title="Roofline", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in ("stage", "what", "GFLOP", "GB", "floor s", "took s", "of roofline", "bound by"):
        is_text = heading in ("what", "bound by")
        table.add_column(heading, justify="left" if is_text else "right")
    for stage in stages:
        for index, line in enumerate(stage.lines):
            table.add_row(
                str(stage.rank) if index == 0 else "",
                _NAMES.get(line.what, line.what.replace("_", " ")),
                _digits(line.flops / 1e9) if line.flops else "-",
                _digits(line.num_bytes / 1e9) if line.num_bytes else "-",
                _digits(line.floor_s),
                _digits(line.measured_s),
                _percent(line),
                line.bound_by,
            )
        table.add_section()
    return table


def _percent(line: Line) -> str:
    return "-" if line.fraction is None else f"{line.fraction:.1%}"


def _digits(value: float) -> str:
    """Three digits that say something, up to seven places."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"


def ceilings_text(stages: Sequence[StageRoofline]) -> str:
    """The ceilings, a line for each stage; one where there is one stage."""
    several = len(stages) > 1
    return "\n".join(
        f"{f'Ceilings of stage {stage.rank}' if several else 'Ceilings'}: "
        f"{_text(stage.ceilings, stage.disk_access)}"
        for stage in stages
    )


def _text(ceilings: Ceilings, disk_access: str | None) -> str:
    parts = [
        f"memory {_per_s(ceilings.memory_bytes_per_s)}",
        f"{ceilings.dtype} products {_rate(ceilings.matmul_flops_per_s, 'FLOP/s')}",
    ]
    if ceilings.device == "cpu":
        parts.append(f"copies {_per_s(ceilings.host_to_device_bytes_per_s)}")
    else:
        parts.append(
            f"to the GPU {_per_s(ceilings.host_to_device_bytes_per_s)}, "
            f"back {_per_s(ceilings.device_to_host_bytes_per_s)}"
        )
    if ceilings.disk_read_bytes_per_s is not None and ceilings.disk_write_bytes_per_s is not None:
        access = "" if disk_access is None else f" ({disk_access})"
        parts.append(
            f"disk{access} reads {_per_s(ceilings.disk_read_bytes_per_s)}, "
            f"writes {_per_s(ceilings.disk_write_bytes_per_s)}"
        )
    threads = "1 thread" if ceilings.num_threads == 1 else f"{ceilings.num_threads} threads"
    return f"{'; '.join(parts)}; {threads}; the best of tries before and after the run"


def _per_s(bytes_per_s: float) -> str:
    return _rate(bytes_per_s, "B/s")


def _rate(value: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{_digits(value / scale)} {prefix}{unit}"

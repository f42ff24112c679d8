"""Estimates as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexbench.server_config.formats import (
    PUBLIC_SWARM_NOTE,
    Answer,
    common_warnings,
    joins_public_swarm,
)
from flexbench.server_config.sections import Section, sections_of, sweep_section, title_of

# From here on, columns have to stand close to each other in a terminal of 80.
_WIDE = 5


def print_answers(console: Console, answers: Sequence[Answer]) -> None:
    """One estimate in full, or a sweep as one table."""
    if len(answers) > 1:
        print_sections(console, [sweep_section([answer.estimate for answer in answers])])
        _print_warnings(console, answers)
        console.print("One of them in full: --gpu-memory SIZE", style="dim", highlight=False)
        return
    answer = answers[0]
    console.print(Text(title_of(answer.estimate), style="bold"))
    print_sections(console, sections_of(answer.estimate), with_titles=False)
    _print_warnings(console, answers)
    if answer.command:
        console.print("\nThe server:", highlight=False)
        # On one line, so that it can be copied.
        console.print(Text(answer.command), soft_wrap=True)
        if joins_public_swarm(answer.command):
            console.print(Text(PUBLIC_SWARM_NOTE, style="dim"))


def _print_warnings(console: Console, answers: Sequence[Answer]) -> None:
    for warning in common_warnings(answers):
        console.print(Text(f"! {warning}", style="yellow"))


def print_sections(
    console: Console, sections: Sequence[Section], *, with_titles: bool = True
) -> None:
    """Tables below each other, each with its note."""
    for section in sections:
        if with_titles:
            console.print(Text(section.title, style="bold"))
        console.print(section_table(section))
        if section.note:
            console.print(Text(section.note, style="dim"))
        for line in section.lines:
            console.print(Text(line), soft_wrap=True)


def section_table(section: Section) -> Table:
    """A section as a table: the first column to the left, figures to the right."""
    is_wide = len(section.headers) > _WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if is_wide else 1), pad_edge=False)
    for number, header in enumerate(section.headers):
        is_right = number > 0 and not section.is_list
        table.add_column(header, justify="right" if is_right else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table

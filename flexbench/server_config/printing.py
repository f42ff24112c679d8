"""Answers and findings on standard output, in the format that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from flexbench.server_config.formats import (
    Answer,
    Format,
    markdown_of_sections,
    to_json,
    to_markdown,
)

if TYPE_CHECKING:
    from flexbench.server_config.live import Finding


def print_answers(output_format: Format, answers: Sequence[Answer]) -> None:
    """Estimates: one in full, several as a sweep."""
    if output_format is Format.JSON:
        typer.echo(to_json(answers))
    elif output_format is Format.MARKDOWN:
        typer.echo(to_markdown(answers))
    else:
        from rich.console import Console

        from flexbench.server_config import tables

        tables.print_answers(Console(), answers)


class FindingPrinter:
    """Shows what is found in a swarm, as soon as it is found.

    In JSON, the first line is the configuration with the swarm in it, and a launched server adds a
    second one.
    """

    def __init__(self, output_format: Format) -> None:
        self._format = output_format
        self._swarm: Mapping[str, Any] = {}

    def show(self, finding: Finding) -> None:
        """Print `finding`."""
        if self._format is Format.JSON:
            self._show_json(finding)
        elif finding.answer is not None:
            print_answers(self._format, [finding.answer])
        elif self._format is Format.MARKDOWN:
            typer.echo(markdown_of_sections(finding.sections) + "\n")
        else:
            from rich.console import Console

            from flexbench.server_config.tables import print_sections

            print_sections(Console(), finding.sections)

    def _show_json(self, finding: Finding) -> None:
        if finding.name == "swarm":
            self._swarm = finding.record
            return
        record = dict(finding.record)
        if finding.answer is not None:
            record["swarm"] = self._swarm
        typer.echo(json.dumps(record, allow_nan=False))

"""How far a command has come, for the person in front of it.

On a terminal a live bar, elsewhere one plain line a phase, and nothing when asked to be quiet. All
of it goes to standard error: standard output is for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from flexbench.core.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID
    from rich.text import Text


# Where a line is all there is, how often one is worth it.
_TELL_EVERY_S = 10.0


class Progress(Protocol):
    """Where a command tells what it is doing."""

    @contextmanager
    def phase(self, description: str, total: int) -> Iterator[Phase]:
        """A phase that takes `total` steps; leaving the block ends it."""

    def note(self, text: str) -> None:
        """Something worth keeping on the screen."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the screen to somebody else while the block runs."""


class Phase(Protocol):
    """A phase in progress."""

    def advance(self) -> None:
        """One step is done."""

    def show(self, text: str, completed: float) -> None:
        """So many steps are done; `text` says how it goes right now, in a line."""


class Silence:
    """Says nothing; it is both a Progress and a Phase."""

    @contextmanager
    def phase(self, description: str, total: int) -> Iterator[Phase]:  # noqa: ARG002
        """A phase of which nobody hears."""
        yield self

    def note(self, text: str) -> None:
        """Ignore `text`."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Go on saying nothing."""
        yield

    def advance(self) -> None:
        """Ignore the step."""

    def show(self, text: str, completed: float) -> None:
        """Ignore how it goes."""


class PlainProgress:
    """A line when a phase begins, and one when it ends: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, description: str, total: int) -> Iterator[Phase]:
        """Print the phase's begin, now and then how far it is, and its end with its time."""
        started_at = time.monotonic()
        self.note(f"{description} ...")
        yield _PlainPhase(self.note, description, total)
        self.note(f"{description}: done in {format_seconds(time.monotonic() - started_at)}")

    def note(self, text: str) -> None:
        """Print `text` as one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """There is nothing on the screen that could be in the way."""
        yield


class _PlainPhase:
    def __init__(self, note: Callable[[str], None], description: str, total: int) -> None:
        self._note = note
        self._description = description
        self._total = total
        self._done = 0
        self._told_at = time.monotonic()

    def advance(self) -> None:
        self._done += 1
        if time.monotonic() - self._told_at >= _TELL_EVERY_S and self._done < self._total:
            self._told_at = time.monotonic()
            self._note(f"{self._description}: {self._done} of {self._total}")

    def show(self, text: str, completed: float) -> None:  # noqa: ARG002
        if time.monotonic() - self._told_at >= _TELL_EVERY_S:
            self._told_at = time.monotonic()
            self._note(f"{self._description}: {text}")


class LiveProgress:
    """A bar that is replaced from phase to phase, with the notes above it."""

    def __init__(self, bar: RichBar, line: Text) -> None:
        """`line` is shown below the bar."""
        self._bar = bar
        self._line = line

    @contextmanager
    def phase(self, description: str, total: int) -> Iterator[Phase]:
        """Show a bar with `total` steps until the block is left."""
        task = self._bar.add_task(description, total=total)
        try:
            yield _LivePhase(self._bar, task, self._line)
        finally:
            self._bar.remove_task(task)
            self._line.plain = ""

    def note(self, text: str) -> None:
        """Print `text` above the bar."""
        # Not broken into lines: an address in it is there to be copied.
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Take the bar away while something else is printed."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()


class _LivePhase:
    def __init__(self, bar: RichBar, task: TaskID, line: Text) -> None:
        self._bar = bar
        self._task = task
        self._line = line

    def advance(self) -> None:
        self._bar.advance(self._task)

    def show(self, text: str, completed: float) -> None:
        self._line.plain = text
        self._bar.update(self._task, completed=completed)


def progress_console() -> Console:
    """A console on standard error that falls silent when nobody reads it any more.

    Rich's own would then take standard output away, too, where the results go.
    """
    from rich.console import Console

    class StandardError(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True

    return StandardError(stderr=True)


@contextmanager
def show_progress(console: Console, *, quiet: bool) -> Iterator[Progress]:
    """The Progress that suits `console`, a console on standard error."""
    if quiet:
        yield Silence()
    elif not console.is_terminal:
        yield PlainProgress(console)
    else:
        from rich.console import RenderableType
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.text import Text

        line = Text(no_wrap=True, overflow="ellipsis")

        class BarAndLine(Progress):
            def get_renderables(self) -> Iterator[RenderableType]:
                yield from super().get_renderables()
                if line.plain:
                    yield line

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with BarAndLine(*columns, console=console, transient=True, refresh_per_second=5) as bar:
            yield LiveProgress(bar, line)

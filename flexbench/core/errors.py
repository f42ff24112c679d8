"""Every error that flexbench shows to a person.

FlexbenchError                exit code 1
├── ConfigError               2   an option, or a combination of options, that cannot work
├── InputFileError            2   a file that cannot be read, or not as what it should be
├── MissingDependencyError    2   an optional package that this command needs
├── RunError                  1   a run that started and failed
│   ├── WorkerError           1   a process of ours failed, or was killed
│   └── DeadlineError         1   something took longer than it may
├── RegressionFoundError      3   a figure is worse than the baseline's, beyond what is accepted
└── Interrupted               128 + signal number: 130 for Ctrl-C, 143 for SIGTERM

Errors of other libraries are translated where they come in. `flexbench.cli` is the only place that
turns an error into an exit code.
"""

from __future__ import annotations

import signal
from pathlib import Path


class FlexbenchError(Exception):
    """What went wrong, where, and what to do, in words for the person who typed the command.

    `details` is shown below the message: the last lines of a log, say.
    """

    exit_code = 1

    def __init__(self, message: str, *, details: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.is_shown = False
        """Whether the person has already been told."""

    def add_details(self, text: str) -> None:
        """Add lines to what is shown below the message."""
        self.details = f"{self.details}\n{text}" if self.details else text


class ConfigError(FlexbenchError):
    """An option's value, or a combination of options, that cannot work; says what is accepted."""

    exit_code = 2

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option
        self.problem = problem


class InputFileError(FlexbenchError):
    """A file that cannot be read as what it should be. `line` counts from 1."""

    exit_code = 2

    def __init__(self, path: Path | str, problem: str, *, line: int | None = None) -> None:
        where = f"{path}:{line}" if line is not None else f"{path}"
        super().__init__(f"{where}: {problem}")
        self.path = path
        self.line = line
        self.problem = problem


class MissingDependencyError(FlexbenchError):
    """An optional package is not installed; the message names the command that installs it."""

    exit_code = 2


class RunError(FlexbenchError):
    """A run was started and did not come to its end."""


class WorkerError(RunError):
    """A process that belongs to the run raised an error, or died. `worker` is its name."""

    def __init__(self, worker: str, problem: str, *, details: str | None = None) -> None:
        super().__init__(f"{worker} {problem}", details=details)
        self.worker = worker
        self.problem = problem


class DeadlineError(RunError):
    """Something took longer than its time-out."""


class RegressionFoundError(FlexbenchError):
    """A comparison came to its end, and found a change for the worse."""

    exit_code = 3


class Interrupted(FlexbenchError):  # noqa: N818 - it is no error of anybody
    """The person, or the system, asked flexbench to stop."""

    def __init__(self, signal_number: int) -> None:
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        super().__init__(f"Stopped by {name}.")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

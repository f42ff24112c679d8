"""A crew whose processes run Petals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexbench.core.folders import work_folders
from flexbench.core.processes import Crew
from flexbench.core.signals import SignalWatch


@contextmanager
def open_crew(log_folder: Path | None = None) -> Iterator[Crew]:
    """A crew for peers and clients, with its folders; all is gone when the block is left.

    The logs stay if a run failed, or if they have a `log_folder` of their own.
    """
    with (
        SignalWatch() as signals,
        work_folders(log_folder) as folders,
        Crew(
            log_folder=folders.logs,
            scratch_folder=folders.scratch,
            signals=signals,
            preload=["flexbench.petals_runtime.preload"],
        ) as crew,
    ):
        yield crew

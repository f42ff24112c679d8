"""Folders for what a command's processes write beside its results."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flexbench.core.errors import ConfigError, RunError

# The path of a Unix socket has at most 107 characters, and ours, down in there, need about 60.
_MAX_TEMPORARY_FOLDER_LENGTH = 45


@dataclass(frozen=True, kw_only=True)
class WorkFolders:
    """Where the processes of a command put their logs, and what is worth nothing afterwards."""

    logs: Path
    scratch: Path


@contextmanager
def work_folders(log_folder: Path | None = None) -> Iterator[WorkFolders]:
    """Two temporary folders, removed at the end; the logs stay if a run failed.

    Logs go to `log_folder`, and stay in any case, when the person named one. Raises ConfigError
    when that cannot be made.
    """
    if log_folder is not None:
        _make_log_folder(log_folder)
    base = Path(tempfile.mkdtemp(prefix="flexbench-", dir=temporary_folder()))
    folders = WorkFolders(logs=log_folder or base / "logs", scratch=base / "tmp")
    keep_logs = False
    try:
        folders.logs.mkdir(exist_ok=True)
        folders.scratch.mkdir()
        yield folders
    except RunError as error:
        keep_logs = log_folder is not None or _have_text(folders.logs)
        if keep_logs:
            error.add_details(f"All logs: {folders.logs}")
        raise
    finally:
        shutil.rmtree(folders.scratch, ignore_errors=True)
        if log_folder is not None or not keep_logs:
            shutil.rmtree(base, ignore_errors=True)


def _have_text(logs: Path) -> bool:
    """Whether there is anything in the logs, so that it is worth leaving them behind."""
    return any(path.stat().st_size > 0 for path in logs.iterdir() if path.is_file())


def _make_log_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ConfigError(
            "--log-dir", f"cannot write to {folder}: {error.strerror or error}"
        ) from error


def local_path(text: str) -> Path | None:
    """The file or folder that `text` names, or None: it may be something else, a model's name."""
    path = Path(os.path.expanduser(text))  # unlike Path's own, it leaves what it does not know
    try:
        return path if path.exists() else None
    except OSError:
        return None  # too long for a path, or in a folder that cannot be read


def temporary_folder() -> str:
    """The system's folder for temporary files, or /tmp if its path is too long for Unix sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _MAX_TEMPORARY_FOLDER_LENGTH else "/tmp"  # noqa: S108

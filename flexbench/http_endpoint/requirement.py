"""What HTTP needs that is not installed with flexbench itself."""

from __future__ import annotations

from flexbench.core.errors import MissingDependencyError


def require_http() -> None:
    """Raise MissingDependencyError unless everything is there to send a request."""
    try:
        import httptools  # noqa: F401
        import orjson  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"flexbench serving needs {error.name}, which is not installed: "
            "pip install 'flexbench[serving]'"
        ) from error

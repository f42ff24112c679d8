"""Which petals we run with, and how it is installed: the one place that says so.

Petals is installed without its dependencies, see the `petals` extra in pyproject.toml.
"""

from importlib.util import find_spec

from flexbench.core.errors import MissingDependencyError

PETALS = "petals==2.2.0.post1"

INSTALL_COMMAND = f"pip install '.[petals]' && pip install --no-deps {PETALS}"


def ensure_petals_installed() -> None:
    """Raise MissingDependencyError, with the command to type, unless petals can be imported."""
    missing = [name for name in ("petals", "hivemind", "torch") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"not installed: {', '.join(missing)}; in a checkout of flexbench, "
            f"install with ./scripts/setup, or: {INSTALL_COMMAND}"
        )

"""Runs a module of petals as its own command: python -m flexbench.petals_runtime MODULE ARGUMENTS.

`python -m petals.cli.run_server` fails beside the hivemind that can be installed today; this way it
runs, see `moved_names`.
"""

from __future__ import annotations

import os
import runpy
import sys

from flexbench.petals_runtime.moved_names import restore_moved_names


def main() -> None:
    """Run the module that the first argument names, with the other arguments."""
    if len(sys.argv) < 2 or not sys.argv[1].startswith("petals."):
        sys.exit("Usage: python -m flexbench.petals_runtime petals.cli.run_server ARGUMENTS...")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    restore_moved_names()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

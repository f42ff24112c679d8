"""Where flexbench is installed without its extras, what needs them is skipped, and says so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

_NEEDS = {
    "test_azureml.py": ("httptools", "orjson"),
    "test_config_files.py": ("yaml",),
    "test_fastgen_client.py": ("psutil", "orjson"),
    "test_openai_config.py": ("httptools", "orjson"),
    "test_vllm_client.py": ("httptools", "orjson", "psutil"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a module whose packages are not there."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for package in _NEEDS.get(item.path.name, ()):
                if find_spec(package) is None:
                    item.add_marker(pytest.mark.skip(reason=f"{package} is not installed"))

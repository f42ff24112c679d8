"""A real browser, without a window: Chromium, driven through its own driver.

A test is skipped where they are not there; scripts/test-browser installs them where it can.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.browsing import Browser

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_HOW = "./scripts/test-browser, or on Debian: apt-get install chromium chromium-driver"


def _program(variable: str, names: tuple[str, ...]) -> str:
    """Where a program is: as an environment variable says, else under one of its names."""
    named = os.environ.get(variable)
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed: {_HOW}; {variable} may name it")
    return found


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=f"selenium is missing: {_HOW}")
    chromium = _program("FLEXBENCH_CHROMIUM", _CHROMIUM)
    chromedriver = _program("FLEXBENCH_CHROMEDRIVER", ("chromedriver",))
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--window-size=1280,900",
        f"--user-data-dir={profile}",
        "--disable-dev-shm-usage",  # where /dev/shm is small, as in a container
        "--disable-gpu",
        "--force-prefers-reduced-motion",
        "--no-first-run",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own does not work for root
    service = webdriver.ChromeService(executable_path=chromedriver)
    started = webdriver.Chrome(options=options, service=service)
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture
def browser(driver: Any, tmp_path: Path) -> Iterator[Browser]:
    """The browser as a person has it who has just opened it; the console must stay empty."""
    found = Browser(driver, tmp_path)
    found.reset()
    yield found
    assert found.console() == []

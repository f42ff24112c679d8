"""What a person does in a browser, and what they then see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexbench.report.page.page import PageContent

PHONE_WIDTH = 360
_PATIENCE_S = 20


class Browser:
    """One window."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self._path = folder / "report <b>&.html"

    def reset(self) -> None:
        """A light desktop with JavaScript, nothing open, logs empty."""
        self.driver.get("about:blank")
        self.emulate("Emulation.clearDeviceMetricsOverride")
        self.emulate("Emulation.setScriptExecutionDisabled", value=False)
        self.set_scheme("light")
        self.console()
        self.requests()

    def emulate(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def set_scheme(self, scheme: str) -> None:
        """light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.emulate("Emulation.setEmulatedMedia", media="screen", features=[feature])

    def set_phone(self) -> None:
        """A narrow screen for fingers."""
        self.emulate(
            "Emulation.setDeviceMetricsOverride",
            width=PHONE_WIDTH,
            height=740,
            deviceScaleFactor=2,
            mobile=True,
        )

    def open(self, content: PageContent) -> None:
        """Open a report from disk."""
        from flexbench.report.page.page import to_page  # needs an extra, which may be missing

        self._path.write_text(to_page(content), encoding="utf-8")
        self.driver.get(self._path.as_uri())

    @property
    def address(self) -> str:
        """Of the file that is open."""
        return self._path.as_uri()

    def console(self) -> list[str]:
        """What was written to the console since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since they were last asked."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def ask(self, expression: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}", *arguments)

    def all(self, css: str) -> list[Any]:
        """The elements that a selector finds."""
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        """The only element that a selector finds."""
        (found,) = self.all(css)
        return found

    def texts(self, css: str) -> list[str]:
        """What elements show: nothing where they are hidden."""
        return [element.text for element in self.all(css)]

    def column(self, number: int, grid: str = "#table-1") -> list[str]:
        """The visible texts of a column; the first is 1, that of the buttons included."""
        return self.texts(f"{grid} tbody tr:not([hidden]):not(.opened) > td:nth-child({number})")

    def wait(self, is_so: Callable[[], Any]) -> Any:
        """Until something is so. Raises AssertionError if it does not become so."""
        end = time.monotonic() + _PATIENCE_S
        while not (found := is_so()):
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.05)
        return found

    def wait_for_charts(self) -> None:
        """Until every chart has been drawn."""
        figures = len(self.all("figure"))
        self.wait(lambda: len(self.all("figure .drawing svg")) == figures)

    def named(self) -> list[tuple[str, str]]:
        """Role and name of everything that assistive software sees."""
        nodes = self.emulate("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

"""The report's page in a real browser."""

from __future__ import annotations

import itertools
import json

import pytest

pytest.importorskip("jinja2", reason="the page needs the plots extra")
pytest.importorskip("vl_convert", reason="charts need the plots extra")
KEYS = pytest.importorskip(
    "selenium.webdriver.common.keys", reason="selenium is missing: ./scripts/test-browser"
).Keys

from flexbench.report.page.page import PageContent  # noqa: E402
from flexbench.report.table import Column, Kind, Row, Table  # noqa: E402
from tests.browser.browsing import PHONE_WIDTH, Browser  # noqa: E402
from tests.browser.contents import charts, report, run  # noqa: E402


def test_it_opens_from_disk_without_a_word_in_the_console_or_a_request(browser):
    browser.open(report(charts=charts()))
    browser.wait_for_charts()
    assert browser.requests() == [browser.address]
    assert browser.ask("performance.getEntriesByType('resource').length") == 0
    assert browser.driver.title == "Report on 7 runs"
    # That the console is empty is looked at after every test.


def test_the_answer_comes_first(browser):
    browser.open(report())
    top = {
        css: browser.one(css).rect["y"]
        for css in ("h1", "#summary .lead", "#table-1", "#runs", "#notes", "#definitions")
    }
    assert list(top.values()) == sorted(top.values())
    assert top["#summary .lead"] < 300
    assert "✗" in browser.one(".verdict").text


def test_details_can_be_copied_as_json(browser):
    browser.open(report())
    browser.one("#run-4 > summary").click()
    button = browser.one("#run-4 .copy")
    browser.ask("void (navigator.clipboard.writeText = async (text) => { window.copied = text })")
    button.click()
    browser.wait(lambda: browser.one("#run-4 [role=status]").text == "Copied.")
    copied = json.loads(browser.ask("window.copied"))
    assert copied["configuration"]["load"] == {"concurrency": 4}


def test_an_address_with_a_run_opens_it(browser):
    browser.open(report())
    browser.driver.get(f"{browser.address}#run-5")
    assert browser.wait(lambda: browser.one("#run-5").get_attribute("open"))


@pytest.mark.parametrize("fragment", ["%", "%e0%a4", "run-", ""])
def test_an_address_that_names_nothing_stops_nothing(browser, fragment):
    browser.open(report(charts=charts()[:1]))
    browser.driver.get("about:blank")
    browser.driver.get(f"{browser.address}#{fragment}")
    browser.wait_for_charts()
    browser.driver.execute_script("location.hash = '#%ff'")
    browser.driver.execute_script("location.hash = '#run-5'")
    assert browser.wait(lambda: browser.one("#run-5").get_attribute("open"))


def test_a_keyboard_is_enough(browser):
    browser.open(report(charts=charts()[:1]))
    browser.wait_for_charts()
    body = browser.one("body")
    body.send_keys(KEYS.TAB)
    assert browser.ask("document.activeElement.className") == "skip"
    active = browser.driver.switch_to.active_element
    assert active.is_displayed()
    active.send_keys(KEYS.ENTER)
    assert browser.ask("document.activeElement.id") == "results"
    visited = []
    for _ in range(12):
        browser.driver.switch_to.active_element.send_keys(KEYS.TAB)
        active = browser.driver.switch_to.active_element
        visited.append(active.get_attribute("aria-label") or active.text or active.tag_name)
        outline = active.value_of_css_property("outline-style")
        assert outline != "none", f"{visited[-1]} does not show that it has the focus"
        if active.text == "prompt":
            active.send_keys(KEYS.ENTER, KEYS.ENTER)
        if (active.get_attribute("aria-label") or "").startswith("Show 1 run of dist, 16"):
            active.send_keys(KEYS.SPACE)
    assert visited[:6] == [
        "input",
        "Runs by configuration",
        "system",
        "prompt",
        "tok/s\nmean",
        "change",
    ]
    assert browser.column(3) == ["16", "8", "4", "2", "1"]
    assert "load.concurrency" in browser.one("#table-1 .opened").text


@pytest.mark.parametrize(
    "name",
    [
        "<script>window.__pwned = 1</script>",
        "</script><script>window.__pwned = 1</script>",
        '"><img src=x onerror="window.__pwned = 1">',
        "javascript:window.__pwned=1",
        "<svg onload='window.__pwned = 1'>",
        "\u202eevil\u2066",
    ],
)
def test_a_hostile_name_stays_text(browser, name):
    table = Table(
        name="runs",
        title=name,
        columns=[
            Column(name="model", heading=name, kind=Kind.TEXT, help=name),
            Column(name="x", heading="x"),
        ],
        rows=[Row(values={"model": name, "x": x}, run_ids=(1,)) for x in (1.0, 2.0)],
        caption=name,
        notes=[name],
    )
    browser.open(
        report(
            title=name,
            summary=[name],
            verdict=name,
            tables=[table],
            charts=charts(name),
            runs=[run(1, name, name)],
            notes=[name],
        )
    )
    browser.wait_for_charts()
    browser.one("#table-1-filter").send_keys("e")
    browser.all("#table-1 .toggle")[0].click()
    browser.all("#table-1 th button")[0].click()
    for summary in browser.all("summary"):
        browser.driver.execute_script("arguments[0].parentElement.open = true", summary)
    hover(browser, "figure .drawing svg")
    assert browser.ask("window.__pwned") is None
    assert browser.ask("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert (
        browser.ask("document.querySelectorAll('[onload], [onerror], a[href^=java]').length") == 0
    )
    assert browser.ask("document.querySelectorAll('script:not([type])').length") == 2
    shown = "�evil�" if name.startswith("\u202e") else name
    assert browser.one("h1").text == shown
    assert browser.driver.title == shown
    assert browser.column(2) == [shown, shown]
    assert any(shown in text for text in browser.ask(SVG_TEXTS))


SVG_TEXTS = "Array.from(document.querySelectorAll('figure svg text'), (text) => text.textContent)"


def hover(browser: Browser, css: str) -> None:
    """Move the pointer over marks, so that what they say is shown."""
    for place in browser.all(css):
        box = place.rect
        browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
        top = browser.ask("arguments[0].getBoundingClientRect().top", place)
        left = browser.ask("arguments[0].getBoundingClientRect().left", place)
        for part in range(1, 10):
            browser.emulate(
                "Input.dispatchMouseEvent",
                type="mouseMoved",
                x=left + box["width"] * part / 10,
                y=top + box["height"] * (10 - part) / 10,
            )


@pytest.mark.parametrize("number", range(1, 5))
def test_charts_are_drawn_with_marks_and_said_in_words(browser, number):
    browser.open(report(charts=charts()))
    browser.wait_for_charts()
    place = browser.one(f"#chart-{number} .picture")
    marks = place.find_elements("css selector", "svg [role='graphics-symbol'], svg .mark-line path")
    drawn = place.find_elements(
        "css selector", "svg g[class*='mark-'] path, svg g[class*='mark-'] rect"
    )
    assert len(drawn) + len(marks) > 3
    assert place.get_attribute("role") == "img"
    chart = charts()[number - 1]
    assert chart.description in place.get_attribute("aria-label")
    svg = place.find_element("css selector", "svg")
    assert svg.rect["height"] > 100
    assert 400 < svg.rect["width"] <= place.rect["width"]
    assert browser.all(f"#chart-{number} .failed:not([hidden])") == []


def test_a_mark_says_what_it_is_when_it_is_pointed_at(browser):
    browser.open(report(charts=charts("bloom")[:1]))
    browser.wait_for_charts()
    mark = browser.wait(lambda: browser.all("#chart-1 svg .mark-symbol path"))[0]
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    box = browser.ask("arguments[0].getBoundingClientRect().toJSON()", mark)
    for step in (2, 0):
        browser.emulate(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=box["x"] + box["width"] / 2 + step,
            y=box["y"] + box["height"] / 2,
        )
    tip = browser.one(".tip")
    assert browser.wait(lambda: tip.is_displayed() and "bloom" in tip.text)


def test_the_data_of_a_chart_are_a_table(browser):
    browser.open(report(charts=charts()))
    browser.one("#chart-1 > details > summary").click()
    rows = browser.texts("#chart-1-data tbody tr")
    assert len(rows) == 6
    assert rows[0].split() == ["petals", "petals", "1", "10", "9", "11"]


def everything() -> PageContent:
    return report(charts=charts())


def test_a_phone_scrolls_tables_but_never_the_page(browser):
    wide = Table(
        name="runs",
        title="Very many columns of " + "unbroken" * 20,
        columns=[Column(name=f"c{n}", heading=f"column {n}") for n in range(30)],
        rows=[Row(values={f"c{n}": 1234.5 * n for n in range(30)}, run_ids=(1,))] * 3,
        caption="x" * 300,
    )
    long = run(1, "model" * 60, "folder/" * 60)
    content = everything()
    browser.set_phone()
    browser.open(report(charts=charts("n" * 80), tables=[wide, *content.tables], runs=[long]))
    browser.wait_for_charts()
    browser.all("#table-1 .toggle")[0].click()
    for details in browser.all("details"):
        browser.driver.execute_script("arguments[0].open = true", details)
    assert browser.ask("innerWidth") == PHONE_WIDTH
    assert browser.ask("document.documentElement.scrollWidth") <= PHONE_WIDTH
    # Rows are cards, in which every value says what it is.
    cell = "document.querySelector('#table-1 tbody td:nth-child(3)')"
    assert browser.ask(f"getComputedStyle({cell}, '::before').content") == '"column 1"'
    assert all(one.is_displayed() for one in browser.all("#table-1 tbody td:nth-child(31)"))
    assert browser.one("#table-1 .opened .stay").rect["width"] <= PHONE_WIDTH


def test_a_phone_has_room_for_fingers(browser):
    browser.set_phone()
    browser.open(everything())
    browser.wait_for_charts()
    for details in browser.all("details"):
        browser.driver.execute_script("arguments[0].open = true", details)
    browser.all("#table-1 .toggle")[0].click()
    for target in browser.all("button, input, summary, nav a"):
        if target.is_displayed():
            box = target.rect
            assert box["height"] >= 44, f"{target.tag_name} {target.text!r}: {box}"
            assert box["width"] >= 44, f"{target.tag_name} {target.text!r}: {box}"


# Of every text that is seen: its contrast with what is painted behind it, as WCAG 2 computes it.
CONTRASTS = """(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const isPainted = (color) => color && color.startsWith("rgb") && (numbers(color)[3] ?? 1) > 0;
  const light = (color) => {
    const [r, g, b] = numbers(color).slice(0, 3).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const style = getComputedStyle(one);
      if (one.tagName === "svg") {
        const behind = one.querySelector(":scope > rect");
        if (behind && isPainted(getComputedStyle(behind).fill)) return getComputedStyle(behind).fill;
      }
      if (isPainted(style.backgroundColor)) return style.backgroundColor;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest("script, .unseen")) continue;
    const style = getComputedStyle(element);
    const color = element.closest("svg") ? style.fill : style.color;
    if (!color.startsWith("rgb")) continue;
    const [one, other] = [light(color), light(ground(element))].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), text.slice(0, 40), color, ground(element)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("is_good", [True, False, None])
def test_every_text_has_contrast(browser, scheme, is_good):
    browser.set_scheme(scheme)
    browser.open(report(charts=charts(), verdict="So it is.", is_verdict_good=is_good))
    browser.wait_for_charts()
    for details in browser.all("details"):
        browser.driver.execute_script("arguments[0].open = true", details)
    found = browser.ask(CONTRASTS)
    assert len(found) > 150
    assert [one for one in found if one[0] < 4.5] == []


def test_the_dark_comes_and_goes_while_the_page_is_open(browser):
    browser.open(everything())
    browser.wait_for_charts()

    def colours():
        return (
            browser.ask("getComputedStyle(document.documentElement).backgroundColor"),
            browser.ask("getComputedStyle(document.documentElement).color"),
            browser.ask("getComputedStyle(document.querySelector('#chart-1 svg text')).fill"),
        )

    light = colours()
    browser.set_scheme("dark")
    browser.wait(lambda: browser.all("html.dark-charts"))
    browser.wait_for_charts()
    assert browser.wait(lambda: all(a != b for a, b in zip(light, colours(), strict=True)))
    browser.set_scheme("light")
    browser.wait(lambda: colours() == light)


def test_without_javascript_everything_can_be_read(browser):
    browser.emulate("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(everything())
    assert browser.column(4)[:2] == ["22.5", "★104\n, best"]
    assert not any(e.is_displayed() for e in browser.all("button, input, .drawing"))
    links = browser.texts("#table-1 td.runs a")
    assert links == ["run 1", "run 2", "run 3", "run 4", "run 5", "run 6"]
    browser.one("#run-4 > summary").click()
    assert "load.concurrency\n4" in browser.one("#run-4").text
    assert "which is off" in browser.one("#chart-1").text
    browser.one("#chart-1 > details > summary").click()
    assert len(browser.all("#chart-1-data tbody tr")) == 6


def test_assistive_software_finds_a_name_for_everything(browser):
    browser.open(everything())
    browser.wait_for_charts()
    for details in browser.all("details"):
        browser.driver.execute_script("arguments[0].open = true", details)
    found = browser.named()
    roles = {role for role, _ in found}
    wanted = {"button", "searchbox", "image", "table", "link", "region", "columnheader"}
    assert wanted <= roles
    assert [(role, name) for role, name in found if role in wanted and not name] == []
    assert browser.ask("document.documentElement.lang") == "en"
    levels = [int(element.tag_name[1]) for element in browser.all("h1, h2, h3, h4, h5, h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))

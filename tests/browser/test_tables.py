"""The tables of the report's page in a real browser: sorting, filtering, opening rows."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2", reason="the page needs the plots extra")

from flexbench.report.table import Column, Kind, Row, Table
from tests.browser.browsing import Browser
from tests.browser.contents import report, run


def heading(browser: Browser, name: str):
    (button,) = [b for b in browser.all("#table-1 th button") if b.text.split() == name.split()]
    return button


def test_a_column_of_numbers_is_sorted_by_value(browser):
    browser.open(report())
    assert browser.column(4) == ["22.5", "★104\n, best", "-", "9.5", "9.25"]
    button = heading(browser, "tok/s mean")
    states = []
    for _ in range(3):
        button.click()
        cell = button.find_element("xpath", "..")
        values = [text.strip("★\n, best") for text in browser.column(4)]
        states.append((cell.get_attribute("aria-sort"), values))
    assert states == [
        ("ascending", ["9.25", "9.5", "22.5", "104", "-"]),
        ("descending", ["104", "22.5", "9.5", "9.25", "-"]),
        (None, ["22.5", "104", "-", "9.5", "9.25"]),
    ]


def test_only_the_column_that_decides_is_marked(browser):
    browser.open(report())
    heading(browser, "prompt").click()
    heading(browser, "system").click()
    marked = browser.all("#table-1 th[aria-sort]")
    assert [cell.text for cell in marked] == ["system"]
    # Where texts are the same, the order of the file decides.
    assert browser.column(3) == ["2", "16", "1", "8", "4"]


def test_the_filter_wants_every_word_in_any_cell(browser):
    browser.open(report())
    field = browser.one("#table-1-filter")
    counted = browser.one("#table-1 .counted")
    assert counted.text == "5 rows"
    field.send_keys("PETALS")
    browser.wait(lambda: counted.text == "2 of 5 rows")
    assert browser.column(3) == ["1", "8"]
    field.send_keys("  22")
    browser.wait(lambda: counted.text == "1 of 5 rows")
    field.send_keys(" nowhere")
    browser.wait(lambda: counted.text == "0 of 5 rows")
    assert browser.column(3) == []
    field.clear()
    field.send_keys(" ")
    browser.wait(lambda: counted.text == "5 rows")
    assert counted.get_attribute("role") == "status"


def test_no_word_reaches_over_two_cells(browser):
    browser.open(report())
    browser.one("#table-1-filter").send_keys("petals1")
    assert browser.wait(lambda: browser.one("#table-1 .counted").text == "0 of 5 rows")


def test_a_row_opens_to_its_runs(browser):
    browser.open(report())
    toggle = browser.all("#table-1 .toggle")[1]
    assert toggle.get_attribute("aria-label") == "Show 1 run of dist, 2, 104"
    assert toggle.get_attribute("aria-expanded") == "false"
    toggle.click()
    assert toggle.get_attribute("aria-expanded") == "true"
    opened = browser.one("#table-1 .opened")
    assert opened.get_attribute("id") == toggle.get_attribute("aria-controls")
    assert "load.concurrency\n3" in opened.text  # one run: its configuration can be seen at once
    assert "3.11.9" in opened.text
    toggle.click()
    assert browser.texts("#table-1 .opened") == [""]


def test_several_runs_of_a_row_are_listed(browser):
    browser.open(report())
    browser.all("#table-1 .toggle")[0].click()
    shown = browser.all("#table-1 .opened summary")
    assert [one.text.split()[0] for one in shown] == ["1", "2"]
    assert "load.concurrency" not in browser.one("#table-1 .opened").text
    shown[1].click()
    assert "load.concurrency\n2" in browser.one("#table-1 .opened").text


def test_what_is_open_moves_and_hides_with_its_row(browser):
    browser.open(report())
    browser.all("#table-1 .toggle")[3].click()  # 9.5 tokens/s
    heading(browser, "tok/s mean").click()
    rows = browser.all("#table-1 tbody tr")
    assert "opened" in rows[2].get_attribute("class")
    assert rows[1].find_elements("css selector", "td")[3].text == "9.5"
    browser.one("#table-1-filter").send_keys("dist")
    browser.wait(lambda: browser.one("#table-1 .counted").text == "2 of 5 rows")
    assert not browser.one("#table-1 .opened").is_displayed()


def test_a_run_that_is_not_on_the_page_is_told(browser):
    browser.open(report(runs=[run(1)]))
    browser.all("#table-1 .toggle")[1].click()
    assert "Run 3: its details are not on this page." in browser.one("#table-1 .opened").text


def wide(count: int, essential: int) -> Table:
    """Columns of 150 px or more, of which the first are never left out; the last one goes first."""
    columns = [
        Column(name=f"c{n}", heading=f"heading of column {n}", priority=0 if n < essential else n)
        for n in range(count)
    ]
    rows = [Row(values={f"c{n}": 1.0 * n for n in range(count)})] * 2
    return Table(name="runs", title="Wide", columns=columns, rows=rows)


def headings(browser: Browser) -> list[str]:
    return [text for text in browser.texts("#table-1 th") if text]


def test_columns_without_room_wait_behind_a_button(browser):
    browser.open(report(tables=[wide(20, essential=2)]))
    button = browser.one("#table-1 .more")
    browser.wait(button.is_displayed)
    shown = headings(browser)
    assert 2 < len(shown) < 20
    assert shown == [f"heading of column {n}" for n in range(len(shown))]
    scroll = browser.one("#table-1 .scroll")
    assert browser.ask("arguments[0].scrollWidth <= arguments[0].clientWidth", scroll)
    assert button.text == f"More columns ({20 - len(shown)})"
    assert button.get_attribute("aria-expanded") == "false"
    button.send_keys(" ")
    assert len(headings(browser)) == 20
    assert button.get_attribute("aria-expanded") == "true"
    assert browser.one("#table-1 .sideways").is_displayed()
    assert browser.all("#table-1 .frame.goes-right:not(.goes-left)")
    browser.driver.execute_script("arguments[0].scrollLeft = 1e6", scroll)
    browser.wait(lambda: browser.all("#table-1 .frame.goes-left:not(.goes-right)"))
    button.send_keys(" ")
    assert headings(browser) == shown
    assert not browser.one("#table-1 .sideways").is_displayed()


def test_a_table_with_room_has_no_such_button(browser):
    browser.open(report())
    browser.wait(lambda: browser.ask("document.querySelector('.more').textContent.includes('(0)')"))
    assert not browser.one("#table-1 .more").is_displayed()
    assert not browser.one("#table-1 .sideways").is_displayed()


def test_essential_columns_stay_and_the_table_says_that_it_goes_on(browser):
    browser.open(report(tables=[wide(20, essential=20)]))
    browser.wait(browser.one("#table-1 .sideways").is_displayed)
    assert len(headings(browser)) == 20


def test_a_card_of_a_phone_has_the_columns_that_matter(browser):
    browser.set_phone()
    browser.open(report(tables=[wide(20, essential=2)]))
    button = browser.one("#table-1 .more")
    browser.wait(button.is_displayed)
    assert len([one for one in browser.all("#table-1 tbody tr:first-child td") if one.text]) == 9
    button.click()
    assert len([one for one in browser.all("#table-1 tbody tr:first-child td") if one.text]) == 20


def test_paper_has_all_rows_and_no_controls(browser):
    browser.open(report(tables=[many_rows(60)]))
    browser.emulate("Emulation.setEmulatedMedia", media="print", features=[])
    scroll = browser.one("#table-1 .scroll")
    assert browser.ask("arguments[0].scrollHeight <= arguments[0].clientHeight + 1", scroll)
    assert not any(e.is_displayed() for e in browser.all("nav, .tools, .toggle, .copy, .skip"))
    assert len(browser.column(1)) == 60


def many_rows(count: int) -> Table:
    return Table(
        name="runs",
        title="Many",
        columns=[
            Column(name="name", heading="name", kind=Kind.TEXT),
            *(Column(name=f"c{n}", heading=f"c{n}") for n in range(7)),
        ],
        rows=[
            Row(
                values={
                    "name": f"run {n}",
                    **{f"c{k}": (n * 7919 % count) / (k + 1) for k in range(7)},
                },
                run_ids=(1,),
            )
            for n in range(count)
        ],
    )


def test_the_header_stays_while_a_long_table_scrolls(browser):
    browser.open(report(tables=[many_rows(60)]))
    scroll = browser.one("#table-1 .scroll")
    browser.driver.execute_script("arguments[0].scrollTop = 500", scroll)
    header = browser.all("#table-1 th")[1]
    assert abs(header.rect["y"] - scroll.rect["y"]) < 3


@pytest.mark.timing
def test_many_rows_sort_and_filter_without_a_row_by_row_search(browser):
    num_rows = 3000
    browser.open(report(tables=[many_rows(num_rows)]))
    # What the page's script takes; laying out so many rows takes the browser as long again.
    took_ms = browser.ask(
        "(() => { const start = performance.now();"
        "document.querySelectorAll('#table-1 th button')[1].click();"
        "return performance.now() - start; })()"
    )
    assert took_ms < 2000
    second = "#table-1 tbody tr td:nth-child(3)"
    assert browser.ask(f"document.querySelector('{second}').textContent") == "0"
    browser.one("#table-1-filter").send_keys("2999")
    counted = browser.one("#table-1 .counted")
    browser.wait(lambda: f"of {num_rows} rows" in counted.text)

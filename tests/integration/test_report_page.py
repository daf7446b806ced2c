"""The report in a real browser: no error, no request, tables sort and filter, points tell their run, any screen."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustflat.reporting.page import write_report
from tests.conftest import undrawn
from tests.unit.reporting.made_up import HOSTILE, failed, study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None

pytestmark = [
    pytest.mark.xdist_group("browser"),  # one page for all
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="no playwright here: pip install playwright"),
    # Playwright closes its pipes when the interpreter collects them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
READY = "document.documentElement.dataset.ready === 'true'"
PATIENCE_MS = 120_000
"""A hang ends the test; speed is not asserted."""

SCREENS = [
    pytest.param(
        width,
        height,
        scheme,
        id=f"{width}-{scheme}",
        marks=[] if (width, scheme) == (390, "dark") else pytest.mark.slow,
    )
    for width, height in ((390, 844), (1280, 800))
    for scheme in ("light", "dark")
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = study(67, 3, full=False)
    with undrawn():
        return write_report(
            type(made)(made.title, made.question, [*made.runs, failed()]), tmp_path_factory.mktemp("report")
        )


class Opened:
    """A page in the browser, and all that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self._told(message.type, message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function(READY, timeout=PATIENCE_MS)

    def _told(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.troubles.append(text)

    def column(self, table: str, number: int) -> list[str]:
        cells = self.page.locator(f"table[data-table={table}] tbody tr td:nth-child({number})")
        return [text.strip() for text in cells.all_inner_texts()]


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    shown = Opened(browser, report)
    yield shown
    shown.context.close()


@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_no_error_no_request_nothing_wider_than_the_screen(
    browser: Any, report: Path, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    shown = Opened(browser, report, width, height, scheme)
    assert shown.troubles == []
    assert [url for url in shown.asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in shown.asked if url.startswith("file:")]) == 1
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.page.evaluate("window.hacked") is None
    background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 384
    assert light == (scheme == "light")
    picture = tmp_path / "page.png"
    shown.page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    shown.context.close()


def test_every_chart_is_drawn(opened: Opened) -> None:
    charts = opened.page.locator(".chart")
    assert charts.count() > 5
    assert opened.page.locator(".chart .main-svg").count() >= charts.count()


def test_tables_sort(opened: Opened) -> None:
    page = opened.page
    button = page.locator("table[data-table=runs] thead th", has_text="RLoss (nats)").first.locator("button").first
    orders = []
    for _ in range(2):
        button.click()
        cells = page.locator("table[data-table=runs] tbody tr")
        index = page.evaluate(
            "[...document.querySelectorAll('table[data-table=runs] thead tr:first-child th')]"
            ".findIndex((th) => th.innerText.trim().startsWith('RLoss (nats)'))"
        )
        assert cells.count() == 25
        orders.append([float(text.split()[0]) for text in opened.column("runs", index + 1) if text != "–"])
    assert orders[0] == sorted(orders[0]) and orders[1] == sorted(orders[1], reverse=True)
    assert orders[0] != orders[1] and orders[1][0] > orders[0][-1]


def test_tables_filter_by_search_and_by_column(opened: Opened) -> None:
    page = opened.page
    search = page.locator(".dt-container:has(table[data-table=runs]) .dt-search input")
    search.fill("TRADES")
    page.wait_for_function("document.querySelectorAll('table[data-table=runs] tbody tr').length === 1")
    assert opened.column("runs", 1) == ["TRADES 6"]
    search.fill("")
    column = page.locator("table[data-table=runs] thead tr:nth-child(2) td:nth-child(2) input")
    column.fill("Method 20")
    page.wait_for_function("document.querySelectorAll('table[data-table=runs] tbody tr').length === 9")
    assert set(opened.column("runs", 2)) == {"Method 20"}
    column.fill("")
    page.wait_for_function("document.querySelectorAll('table[data-table=runs] tbody tr').length === 25")


def test_columns_of_numbers_filter_by_value(opened: Opened) -> None:
    page = opened.page
    index = page.evaluate(
        "[...document.querySelectorAll('table[data-table=runs] thead tr:first-child th')]"
        ".findIndex((th) => th.innerText.trim().startsWith('RLoss (nats)'))"
    )
    box = page.locator(f"table[data-table=runs] thead tr:nth-child(2) td:nth-child({index + 1})")
    box.locator("select").select_option("greater")
    box.locator("input").fill("2.5")
    page.wait_for_function(
        "/filtered/.test(document.querySelector('.dt-container:has(table[data-table=runs])').innerText)"
    )
    values = [float(text.split()[0]) for text in opened.column("runs", index + 1)]
    assert values and min(values) > 2.5
    box.locator("input").fill("")


def test_long_table_holds_text_not_html(opened: Opened) -> None:
    page = opened.page
    search = page.locator(".dt-container:has(table[data-table=provenance]) .dt-search input")
    search.fill("hacked = 1")
    page.wait_for_function(
        "/filtered/.test(document.querySelector('.dt-container:has(table[data-table=provenance])').innerText)"
    )
    assert set(opened.column("provenance", 2)) == {HOSTILE[0]}
    assert page.evaluate("window.hacked") is None
    search.fill("")


def test_hover_tells_the_run(opened: Opened) -> None:
    page = opened.page
    page.locator("#chart-rloss_average").scroll_into_view_if_needed()
    where = page.evaluate(
        """() => {
          const box = document.getElementById("chart-rloss_average");
          const trace = box.data.find((t) => t.mode === "markers");
          const index = trace.hovertext.findIndex((text) => text.startsWith("Method"));
          const area = box.querySelector(".nsewdrag").getBoundingClientRect();
          const { xaxis, yaxis } = box._fullLayout;
          return [area.x + xaxis.l2p(trace.x[index]), area.y + yaxis.l2p(trace.y[index])];
        }"""
    )
    page.mouse.move(where[0] - 40, where[1] - 40)
    page.mouse.move(*where)
    page.wait_for_selector("#chart-rloss_average .hoverlayer .hovertext", timeout=PATIENCE_MS)
    told = page.locator("#chart-rloss_average .hoverlayer .hovertext").first.text_content()
    assert "RLoss" in told and "seed" in told


def test_hover_shows_hostile_names_as_they_are(opened: Opened) -> None:
    page = opened.page
    page.mouse.move(0, 0)  # the label of the test before must be gone
    page.wait_for_selector("#chart-rloss_average .hoverlayer .hovertext", state="detached", timeout=PATIENCE_MS)
    told = page.evaluate(
        """() => {
          const box = document.getElementById("chart-rloss_average");
          const curve = box.data.findIndex((t) => t.mode === "markers" && t.hovertext[0].startsWith("&lt;script"));
          Plotly.Fx.hover(box, [{ curveNumber: curve, pointNumber: 0 }]);
          return box.querySelector(".hoverlayer .hovertext").textContent;
        }"""
    )
    assert told.startswith(HOSTILE[0])
    assert page.evaluate("window.hacked") is None


def test_legend_and_highlight_by_keyboard(opened: Opened) -> None:
    page = opened.page
    button = page.locator("#rloss_average .legend button").last
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    index = int(str(button.get_attribute("data-traces")).split()[0])
    assert page.evaluate(f"document.getElementById('chart-rloss_average').data[{index}].visible") is False
    page.keyboard.press("Enter")
    assert page.evaluate(f"document.getElementById('chart-rloss_average').data[{index}].visible") is True
    page.locator("#highlight").select_option("Method 3")
    picked = page.evaluate(
        "document.getElementById('chart-rloss_average').data.flatMap((t) => (t.selectedpoints || [])"
        ".map((i) => t.customdata[i]))"
    )
    assert len(picked) == 9 and set(picked) == {"Method 3"}
    page.locator("#highlight").select_option("")


def test_skip_link_comes_first(browser: Any, report: Path) -> None:
    shown = Opened(browser, report)
    shown.page.keyboard.press("Tab")
    assert shown.page.evaluate("document.activeElement.className") == "skip"
    shown.page.keyboard.press("Enter")
    assert shown.page.evaluate("document.activeElement.id") == "main"
    shown.context.close()


def test_prints(browser: Any, report: Path, tmp_path: Path) -> None:
    shown = Opened(browser, report, scheme="dark")
    shown.page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert shown.troubles == []
    shown.context.close()


def test_page_without_runs_opens(browser: Any, tmp_path: Path) -> None:
    made = study(1, 1)
    shown = Opened(browser, write_report(type(made)("Empty", "?", []), tmp_path))
    assert shown.troubles == [] and "There are no runs" in shown.page.inner_text("main")
    shown.context.close()

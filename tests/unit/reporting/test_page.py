"""The report as a file: what it holds, what it says when pieces are missing, and that no name gets out of its place."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from robustflat.errors import UserError
from robustflat.reporting.page import write_report
from robustflat.reporting.paper import GOOD, POOR, from_paper
from robustflat.reporting.records import Study
from robustflat.store.tables import tidy
from tests.unit.reporting.made_up import HOSTILE, failed, record, row, rows, study


class Page(HTMLParser):
    """Elements, headings, links and scripts of a page, read by Python's own parser."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[str(self.tags[-1][1].get("id"))] = data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(study(8, 2), tmp_path_factory.mktemp("report"))


def test_one_file_without_addresses_of_other_machines(report: Path) -> None:
    page = Page(report)
    for tag, attributes in page.tags:
        for name in ("src", "href", "data-src", "action"):
            target = attributes.get(name) or ""
            assert not re.match(r"(?i)(https?:)?//", target), (tag, target)
    assert not [a for a in page.all("script") if "src" in a]
    assert "@import" not in report.read_text() and "url(http" not in report.read_text()
    packed = page.scripts["library-plotly"]
    assert "plotly.js" in gzip.decompress(base64.b64decode(packed)).decode()[:200]


@pytest.mark.usefixtures("without_pictures")
def test_same_study_gives_same_page(report: Path, tmp_path: Path) -> None:
    assert write_report(study(8, 2), tmp_path / "again.html").read_text() == report.read_text()


def test_hostile_names_stay_text(report: Path) -> None:
    page = Page(report)
    assert len(page.all("script")) == 6  # charts, rows, three libraries, the page's own
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    for label in HOSTILE:
        assert re.sub(r"\s+", " ", label) in page.text
    charts = json.loads(page.scripts["charts"])
    hovers = [text for figure in charts.values() for trace in figure["data"] for text in trace.get("hovertext", ())]
    assert hovers and not any(re.search(r"<(?!br>)", text) for text in hovers)
    assert any("&lt;script&gt;" in text for text in hovers)


def test_figures_and_tables_lie_beside_the_page(report: Path) -> None:
    page = Page(report)
    keys = [attributes["data-chart"] for attributes in page.all("div") if attributes.get("class") == "chart"]
    assert {"rloss_average", "rloss_worst", "rerr_rloss", "trajectories", "gap_average", "early_stopping", "measures",
            "curve_test_robust_loss", "epochs_average", "epochs_path", "landscape_0"} <= set(keys)  # fmt: skip
    for key in keys:
        svg = (report.parent / "figures" / f"{key}.svg").read_text()
        assert svg.lstrip().startswith("<?xml") and "window.hacked = 1</script>" not in svg
        assert (report.parent / "figures" / f"{key}.png").read_bytes()[:4] == b"\x89PNG"
    runs = pd.read_csv(report.parent / "tables" / "runs.csv")
    assert len(runs) == 16 and HOSTILE[0] in set(runs["label"])
    assert (report.parent / "tables" / "runs.md").read_text().startswith("| label |")
    assert "tabular" in (report.parent / "tables" / "runs.tex").read_text()


def test_downloads_inside_the_page_are_the_files(report: Path) -> None:
    embedded = [a for a in Page(report).all("a") if (a.get("href") or "").startswith("data:")]
    assert len(embedded) > 10
    for link in embedded:
        content = base64.b64decode(str(link["href"]).split("base64,")[1])
        assert content == (report.parent / "tables" / str(link["download"])).read_bytes()


def test_headings_are_in_order_and_pictures_have_words(report: Path) -> None:
    page = Page(report)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(chart.get("aria-label") for chart in page.all("div") if chart.get("class") == "chart")
    assert all(image.get("alt") for image in page.all("img"))
    assert all(table for table in page.all("th") if table.get("scope") == "col")
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    anchors = {str(a["href"])[1:] for a in page.all("a") if str(a.get("href")).startswith("#")}
    assert anchors <= set(ids)


@pytest.mark.usefixtures("without_pictures")
def test_numbers_of_the_paper(tmp_path: Path) -> None:
    made = Study("Paper", "?", from_paper(), classes=10, group_edges=(GOOD, POOR))
    text = Page(write_report(made, tmp_path)).text
    assert "Yes, among these 74 networks" in text
    assert "RLoss = 1.298 + 1.442 x average-case flatness" in text
    table = pd.read_csv(tmp_path / "tables" / "correlations.csv")
    values = {
        (line["with"], line["coefficient"]): line["value"] for line in table[table["of"] == "RLoss"].to_dict("records")
    }
    assert values["average-case flatness", "Pearson"] == pytest.approx(0.847, abs=5e-4)
    assert values["average-case flatness", "Spearman"] == pytest.approx(0.856, abs=5e-4)
    assert values["worst-case flatness", "Pearson"] == pytest.approx(0.499, abs=5e-4)
    assert values["average-case flatness of CE", "Spearman"] == pytest.approx(0.513, abs=7e-4)
    groups = pd.read_csv(tmp_path / "tables" / "runs.csv")["group"].value_counts()
    assert groups["good"] == 14  # rows with RErr (AA) below 57 %


def test_no_runs(tmp_path: Path) -> None:
    text = Page(write_report(Study("Empty", "?", []), tmp_path)).text
    assert "There are no runs, so there is no answer yet." in text
    assert not (tmp_path / "figures").exists()


@pytest.mark.usefixtures("without_pictures")
def test_one_run(tmp_path: Path) -> None:
    text = Page(write_report(study(1, 1), tmp_path)).text
    assert "This cannot be said yet." in text and "1 run" in text


@pytest.mark.usefixtures("without_pictures")
def test_identical_values(tmp_path: Path) -> None:
    runs = [record(f"M {i}", "M", 0, 0.5, 2.0, run_id=f"{i:08x}") for i in range(6)]
    text = Page(write_report(Study("Same", "?", runs), tmp_path)).text
    assert "This cannot be said yet. All 6 models have the same average-case flatness." in text


@pytest.mark.usefixtures("without_pictures")
def test_missing_pieces_nan_and_infinity(tmp_path: Path) -> None:
    good = study(5, 1).runs
    broken = rows("000000aa", 0, math.nan, math.inf, snapshots=False)
    bare = tidy([row("000000bb", None, "clean", "clean", "error", 0.2)])
    runs = [
        *good,
        replace(good[0], run_id="000000aa", label="broken", table=tidy(broken)),
        replace(
            good[0], run_id="000000bb", label="bare", seed=None, status="partial", problem="not attacked", table=bare
        ),
        failed(),
    ]
    path = write_report(Study("Missing", "?", runs), tmp_path)
    text = Page(path).text
    assert "The loss became NaN." in text and "not attacked" in text
    assert "2 of 8 runs failed or lack numbers" in text
    for name in ("charts", "rows"):
        json.loads(Page(path).scripts[name], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.usefixtures("without_pictures")
def test_only_failed_runs(tmp_path: Path) -> None:
    text = Page(write_report(Study("Failed", "?", [failed(), failed("<b>MART</b>")]), tmp_path)).text
    assert "This cannot be said yet." in text and "<b>MART</b>" in text


@pytest.mark.usefixtures("without_pictures")
def test_warnings_are_told_with_their_runs(tmp_path: Path) -> None:
    runs = [replace(run, warnings=("Gradients may be masked.",)) for run in study(3, 1, hostile=False).runs]
    text = Page(write_report(Study("Warned", "?", runs), tmp_path)).text
    assert "Method 0 1, seed 0; Method 0 2, seed 0; Method 0 3, seed 0: Gradients may be masked." in text
    assert "Sanity checks warn about 3 runs" in text


def test_provenance_has_every_number(report: Path) -> None:
    table = pd.read_csv(report.parent / "tables" / "provenance.csv")
    assert set(table["commit"]) == {"0123456789ab"} and set(table["count"]) == {1000}
    runs = pd.read_csv(report.parent / "tables" / "runs.csv")
    told = table[(table["number"] == "RLoss (nats)")].set_index("run")["value"]
    assert len(told) == len(runs)
    buffer = io.StringIO(json.loads(json.dumps(runs.to_csv(index=False))))
    again = pd.read_csv(buffer).set_index("run_id")["robust_loss"]
    assert (told.sort_index() == again.sort_index()).all()


def test_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_report(Study("No", "?", []), tmp_path / "file" / "page.html")


@pytest.mark.usefixtures("without_pictures")
def test_measures_that_no_run_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run has 'nothing' for average"):
        write_report(replace(study(3, 1), measures={"average": "nothing"}), tmp_path)
    with pytest.raises(UserError, match="no part sharpest"):
        write_report(replace(study(3, 1), measures={"sharpest": "average"}), tmp_path)
    with pytest.raises(UserError, match=r"no run has 'epoch_0001'\. There are: early_stopped, epoch_0005"):
        write_report(replace(study(3, 1), checkpoint="epoch_0001"), tmp_path)
    write_report(replace(study(3, 1, full=False), checkpoint="epoch_0005"), tmp_path)

"""A study as one HTML file that opens offline, with its figures and tables as files beside it."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import itables
import plotly.offline  # type: ignore[import-untyped,unused-ignore]
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustflat.reporting import figures
from robustflat.reporting.answer import answer_of
from robustflat.reporting.charts import chart
from robustflat.reporting.drawing import DARK, LIGHT, Drawing, Missing
from robustflat.reporting.findings import findings
from robustflat.reporting.records import Study
from robustflat.reporting.report_tables import ReportTable
from robustflat.reporting.sections import Section, sections_of
from robustflat.reporting.study_plots import Material
from robustflat.store.tables import as_text, write_table

EMBED_LIMIT = 100_000
"""Characters up to which a table's download is part of the page; a longer one is only a file beside it."""

SENTENCES = ("note", "reason", "verdict", "interval")
"""Columns that hold sentences and need room for them."""

DOWNLOADS = {"csv": "CSV", "md": "Markdown", "tex": "LaTeX"}

_TYPES = {"csv": "text/csv", "md": "text/markdown", "tex": "application/x-tex"}
_SCHEMES = {
    "light": dict(page="#ffffff", card="#fafafa", text="#1b1f24", muted="#59626c", grid="#d9dde2", link="#0757a6")
    | {f"c{i}": colour for i, colour in enumerate(LIGHT)},
    "dark": dict(page="#12161b", card="#191f26", text="#e8ebee", muted="#a3adb8", grid="#38414b", link="#86bdf5")
    | {f"c{i}": colour for i, colour in enumerate(DARK)},
}  # fmt: skip
_SWATCHES = {
    "circle": '<circle r="4.5"/>',
    "square": '<path d="M-4-4h8v8h-8z"/>',
    "diamond": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>',
    "triangle-up": '<path d="M0-5 5 4h-10z"/>',
    "triangle-down": '<path d="M0 5 5-4h-10z"/>',
    "cross": '<path d="M-2-5.5h4v3.500h3.500v4h-3.500v3.500h-4v-3.500h-3.500v-4h3.500z"/>',
    "x": '<path d="M-5-3-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0z"/>',
    "star": '<path d="M0-6 1.600-2 6-1.800 2.600.900 3.700 5.100 0 2.700-3.700 5.100-2.600.900-6-1.800-1.600-2z"/>',
    "arrow": '<path d="M0-6 4.500 5h-9z"/>',
    "solid": '<path d="M-9 0H9" stroke-width="2.500"/>',
    "dash": '<path d="M-9 0H9" stroke-width="2.500" stroke-dasharray="5 2"/>',
    "dot": '<path d="M-9 0H9" stroke-width="2.500" stroke-dasharray="2 2"/>',
    "dashdot": '<path d="M-9 0H9" stroke-width="2.500" stroke-dasharray="6 2 2 2"/>',
}


@dataclass(frozen=True)
class _Place:
    """Where a report goes."""

    page: Path

    @property
    def tables(self) -> Path:
        return self.page.parent / "tables"

    @property
    def figures(self) -> Path:
        return self.page.parent / "figures"


def write_report(study: Study, output: Path | str) -> Path:
    """Write the report of a study.

    The page holds all scripts, data and styles. They are packed with gzip: plotly's and DataTables' code come from the
    installed packages and need a browser of 2023 or later to unpack. Beside it are `figures/*.svg|png` and
    `tables/*.csv|md|tex`.

    Args:
        study: see `Study`; anything may be missing, the page then says so.
        output: the page if it ends in .html, otherwise a folder, in which the page is index.html.

    Returns:
        The page.

    Raises:
        UserError: if a file cannot be written, or the study names a measure or a checkpoint that no run has.
    """
    output = Path(output)
    place = _Place(output if output.suffix.lower() in (".html", ".htm") else output / "index.html")
    figures.make_folder(place.page.parent)  # before the work
    material = Material(study)
    found = findings(material)
    parts = sections_of(material, found)
    context = {
        "title": study.title,
        "question": study.question,
        "answer": answer_of(material, found),
        "families": sorted({run.family for run in study.runs}),
        "sections": [_section(part, place) for part in parts],
        "charts": _json({f.key: chart(f)[0] for part in parts for f in part.figures if isinstance(f, Drawing)}),
        "rows": _json({t.key: _data(t) for p in parts for t in p.tables if isinstance(t, ReportTable) and t.deferred}),
        "made": _made(study),
        **_assets(),
    }
    with figures.replacing(place.page) as unfinished:
        unfinished.write_text(_environment().get_template("report.html.j2").render(context), encoding="utf-8")
    return place.page


def _section(section: Section, place: _Place) -> dict[str, Any]:
    return {
        **{name: getattr(section, name) for name in ("key", "title", "text", "sentences", "highlight")},
        "figures": [_figure(drawing, place) for drawing in section.figures],
        "tables": [_table(table, place) for table in section.tables],
    }


def _figure(drawing: Drawing | Missing, place: _Place) -> dict[str, Any]:
    if isinstance(drawing, Missing):
        return {"key": drawing.key, "title": drawing.title, "missing": drawing.reason}
    figures.save(figures.figure_of(drawing), place.figures, drawing.key)
    described, legend = chart(drawing)
    entries = [{**entry, "drawing": Markup(_SWATCHES[entry["shape"]])} for entry in legend]
    texts = {name: getattr(drawing, name) for name in ("key", "title", "caption", "reading")}
    height = described["layout"]["height"]
    return {**texts, "missing": "", "legend": entries if len(entries) > 1 else [], "height": height}


def _table(table: ReportTable | Missing, place: _Place) -> dict[str, Any]:
    if isinstance(table, Missing):
        return {"key": table.key, "title": table.title, "missing": table.reason}
    files = []
    for ending, label in DOWNLOADS.items():
        path = place.tables / f"{table.key}.{ending}"
        write_table(table.frame, path)
        text = as_text(table.frame, ending)
        href = f"tables/{path.name}"
        if len(text) <= EMBED_LIMIT:
            href = f"data:{_TYPES[ending]};base64,{base64.b64encode(text.encode()).decode()}"
        files.append({"name": path.name, "label": label, "href": href})
    columns = [
        {"name": name, "style": "number" if is_number else "sentence" if name in SENTENCES else ""}
        for name, is_number in zip(table.columns, table.numeric, strict=True)
    ]
    texts = {name: getattr(table, name) for name in ("key", "title", "caption", "filters", "deferred")}
    return {**texts, "missing": "", "columns": columns, "rows": () if table.deferred else table.rows, "files": files}


def _data(table: ReportTable) -> list[list[Any]]:
    """Cells of a deferred table: pairs of what is shown and what is sorted by."""
    return [[[cell.text, cell.text if cell.order is None else cell.order] for cell in row] for row in table.rows]


def _made(study: Study) -> str:
    commits = sorted({str(run.provenance["commit"])[:12] for run in study.runs if run.provenance.get("commit")})
    return f"from runs of commit {', '.join(commits)}" if commits else ""


def _assets() -> dict[str, Any]:
    templates = resources.files("robustflat.reporting") / "templates"
    css, script = ((templates / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return {
        "version": _version(),
        "css": Markup(css),
        "script": Markup(f"const PALETTES = {_json(_SCHEMES)};\n{script}"),
        "palette": Markup(_palette()),
        "libraries": _libraries(),
    }


@cache
def _libraries() -> Mapping[str, Markup]:
    bundle = resources.files(itables) / "html"
    return {
        "plotly": Markup(_packed(plotly.offline.get_plotlyjs())),
        "tables": Markup(_packed((bundle / "dt_bundle.js").read_text(encoding="utf-8"))),
        "style": Markup(_packed((bundle / "dt_bundle.css").read_text(encoding="utf-8"))),
    }


def _palette() -> str:
    """Custom properties: light, dark where the reader's system asks for it, and light on paper."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in _SCHEMES[s].items()) for s in ("light", "dark"))
    return (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}\n"
    )


def _packed(text: str) -> str:
    # A fixed time makes equal reports equal files.
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _json(value: Mapping[str, Any] | Sequence[Any]) -> Markup:
    """JSON that can stand in a script element: no text in it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("robustflat.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _version() -> str:
    try:
        return metadata.version("robustflat")
    except metadata.PackageNotFoundError:
        return "(not installed)"

"""Interactive figures by plotly. Colours are tokens such as "@c0" that the page replaces for light, dark and print."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped,unused-ignore]

from robustflat.reporting.drawing import DASHES, SYMBOLS, Arrows, Bars, Drawing, Line, Points, Rule, Style

TEXT, GRID, MUTED, PAGE = "@text", "@grid", "@muted", "@page"
"""Tokens of colours that depend on the scheme; "@c0" and so on are those of `drawing.LIGHT` and `drawing.DARK`."""

HEIGHT = 420
ROW = 26
"""Pixels of a figure, and of each bar in a figure of bars."""


def chart(drawing: Drawing) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Plotly's description of a figure as plain values, and its legend.

    Texts are escaped, since plotly reads HTML in them. The legend is not drawn by plotly but by the page, where it
    wraps and can be reached by keyboard: entries with name, colour (token), shape, dash and the traces they switch.
    """
    figure = go.Figure()
    legend = []
    for item in drawing.items:
        if isinstance(item, Rule):
            _add_rule(figure, item)
            continue
        first = len(figure.data)
        for trace in _traces(item):
            figure.add_trace(trace)
        name = getattr(item, "name", "")
        if name:
            legend.append({"name": name, "traces": list(range(first, len(figure.data))), **_swatch(item)})
    _lay_out(figure, drawing)
    return _without_colour_checks(figure), legend


def _traces(item: Points | Line | Bars | Arrows) -> Iterable[Any]:
    if isinstance(item, Points):
        return [_points(item)]
    if isinstance(item, Line):
        return _line(item)
    if isinstance(item, Bars):
        return [_bars(item)]
    return [_arrows(item)]


def _points(item: Points) -> Any:
    return go.Scatter(
        x=_plain(item.x),
        y=_plain(item.y),
        mode="lines+markers" if item.joined else "markers",
        name=_safe(item.name),
        hovertext=[_safe(label) for label in item.labels],
        hoverinfo="text" if item.labels else "x+y",
        customdata=list(item.tags) or None,
        error_x=_error(item.x_error),
        error_y=_error(item.y_error),
        line={"width": 1.5, "dash": "solid"},
        marker={"symbol": SYMBOLS[item.style.shape % len(SYMBOLS)], "size": 9},
        meta={"colour": _token(item.style), "edge": PAGE},
    )


def _line(item: Line) -> list[Any]:
    dash = DASHES[item.style.shape % len(DASHES)]
    parts = []
    if item.low:
        parts.append(go.Scatter(
            x=_plain([*item.x, *reversed(item.x)]), y=_plain([*item.high, *reversed(item.low)]), fill="toself",
            mode="lines", line={"width": 0}, hoverinfo="skip", name=_safe(item.name), meta={"fill": _token(item.style)},
        ))  # fmt: skip
    # A single point has no line to be seen by.
    parts.append(go.Scatter(
        x=_plain(item.x), y=_plain(item.y), mode="lines" if len(item.x) > 1 else "markers", marker={"size": 7},
        line={"width": 2, "dash": dash}, name=_safe(item.name),
        hoverinfo="x+y+name" if len(item.x) < 50 else "skip", meta={"colour": _token(item.style)},
    ))  # fmt: skip
    return parts


def _bars(item: Bars) -> Any:
    return go.Bar(
        x=_plain(item.values),
        y=[_safe(name) for name in item.names],
        orientation="h",
        hovertext=[_safe(label) for label in item.labels],
        hoverinfo="text",
        error_x={
            "type": "data",
            "array": _plain(h - v for h, v in zip(item.high, item.values, strict=True)),
            "arrayminus": _plain(v - low for low, v in zip(item.low, item.values, strict=True)),
            "thickness": 1.5,
        },
        marker={"pattern": {"shape": ["" if strong else "/" for strong in item.strong]}},
        meta={"colour": "@c0"},
    )


def _arrows(item: Arrows) -> Any:
    ends = zip(item.x, item.y, item.to_x, item.to_y, item.labels, strict=True)
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str] = []
    shapes: list[str] = []
    for x0, y0, x1, y1, label in ends:
        shapes += ["circle", "arrow" if (x0, y0) != (x1, y1) else "circle", "circle"]
        x += [x0, x1, None]
        y += [y0, y1, None]
        texts += [_safe(label), _safe(label), ""]
    sizes = [6, 11, 0] * len(item.x)
    return go.Scatter(
        x=x, y=y, mode="lines+markers", name=_safe(item.name), hovertext=texts, hoverinfo="text",
        line={"width": 1.2}, marker={"symbol": shapes, "size": sizes, "opacity": 1,
                                    "angleref": "previous"},
        meta={"colour": _token(item.style)},
    )  # fmt: skip


def _add_rule(figure: go.Figure, rule: Rule) -> None:
    across = {"x0": 0, "x1": 1, "xref": "paper", "y0": rule.at, "y1": rule.at, "yref": "y"}
    along = {"y0": 0, "y1": 1, "yref": "paper", "x0": rule.at, "x1": rule.at, "xref": "x"}
    figure.add_shape(
        type="line", line={"width": 1, "dash": "dot"}, layer="below", **(along if rule.axis == "x" else across)
    )
    where = {"x": rule.at, "xref": "x", "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top"}
    if rule.axis == "y":
        where = {"y": rule.at, "yref": "y", "x": 1, "xref": "paper", "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation(text=_safe(rule.text), showarrow=False, font={"size": 12}, **where)


def _lay_out(figure: go.Figure, drawing: Drawing) -> None:
    rows = max((len(item.names) for item in drawing.items if isinstance(item, Bars)), default=0)
    figure.update_layout(
        template="none",
        height=max(HEIGHT, 120 + ROW * rows) if rows == 0 else 120 + ROW * rows,
        margin={"l": 56, "r": 12, "t": 12, "b": 52},
        showlegend=False,
        hovermode="closest",
        dragmode="zoom",
        xaxis={"title": {"text": _safe(drawing.x), "standoff": 8}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": _safe(drawing.y), "standoff": 8}, "automargin": True, "zeroline": False},
    )
    if rows:
        figure.update_layout(yaxis={"autorange": "reversed"}, bargap=0.35)


def _without_colour_checks(figure: go.Figure) -> dict[str, Any]:
    """The figure as plain values, with tokens where plotly's own checks would only let colours pass."""
    plain: dict[str, Any] = figure.to_plotly_json()
    made: dict[str, Any] = {"data": [dict(trace) for trace in plain["data"]], "layout": dict(plain["layout"])}
    made["layout"].pop("template", None)
    made["layout"] |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": TEXT}}
    made["layout"]["hoverlabel"] = {"bgcolor": PAGE, "bordercolor": MUTED, "font": {"color": TEXT}, "align": "left"}
    for axis in ("xaxis", "yaxis"):
        made["layout"][axis] = {**made["layout"][axis], "gridcolor": GRID, "linecolor": MUTED, "tickcolor": MUTED}
    for shape in made["layout"].get("shapes", ()):
        shape["line"]["color"] = MUTED
    for note in made["layout"].get("annotations", ()):
        note["font"]["color"] = MUTED
    for trace in made["data"]:
        _colour(trace)
    return made


def _colour(trace: dict[str, Any]) -> None:
    meta = trace.pop("meta")
    if "fill" in meta:
        trace |= {"fillcolor": meta["fill"], "opacity": 0.18}
        return
    colour = meta["colour"]
    if trace["type"] == "bar":
        # Between the hatches one sees the page, so they have the colour of the bar and the bar an edge.
        pattern = {**trace["marker"]["pattern"], "fgcolor": colour, "solidity": 0.3}
        trace["marker"] = {"color": colour, "pattern": pattern, "line": {"color": colour, "width": 1}}
    else:
        trace["line"] = {**trace["line"], "color": colour}
    if "marker" in trace and trace["type"] == "scatter":
        trace["marker"] = {**trace["marker"], "color": colour}
        if "edge" in meta:
            trace["marker"]["line"] = {"color": meta["edge"], "width": 0.8}
    for bar in ("error_x", "error_y"):
        if trace.get(bar):
            trace[bar] = {**trace[bar], "color": TEXT if trace["type"] == "bar" else colour, "width": 0}


def _swatch(item: Points | Line | Bars | Arrows) -> dict[str, Any]:
    style = getattr(item, "style", Style(0))
    line = isinstance(item, Line)
    shape = DASHES[style.shape % len(DASHES)] if line else SYMBOLS[style.shape % len(SYMBOLS)]
    if isinstance(item, Arrows):
        shape = "arrow"
    return {"colour": _token(style).removeprefix("@"), "shape": shape, "line": line}


def _token(style: Style) -> str:
    return TEXT if style.colour is None else f"@c{style.colour}"


def _error(errors: Sequence[float]) -> dict[str, Any] | None:
    known = [e for e in errors if e is not None and math.isfinite(e)]
    if not known:
        return None
    return {"type": "data", "array": _plain(errors), "thickness": 1}


def _plain(values: Iterable[float]) -> list[float | None]:
    """Python floats; what is not finite becomes None, which JSON has and plotly leaves out."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _safe(text: str) -> str:
    """Escaped, with line breaks as plotly writes them."""
    return html.escape(text).replace("\n", "<br>")

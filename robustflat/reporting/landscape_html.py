"""Interactive landscapes: one HTML file that needs neither network nor server."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from robustflat.reporting.landscape_plots import (
    COLOURS,
    Values,
    band_note,
    positive_range,
    require_drawable,
    summary,
)
from robustflat.reporting.records import Lines

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "toImageButtonOptions": {"format": "svg"},
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],  # nothing leaves the page
    "plotlyServerURL": "",
}

_ERROR_LEVELS = {"start": 0, "end": 100, "size": 5}

_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<script>{{ plotly }}</script>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.25rem; margin: 0; }
.note, .caption { color: #555; margin: .3rem 0 .8rem; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% for figure in figures %}{{ figure }}{% endfor %}
<p class="caption">{{ caption }}</p>
<details><summary>All settings</summary>
<table>
<tr><th></th>{% for name in facts %}<th>{{ name }}</th>{% endfor %}</tr>
{% for key in keys %}<tr><th>{{ key }}</th>
{% for values in facts.values() %}<td>{{ values.get(key, "") }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</details>
</body>
</html>
"""


def lines_page(
    landscapes: Mapping[str, Lines],
    *,
    title: str,
    caption: str,
    labels: tuple[str, str, str],
    emphasis: str,
    facts: Mapping[str, Mapping[str, object]],
) -> str:
    """HTML with loss and error along directions; single directions can be switched on in the legend.

    Args:
        landscapes: name of the network -> lines.
        title, caption: text, escaped here.
        labels: of the step, the loss and the error.
        emphasis: see `landscape_lines`.
        facts: name of the network -> settings, for the table below the picture.

    Raises:
        UserError: see `landscape_lines`.
    """
    require_drawable(landscapes)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.08)
    for index, (name, lines) in enumerate(landscapes.items()):
        steps = lines.steps.numpy()
        for column, values in ((1, lines.losses.numpy()), (2, 100 * lines.errors.numpy())):
            for trace in _traces(steps, values, index, name, emphasis, legend=column == 1):
                figure.add_trace(trace, row=1, col=column)
    step, loss, error = labels
    figure.update_xaxes(title_text=step, zeroline=True, zerolinecolor="#bbb", gridcolor="#eee")
    figure.update_yaxes(rangemode="tozero", gridcolor="#eee")
    figure.update_yaxes(title_text=loss, col=1)
    figure.update_yaxes(title_text=error, col=2)
    figure.update_layout(
        height=480,
        template="simple_white",
        hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
    )
    return _page([figure], title, band_note(landscapes, emphasis), caption, facts)


def planes_page(
    landscapes: Mapping[str, Lines],
    *,
    title: str,
    caption: str,
    labels: tuple[str, str, str],
    facts: Mapping[str, Mapping[str, object]],
) -> str:
    """HTML with contours of loss and error on planes, and the loss as surfaces that can be turned.

    Args:
        landscapes: name of the network -> plane.
        title, caption, labels, facts: see `lines_page`.

    Raises:
        UserError: see `landscape_planes`.
    """
    require_drawable(landscapes, plane=True)
    return _page([_contours(landscapes, labels), _surfaces(landscapes, labels[1])], title, "", caption, facts)


def _contours(landscapes: Mapping[str, Lines], labels: tuple[str, str, str]) -> go.Figure:
    """Loss above error, a column per network, one colour scale for each row."""
    step, loss, error = labels
    figure = make_subplots(rows=2, cols=len(landscapes), subplot_titles=list(landscapes), vertical_spacing=0.08)
    low, high = np.log10(positive_range(_all_losses(landscapes))).tolist()
    hover = "(%{x:.3g}, %{y:.3g}): %{customdata:.4g}<extra></extra>"
    for column, plane in enumerate(landscapes.values(), start=1):
        # Arrays have the first direction first; plotly draws rows upwards.
        s, losses, errors = plane.steps.numpy(), plane.losses.numpy().T, 100 * plane.errors.numpy().T
        common = {"x": s, "y": s, "line": {"width": 0.3, "color": "white"}, "hovertemplate": hover}
        for row, heights, shown in ((1, losses, _logs(losses)), (2, errors, errors)):
            levels = {"start": low, "end": high, "size": (high - low) / 15} if row == 1 else _ERROR_LEVELS
            common |= {"coloraxis": f"coloraxis{'' if row == 1 else row}", "contours": levels}
            figure.add_trace(go.Contour(z=shown, customdata=heights, **common), row, column)
            cross = {"symbol": "x", "color": "white", "size": 8}
            here = go.Scatter(x=[0], y=[0], mode="markers", marker=cross, hoverinfo="skip", showlegend=False)
            figure.add_trace(here, row, column)
    figure.update_xaxes(title_text=f"{step}, direction 1", row=2)
    figure.update_yaxes(title_text="direction 2", col=1)
    figure.update_layout(
        height=820,
        template="simple_white",
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": loss, "len": 0.46, "y": 0.77, **_ticks(landscapes)}},
        coloraxis2={"colorscale": "Viridis", "cmin": 0, "colorbar": {"title": error, "len": 0.46, "y": 0.23}},
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
    )
    return figure


def _surfaces(landscapes: Mapping[str, Lines], loss: str) -> go.Figure:
    """The loss as surfaces of one height scale."""
    count = len(landscapes)
    figure = make_subplots(rows=1, cols=count, specs=[[{"type": "surface"}] * count], subplot_titles=list(landscapes))
    for column, plane in enumerate(landscapes.values(), start=1):
        s, losses = plane.steps.numpy(), plane.losses.numpy().T
        surface = go.Surface(
            x=s, y=s, z=losses, surfacecolor=_logs(losses), coloraxis="coloraxis", hovertemplate="%{z:.4g}"
        )
        figure.add_trace(surface, 1, column)
    _, highest = positive_range(_all_losses(landscapes))
    figure.update_scenes(
        xaxis_title="direction 1",
        yaxis_title="direction 2",
        zaxis={"title": loss, "range": [0, highest]},
        camera={"eye": {"x": 1.5, "y": 1.5, "z": 0.9}},
    )
    figure.update_layout(
        height=520,
        coloraxis={"colorscale": "Viridis", "showscale": False},
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
    )
    return figure


def _traces(steps: Values, values: Values, index: int, name: str, emphasis: str, *, legend: bool) -> list[go.Scatter]:
    over, colour = summary(values), COLOURS[index]
    thick, dashed = (over.highest, over.mean) if emphasis == "max" else (over.mean, over.highest)
    words = ("maximum", "mean") if emphasis == "max" else ("mean", "maximum")
    common = {"x": steps, "legendgroup": name, "hovertemplate": "s = %{x:.3g}: %{y:.4g}"}
    traces = []
    if len(values) > 1:
        edge = {"x": steps, "legendgroup": name, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        fill = f"rgba({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:], 16)}, 0.2)"
        traces += [
            go.Scatter(y=over.high, showlegend=False, **edge),
            go.Scatter(y=over.low, fill="tonexty", fillcolor=fill, showlegend=False, **edge),
            go.Scatter(
                y=dashed, mode="lines", line={"color": colour, "width": 1, "dash": "dash"}, showlegend=False,
                name=f"{name}, {words[1]}", **common,
            ),
        ]  # fmt: skip
    label = name if len(values) < 2 else f"{name} ({words[0]})"
    traces.append(
        go.Scatter(
            y=thick, mode="lines+markers", line={"color": colour, "width": 2.5}, name=label, showlegend=legend,
            marker={"symbol": _MARKERS[index], "size": 6, "maxdisplayed": 12}, **common,
        )
    )  # fmt: skip
    if len(values) > 1:
        group = {**common, "legendgroup": f"{name}, single"}
        for number, line in enumerate(values):
            traces.append(
                go.Scatter(
                    y=line, mode="lines", line={"color": colour, "width": 0.7}, visible="legendonly",
                    name=f"{name}: single directions", showlegend=legend and number == 0, **group,
                )
            )  # fmt: skip
    return traces


def _all_losses(landscapes: Mapping[str, Lines]) -> Values:
    return np.concatenate([plane.losses.numpy().ravel() for plane in landscapes.values()])


def _logs(losses: Values) -> Values:
    return np.log10(np.maximum(losses, 1e-6))


def _ticks(landscapes: Mapping[str, Lines]) -> dict[str, list[object]]:
    """Ticks of a colour scale in log10, labelled by the losses."""
    values = np.geomspace(*positive_range(_all_losses(landscapes)), 7)
    return {"tickvals": [float(v) for v in np.log10(values)], "ticktext": [f"{v:.3g}" for v in values]}


def _page(
    figures: list[go.Figure], title: str, note: str, caption: str, facts: Mapping[str, Mapping[str, object]]
) -> str:
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    return template.render(
        title=title,
        note=note,
        caption=caption,
        facts=facts,
        keys=list(dict.fromkeys(key for values in facts.values() for key in values)),
        plotly=Markup(get_plotlyjs()),
        figures=[
            Markup(f.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, config=_CONFIG))
            for f in figures
        ],
    )

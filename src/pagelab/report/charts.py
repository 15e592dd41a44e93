"""Vega-Lite specifications, as dicts. Colours are CSS variables, so that a change between light
and dark (or to paper) needs no new drawing; fills of ledger states are SVG patterns of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]

FONT = '-apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
LABEL_WIDTH = 158  # of axes with method names, so that charts under each other line up
VALUE_WIDTH = 48  # of axes with numbers
CONFIG: Spec = {
    "background": "transparent",
    "font": FONT,
    "padding": {"left": 0, "top": 6, "right": 6, "bottom": 0},
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "gridColor": "var(--grid)",
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": "var(--rule)"},
    "axisY": {"minExtent": VALUE_WIDTH, "maxExtent": VALUE_WIDTH, "tickCount": 3},
}


def line_mark(color: str, dash: Sequence[int] = (), *, interpolate: str = "linear") -> Spec:
    mark: Spec = {"type": "line", "strokeWidth": 1.8, "stroke": color, "interpolate": interpolate}
    return mark | {"strokeDash": list(dash)} if dash else mark


def method_axis() -> Spec:
    axis = {
        "labelLimit": LABEL_WIDTH,
        "minExtent": LABEL_WIDTH,
        "maxExtent": LABEL_WIDTH,
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
    }
    return {"field": "method", "type": "nominal", "sort": None, "title": None, "axis": axis}


def time_axis(title: str | None = "seconds") -> Spec:
    """A time axis, with round values and few labels."""
    return {"title": title, "tickCount": 8, "labelFlush": True, "titleAnchor": "end"}


def bars(
    values: Sequence[Mapping[str, Any]],
    colors: Mapping[str, str],
    title: str | None,
    *,
    spread: bool,
) -> Spec:
    """Horizontal bars with their figures at their ends.

    Args:
        values: method, value, min, max and text of each bar.
        colors: a CSS colour a method.
        title: for the axis; None where it stands above the chart.
        spread: draw the range of the repeats.
    """
    x = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": True}}
    longest = max((float(v["max"]) for v in values), default=0.0) or 1.0
    # Room for the figures beyond the longest bar, also on a narrow screen.
    room = 1.06 + 0.035 * max((len(str(v["text"])) for v in values), default=0)
    axis = {"tickCount": 4, "labels": False, "domain": False, "titleAnchor": "start"}
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "height": 14, "cornerRadiusEnd": 2},
            "encoding": {
                "x": x | {"axis": axis, "scale": {"domain": [0, longest * room], "nice": False}},
                "fill": {
                    "field": "method",
                    "type": "nominal",
                    "scale": {"domain": list(colors), "range": list(colors.values())},
                    "legend": None,
                },
            },
        },
        {
            "mark": {
                "type": "text",
                "align": "left",
                "dx": 6,
                "color": "var(--ink)",
                "fontSize": 12,
            },
            "encoding": {
                "x": {"field": "max", "type": "quantitative"},
                "text": {"field": "text"},
            },
        },
    ]
    if spread:
        layers.append(
            {
                "mark": {"type": "rule", "color": "var(--ink)", "strokeWidth": 1.5},
                "encoding": {
                    "x": {"field": "min", "type": "quantitative"},
                    "x2": {"field": "max"},
                },
            }
        )
    return {
        "data": {"values": list(values)},
        "width": "container",
        "height": 26 * len(values),
        "encoding": {"y": method_axis()},
        "layer": layers,
    }


def lines(
    series: Sequence[tuple[str, str, Sequence[int]]],
    field: str,
    title: str,
    *,
    longest: float,
    height: int = 150,
) -> Spec:
    """One line a method over time, told apart by dashes too.

    Args:
        series: columns, colour and dashes of each method.
        field: the column to draw.
        title: of the vertical axis.
        longest: the right end of the time scale.
        height: pixels.
    """
    return {
        "width": "container",
        "height": height,
        "layer": [
            {
                "data": {"name": data},
                "mark": line_mark(color, dash, interpolate="step-before"),
                "encoding": {
                    "x": {
                        "field": "t",
                        "type": "quantitative",
                        "axis": time_axis(),
                        "scale": {"domain": [0, longest], "nice": False},
                    },
                    "y": {
                        "field": field,
                        "type": "quantitative",
                        "title": title,
                        "axis": {"format": "~s", "tickMinStep": 1},
                    },
                },
            }
            for data, color, dash in series
        ],
    }


def queue(data: str, color: str, dash: Sequence[int], *, longest: float, top: int) -> Spec:
    """Running and waiting requests of one method, for many small charts on the same scales.

    Args:
        data: the name of the columns.
        color: of the running requests' line; the waiting ones' is grey and dotted.
        dash: likewise.
        longest: the right end of the time scale.
        top: the upper end of the vertical scale.
    """
    x = {
        "field": "t",
        "type": "quantitative",
        "axis": time_axis(None) | {"tickCount": 4},
        "scale": {"domain": [0, longest], "nice": False},
    }
    y = {
        "type": "quantitative",
        "title": None,
        "axis": {"format": "d", "tickCount": 2, "tickMinStep": 1},
        "scale": {"domain": [0, top], "nice": False},
    }
    marks = {"waiting": line_mark("var(--muted)", (1, 3)), "running": line_mark(color, dash)}
    return {
        "width": "container",
        "height": 84,
        "data": {"name": data},
        "layer": [
            {
                "mark": mark | {"interpolate": "step-before"},
                "encoding": {"x": x, "y": y | {"field": field}},
            }
            for field, mark in marks.items()
        ],
    }


def distributions(
    series: Sequence[tuple[str, str, Sequence[int]]],
    title: str,
    *,
    log: bool,
    objective: tuple[float, str, bool] | None = None,
) -> Spec:
    """Cumulative distributions: the share of values at or below each value.

    Args:
        series: columns, colour and dashes of each method.
        title: of the horizontal axis.
        log: whether its scale is one.
        objective: a limit to mark, its label, and whether the label stands left of the mark.
    """
    x: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": f"{title}, seconds{' (log scale)' if log else ''}",
        "axis": {"tickCount": 5, "format": ".3~r", "titleAnchor": "end", "labelOverlap": True},
        "scale": {"type": "log", "nice": False} if log else {"zero": True},
    }
    y: Spec = {
        "field": "share",
        "type": "quantitative",
        "title": None,
        "axis": {"format": ".0%", "values": [0, 0.5, 0.95]},
        "scale": {"domain": [0, 1]},
    }
    layer: list[Spec] = [
        {
            "data": {"name": data},
            "mark": line_mark(color, dash, interpolate="step-after"),
            "encoding": {"x": x, "y": y},
        }
        for data, color, dash in series
    ]
    if objective is not None:
        layer += _objective(*objective, x)
    return {"width": "container", "height": 150, "layer": layer}


def _objective(limit: float, label: str, left: bool, x: Spec) -> list[Spec]:
    """A vertical rule with its label at the foot, where curves have not risen or have passed."""
    values = {"values": [{"x": limit, "label": label}]}
    text = {
        "type": "text",
        "align": "right" if left else "left",
        "dx": -5 if left else 5,
        "y": 142,
        "fontSize": 11,
        "color": "var(--ink)",
        "stroke": "var(--bg)",
        "strokeWidth": 3,
    }
    rule = {"type": "rule", "color": "var(--ink)", "strokeWidth": 1.2, "strokeDash": [5, 2, 1, 2]}
    return [
        {"data": values, "mark": rule, "encoding": {"x": x}},
        {"data": values, "mark": text, "encoding": {"x": x, "text": {"field": "label"}}},
    ]


def memory_lines(
    data: str, fields: Sequence[str], marks: Sequence[Mapping[str, Any]], top: float, end: float
) -> Spec:
    """Memory of one process over time, with numbered snapshots.

    Args:
        data: the name of the columns.
        fields: the columns: `rss`, and `device` where there is one.
        marks: number, t and mib of each snapshot.
        top: the upper end of the vertical scale, MiB.
        end: the right end of the time scale, seconds.
    """
    y_axis = {"tickCount": 3, "format": ",.0f"}
    encoding = {
        "x": {
            "field": "t",
            "type": "quantitative",
            "axis": time_axis(),
            "scale": {"domain": [0, end], "nice": False},
        }
    }
    scale = {"domain": [0, top], "nice": True}
    layers: list[Spec] = [
        {
            "data": {"name": data},
            "mark": line_mark("var(--accent)")
            if field == "rss"
            else line_mark("var(--warm)", (6, 3)),
            "encoding": {
                "y": {
                    "field": field,
                    "type": "quantitative",
                    "title": "MiB",
                    "axis": y_axis,
                    "scale": scale,
                }
            },
        }
        for field in fields
    ]
    numbered = {"values": list(marks)}
    at = {"y": {"field": "mib", "type": "quantitative", "scale": scale}}
    layers += [
        {
            "data": numbered,
            "mark": {"type": "point", "filled": True, "size": 22, "color": "var(--ink)"},
            "encoding": at,
        },
        {
            "data": numbered,
            "transform": [{"filter": "datum.shown"}],
            "mark": {
                "type": "text",
                "dy": -9,
                "fontSize": 10,
                "color": "var(--ink)",
                "baseline": "bottom",
            },
            "encoding": at | {"text": {"field": "number"}},
        },
    ]
    return {"width": "container", "height": 110, "encoding": encoding, "layer": layers}

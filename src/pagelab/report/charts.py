"""Vega-Lite specifications, as dicts. Colours are CSS variables, so that a change between light
and dark (or to paper) needs no new drawing; fills of ledger states are SVG patterns of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagelab.report.words import STATES

Spec = dict[str, Any]

FONT = '-apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
LABEL_WIDTH = 150  # of axes with method names, so that charts under each other line up
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


def _line(color: str, dash: Sequence[int] = (), *, interpolate: str = "linear") -> Spec:
    mark: Spec = {"type": "line", "strokeWidth": 1.8, "stroke": color, "interpolate": interpolate}
    return mark | {"strokeDash": list(dash)} if dash else mark


def _method_axis() -> Spec:
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
    values: Sequence[Mapping[str, Any]], colors: Mapping[str, str], title: str, *, spread: bool
) -> Spec:
    """Horizontal bars with their figures at their ends.

    Args:
        values: method, value, min, max and text of each bar.
        colors: a CSS colour a method.
        title: for the axis.
        spread: draw the range of the repeats.
    """
    x = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": True}}
    # Room for the figures beyond the longest bar.
    longest = max((float(v["max"]) for v in values), default=0.0) or 1.0
    axis = {"tickCount": 4, "labels": False, "domain": False, "titleAnchor": "start"}
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "height": 14, "cornerRadiusEnd": 2},
            "encoding": {
                "x": x | {"axis": axis, "scale": {"domain": [0, longest * 1.18], "nice": False}},
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
        "encoding": {"y": _method_axis()},
        "layer": layers,
    }


def state_fill() -> Spec:
    """The fill of a ledger state: a pattern, so that colour alone is never needed."""
    names = [state.name for state in STATES]
    return {
        "field": "state",
        "type": "nominal",
        "scale": {"domain": names, "range": [f"url(#fill-{name})" for name in names]},
        "legend": None,
    }


def _folded(more: Sequence[Spec] = ()) -> list[Spec]:
    names = [state.name for state in STATES]
    order = f"indexof({names!r}, datum.state)"
    return [
        {"fold": names, "as": ["state", "slots"]},
        {"calculate": order, "as": "order"},
        *more,
    ]


def pool_areas(data: str, slots: int, longest: float, *, titled: bool) -> Spec:
    """The pool over time, stacked by ledger state.

    Args:
        data: the name of the columns.
        slots: the upper end of the vertical scale.
        longest: the right end of the time scale; the parameter `end` changes it later.
        titled: write what the time axis shows: under the last of several strips.
    """
    return {
        "data": {"name": data},
        "params": [{"name": "end", "value": longest}],
        "width": "container",
        "height": 76,
        "transform": _folded(),
        "mark": {"type": "area", "interpolate": "step-before", "line": False, "clip": True},
        "encoding": {
            "x": {
                "field": "t",
                "type": "quantitative",
                "axis": time_axis("seconds" if titled else None),
                "scale": {"domainMin": 0, "domainMax": {"expr": "end"}, "nice": False},
            },
            "y": {
                "field": "slots",
                "type": "quantitative",
                "stack": "zero",
                "title": "slots",
                "axis": {"tickCount": 2, "format": ",d"},
                "scale": {"domain": [0, slots], "nice": False},
            },
            "fill": state_fill(),
            "order": {"field": "order", "type": "quantitative"},
        },
    }


def pool_shares(values: Sequence[Mapping[str, Any]]) -> Spec:
    """The mean division of each method's pool, as bars of 100 %."""
    return {
        "data": {"values": list(values)},
        "width": "container",
        "height": 30 * len(values),
        "transform": _folded(),
        "mark": {"type": "bar", "height": 18},
        "encoding": {
            "y": _method_axis(),
            "x": {
                "field": "slots",
                "type": "quantitative",
                "stack": "zero",
                "title": None,
                "axis": {"format": ".0%", "tickCount": 5, "labelOverlap": True, "labelFlush": True},
                "scale": {"domain": [0, 1], "nice": False},
            },
            "fill": state_fill(),
            "order": {"field": "order", "type": "quantitative"},
        },
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
                "mark": _line(color, dash, interpolate="step-before"),
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


def distributions(
    series: Sequence[tuple[str, str, Sequence[int]]], title: str, *, log: bool
) -> Spec:
    """Cumulative distributions: the share of values at or below each value."""
    scale: Spec = {"type": "log", "nice": False} if log else {"zero": True}
    return {
        "width": "container",
        "height": 150,
        "layer": [
            {
                "data": {"name": data},
                "mark": _line(color, dash, interpolate="step-after"),
                "encoding": {
                    "x": {
                        "field": "x",
                        "type": "quantitative",
                        "title": f"{title}, seconds{' (log scale)' if log else ''}",
                        "axis": {
                            "tickCount": 5,
                            "format": ".3~r",
                            "titleAnchor": "end",
                            "labelOverlap": True,
                        },
                        "scale": scale,
                    },
                    "y": {
                        "field": "share",
                        "type": "quantitative",
                        "title": None,
                        "axis": {"format": ".0%", "values": [0, 0.5, 0.95]},
                        "scale": {"domain": [0, 1]},
                    },
                },
            }
            for data, color, dash in series
        ],
    }


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
            "mark": _line("var(--accent)") if field == "rss" else _line("var(--warm)", (6, 3)),
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

"""Vega-Lite specifications of a load run's page, beside those of `charts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagelab.report.charts import Spec, distributions, line_mark, time_axis

_HEIGHT = 150


def distribution(
    data: str,
    title: str,
    marks: Sequence[Mapping[str, float]],
    *,
    log: bool,
    objective: tuple[float, str, bool] | None,
) -> Spec:
    """A cumulative distribution with its percentiles and their 95 % intervals on it.

    Args:
        data: the name of the curve's columns.
        title: of the horizontal axis.
        marks: share, x, low and high of each percentile, in seconds.
        log: whether the horizontal scale is one.
        objective: as of `charts.distributions`.
    """
    spec = distributions([(data, "var(--accent)", ())], title, log=log, objective=objective)
    values = {"values": [dict(mark) for mark in marks]}
    x: Spec = {"field": "low", "type": "quantitative"}
    y: Spec = {"field": "share", "type": "quantitative"}
    spec["layer"] += [
        {
            "data": values,
            "mark": {"type": "rule", "strokeWidth": 4, "opacity": 0.45, "color": "var(--warm)"},
            "encoding": {"x": x, "x2": {"field": "high"}, "y": y},
        },
        {
            "data": values,
            "mark": {"type": "point", "filled": True, "size": 34, "color": "var(--warm)"},
            "encoding": {"x": x | {"field": "x"}, "y": y},
        },
    ]
    return spec


def open_requests(data: str, longest: float) -> Spec:
    """Requests that have not ended, and those of them without a token, over time.

    Args:
        data: columns t, open and waiting.
        longest: the right end of the time scale, seconds.
    """
    marks = {"open": line_mark("var(--accent)"), "waiting": line_mark("var(--warm)", (6, 3))}
    y: Spec = {
        "type": "quantitative",
        "title": None,
        "axis": {"format": "d", "tickMinStep": 1},
        "scale": {"zero": True},
    }
    return _over_time(
        data,
        longest,
        [
            {
                "mark": mark | {"interpolate": "step-after"},
                "encoding": {"y": y | {"field": field}},
            }
            for field, mark in marks.items()
        ],
    )


def token_rate(data: str, longest: float) -> Spec:
    """Output tokens a second over time.

    Args:
        data: columns t (the beginning of a stretch) and rate.
        longest: the right end of the time scale, seconds.
    """
    y: Spec = {
        "field": "rate",
        "type": "quantitative",
        "title": None,
        "axis": {"format": ",.2~f"},
        "scale": {"zero": True},
    }
    mark = line_mark("var(--accent)", interpolate="step-after")
    return _over_time(data, longest, [{"mark": mark, "encoding": {"y": y}}])


def first_tokens(data: str, failed: Sequence[float], longest: float, *, log: bool) -> Spec:
    """A point a request: when it was due, and its TTFT. Failed ones are crosses at the foot.

    Args:
        data: columns t and ttft, in seconds.
        failed: when the failed ones were due, seconds.
        longest: the right end of the time scale, seconds.
        log: whether the vertical scale is one.
    """
    y: Spec = {
        "field": "ttft",
        "type": "quantitative",
        "title": None,
        "axis": {"format": ".3~r"},
        "scale": {"type": "log"} if log else {"zero": True},
    }
    point = {"type": "point", "filled": True, "size": 26, "opacity": 0.7, "color": "var(--accent)"}
    cross = {
        "type": "point",
        "shape": "M-1 -1L1 1M-1 1L1 -1",
        "size": 60,
        "strokeWidth": 1.8,
        "stroke": "var(--warm)",
        "y": _HEIGHT - 6,
    }
    layers: list[Spec] = [{"mark": point, "encoding": {"y": y}}]
    if failed:
        layers.append({"data": {"values": [{"t": t} for t in failed]}, "mark": cross})
    return _over_time(data, longest, layers)


def _over_time(data: str, longest: float, layers: list[Any]) -> Spec:
    x = {
        "field": "t",
        "type": "quantitative",
        "axis": time_axis(),
        "scale": {"domain": [0, longest], "nice": False},
    }
    return {
        "width": "container",
        "height": _HEIGHT,
        "data": {"name": data},
        "encoding": {"x": x},
        "layer": layers,
    }

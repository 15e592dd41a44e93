"""Vega-Lite specifications of sweeps: a line a method over the values of a setting."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pagelab.report.charts import Spec, line_mark
from pagelab.report.styles import Style


def sweep_lines(
    series: Sequence[tuple[str, Style]],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    log: bool,
    share: bool,
    spread: bool,
) -> Spec:
    """Lines with a point at each value that was run.

    Args:
        series: columns (`x`, `value`, `min`, `max`) and look of each method.
        values: of the setting, in order; the axis has a tick at each.
        labels: of the ticks.
        log: space the values by their ratio, not by their difference.
        share: the figures are shares: show them in percent.
        spread: draw the range of the repeats.
    """
    room = (values[-1] / values[0]) ** 0.05 if log else (values[-1] - values[0]) * 0.05
    ends = [values[0] / room, values[-1] * room] if log else [values[0] - room, values[-1] + room]
    scale: Spec = {"domain": ends, "nice": False, "zero": False}
    named = f"{json.dumps(list(labels))}[indexof({json.dumps(list(values))}, datum.value)]"
    x = {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "axis": {"values": list(values), "labelExpr": named, "labelOverlap": True, "ticks": True},
        "scale": scale | {"type": "log", "base": 2} if log else scale,
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "axis": {"format": ".0%" if share else ",.4~r", "tickCount": 4},
        "scale": {"zero": True, "nice": True},
    }
    layer: list[Spec] = []
    for data, style in series:
        named_data = {"name": data}
        at = {"x": x, "y": y}
        layer.append(
            {"data": named_data, "mark": line_mark(style.color, style.dash), "encoding": at}
        )
        if spread:
            rule = {"type": "rule", "color": style.color, "strokeWidth": 1}
            ends_of = at | {"y": y | {"field": "min"}, "y2": {"field": "max"}}
            layer.append({"data": named_data, "mark": rule, "encoding": ends_of})
        point = {
            "type": "point",
            "shape": style.shape,
            "size": 70,
            "fill": style.color if style.filled else "var(--bg)",
            "stroke": style.color,
            "strokeWidth": 1.7,
            "opacity": 1,
        }
        layer.append({"data": named_data, "mark": point, "encoding": at})
    return {"width": "container", "height": 170, "layer": layer}

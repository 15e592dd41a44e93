"""Vega-Lite specifications of the KV pool: stacked over time, and on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagelab.report.charts import Spec, method_axis, time_axis
from pagelab.report.words import STATES

ROUNDING = "rounded up"  # the part of `external` that has a segment of its own in `pool_shares`
_LEAST_LABELLED = 0.055  # of the pool: narrower segments have no room for their figure


def _state_fill() -> Spec:
    """The fill of a ledger state: a pattern, so that colour alone is never needed."""
    names = [*(state.name for state in STATES), ROUNDING]
    fills = [f"url(#fill-{name.replace(' ', '-')})" for name in names]
    return {
        "field": "state",
        "type": "nominal",
        "scale": {"domain": names, "range": fills},
        "legend": None,
    }


def pool_areas(data: str, slots: int, longest: float, *, titled: bool) -> Spec:
    """The pool over time, stacked by ledger state.

    Args:
        data: the name of the columns.
        slots: the upper end of the vertical scale.
        longest: the right end of the time scale; the parameter `end` changes it later.
        titled: write what the time axis shows: under the last of several strips.
    """
    names = [state.name for state in STATES]
    return {
        "data": {"name": data},
        "params": [{"name": "end", "value": longest}],
        "width": "container",
        "height": 76,
        "transform": [
            {"fold": names, "as": ["state", "slots"]},
            {"calculate": f"indexof({names!r}, datum.state)", "as": "order"},
        ],
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
            "fill": _state_fill(),
            "order": {"field": "order", "type": "quantitative"},
        },
    }


def share_segments(
    name: str, shares: Mapping[str, float], rounding: float
) -> list[dict[str, object]]:
    """One method's bar, cut into states; what was rounded up is set apart from `external`.

    ::

        | live          | reserved | internal      | free | external | rounded up |
        start           end

    Args:
        name: of the method.
        shares: of the pool, by ledger state.
        rounding: of `external`.
    """
    parts: list[tuple[str, float]] = [(state.name, shares[state.name]) for state in STATES]
    rounding = min(rounding, shares["external"])
    parts = [*parts[:-1], ("external", shares["external"] - rounding), (ROUNDING, rounding)]
    segments: list[dict[str, object]] = []
    start = 0.0
    for state, share in parts:
        if share > 0:
            base = "external" if state == ROUNDING else state
            segments.append(
                {
                    "method": name,
                    "state": state,
                    "start": round(start, 5),
                    "end": round(start + share, 5),
                    "middle": round(start + share / 2, 5),
                    "text": f"{share:.0%}" if share >= _LEAST_LABELLED else "",
                    "ink": "var(--live-ink)" if state == "live" else "var(--ink)",
                    "halo": f"var(--{base})",
                }
            )
        start += share
    return segments


def pool_shares(segments: Sequence[Mapping[str, object]], methods: int) -> Spec:
    """The mean division of each method's pool, as bars of 100 %: the paper's figure.

    Args:
        segments: of all methods, as `share_segments` gives them.
        methods: how many there are.
    """
    scale = {"domain": [0, 1], "nice": False}
    axis = {"format": ".0%", "tickCount": 5, "labelOverlap": True, "labelFlush": True}
    x = {"field": "start", "type": "quantitative", "title": None, "axis": axis, "scale": scale}
    label = {"type": "text", "fontSize": 11, "strokeWidth": 3.5}
    return {
        "data": {"values": list(segments)},
        "width": "container",
        "height": 30 * methods,
        "encoding": {"y": method_axis()},
        "layer": [
            {
                "mark": {"type": "bar", "height": 18},
                "encoding": {"x": x, "x2": {"field": "end"}, "fill": _state_fill()},
            },
            {
                "transform": [{"filter": "datum.text !== ''"}],
                "mark": label,
                "encoding": {
                    "x": x | {"field": "middle"},
                    "text": {"field": "text"},
                    "fill": {"field": "ink", "type": "nominal", "scale": None},
                    "stroke": {"field": "halo", "type": "nominal", "scale": None},
                },
            },
        ],
    }

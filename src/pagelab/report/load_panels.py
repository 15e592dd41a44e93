"""What a load run's page shows: figures with their confidence, distributions, the run over time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from pagelab.report import load_charts
from pagelab.report.charts import bars
from pagelab.report.figures import interval, percent, rate, seconds
from pagelab.report.page import Page, Panel
from pagelab.report.series import MAX_POINTS, cdf_columns, thin

Record = dict[str, Any]
"""A record of `pagelab bench serve`: schema `pagelab.bench.serve`, version 1."""

PERCENTILES = (50, 90, 95, 99)
_BINS = 60  # stretches of time of the token rate


class Measure(NamedTuple):
    """A latency of the load tool; values in seconds, of requests that ended well."""

    name: Literal["ttft", "itl", "tpot", "e2e"]
    title: str
    of: Callable[[Record], list[float]]


def _ttft(request: Record) -> list[float]:
    return [request["chunk_times_s"][0] - request["due_s"]]


def _gaps(request: Record) -> list[float]:
    return [after - before for before, after in itertools.pairwise(request["chunk_times_s"])]


def _tpot(request: Record) -> list[float]:
    n = request["output_tokens"]
    return [(request["end_s"] - request["chunk_times_s"][0]) / (n - 1)] if n > 1 else []


MEASURES = (
    Measure("ttft", "from when it was due to its first text", _ttft),
    Measure("itl", "gaps between chunks of text, pooled", _gaps),
    Measure("tpot", "time per output token, a request", _tpot),
    Measure("e2e", "from when it was due to its end", lambda r: [r["end_s"] - r["due_s"]]),
)


def figure(record: Record, name: str, words: Callable[[float], str]) -> dict[str, str]:
    """A figure's text and its 95 % interval, as the macro `cell` shows them."""
    found = record["figures"][name]
    low, high = words(found["low"]), words(found["high"])
    return {"text": words(found["value"]), "range": interval(low, high)}


def latency_panels(record: Record, page: Page) -> list[Panel]:
    """A distribution and a row of percentiles of each measure that has values."""
    done = completed(record)
    panels = []
    for measure in MEASURES:
        values = [value for request in done for value in measure.of(request)]
        if not values:
            continue
        limit = record["settings"]["objectives"].get(f"{measure.name}_s")
        names = [f"{measure.name}_mean_s", *(f"{measure.name}_p{q}_s" for q in PERCENTILES)]
        within = "–"
        if limit is not None:
            within = percent(sum(value <= limit for value in values) / len(values))
        data = page.add_data(cdf_columns(values))
        panels.append(
            {
                "short": measure.name.upper(),
                "title": measure.title,
                "count": f"{len(values):,}",
                "cells": [figure(record, name, seconds) for name in names],
                "most": seconds(max(values)),
                "within": within,
                "chart": _distribution(record, measure, data, values, limit, page),
                "data": data,
            }
        )
    return panels


def _distribution(
    record: Record,
    measure: Measure,
    data: str,
    values: Sequence[float],
    limit: float | None,
    page: Page,
) -> Panel:
    low, high = min(values), max(values)
    if limit is not None:
        low, high = min(low, limit), max(high, limit)
    log = low > 0 and high / low > 50  # a log scale cannot show a zero
    objective = None
    if limit is not None:
        middle = (low * high) ** 0.5 if log else high / 2
        objective = (limit, f"objective {seconds(limit)}", limit > middle)
    marks = []
    for q in PERCENTILES:
        found = record["figures"][f"{measure.name}_p{q}_s"]
        mark = {"share": q / 100, "x": found["value"], "low": found["low"], "high": found["high"]}
        marks.append(mark)
    short = measure.name.upper()
    spec = load_charts.distribution(data, short, marks, log=log, objective=objective)
    hover = {"mode": "after", "unit": "share", "rows": [[data, "share", short]]}
    return page.add_chart(spec, f"Distribution of {short} with its percentiles", [data], hover)


def time_panels(record: Record, page: Page) -> list[Panel]:
    """Requests at once, tokens a second and each request's TTFT, over the time of the run."""
    longest = max((request["end_s"] for request in record["requests"]), default=0.0)
    if longest <= 0:
        return []
    at_once = page.add_data(_open_columns(record["requests"]))
    tokens = page.add_data(_rate_columns(record["requests"], longest))
    panels = [
        {
            "title": "Requests at once",
            "note": "open (line), of them without text yet (dashes)",
            "chart": page.add_chart(
                load_charts.open_requests(at_once, longest),
                "Requests that have not ended, and those without text yet, over time",
                [at_once],
                {
                    "mode": "after",
                    "unit": "requests",
                    "rows": [[at_once, "open", "open"], [at_once, "waiting", "without text"]],
                },
            ),
            "data": at_once,
        },
        {
            "title": "Output tokens a second",
            "note": f"over stretches of {seconds(longest / _BINS)}",
            "chart": page.add_chart(
                load_charts.token_rate(tokens, longest),
                "Output tokens a second over time",
                [tokens],
                {"mode": "after", "unit": "tokens/s", "rows": [[tokens, "rate", "output"]]},
            ),
            "data": tokens,
        },
    ]
    return [*panels, _first_tokens(record, longest, page)]


def _first_tokens(record: Record, longest: float, page: Page) -> Panel:
    points = sorted((request["due_s"], _ttft(request)[0]) for request in completed(record))
    full = {"t": [round(t, 4) for t, _ in points], "ttft": [float(f"{v:.5g}") for _, v in points]}
    kept = thin(full, ("ttft",), MAX_POINTS)
    data = page.add_data({name: [column[i] for i in kept] for name, column in full.items()})
    failed = [r["due_s"] for r in record["requests"] if r["error"] is not None][:MAX_POINTS]
    ttfts = full["ttft"] or [0.0]
    log = min(ttfts) > 0 and max(ttfts) / min(ttfts) > 50
    note = "seconds, by when the request was due" + (" (log scale)" if log else "")
    if len(kept) < len(points):
        note += f"; {len(kept):,} of {len(points):,}, the outline kept"
    if failed:
        note += "; crosses are failed requests"
    spec = load_charts.first_tokens(data, failed, longest, log=log)
    label = "TTFT of each request by when it was due, and failed requests"
    return {
        "title": "TTFT of each request",
        "note": note,
        "chart": page.add_chart(spec, label, [data]),
        "data": data,
    }


def offline_panel(record: Record, page: Page) -> Panel | None:
    """Against the offline engine; None where that was not given."""
    offline = record.get("offline")
    if offline is None:
        return None
    ours = record["figures"]["output_tokens_per_s"]
    base = offline["output_tokens_per_s"]
    values = [
        {
            "method": "through the server",
            "value": ours["value"],
            "min": ours["low"],
            "max": ours["high"],
            "text": rate(ours["value"]),
        },
        {"method": "offline engine", "value": base, "min": base, "max": base, "text": rate(base)},
    ]
    colors = {"through the server": "var(--accent)", "offline engine": "var(--traditional-0)"}
    return {
        "share": percent(offline["ratio"]),
        "chart": page.add_chart(
            bars(values, colors, None, spread=True),
            f"Output tokens a second: {rate(ours['value'])} through the server, "
            f"{rate(base)} by the offline engine",
        ),
    }


def completed(record: Record) -> list[Record]:
    """Requests that ended well."""
    return [request for request in record["requests"] if request["error"] is None]


def errors(record: Record) -> list[tuple[str, int]]:
    """What went wrong and how often, the most frequent first."""
    found = Counter(r["error"] for r in record["requests"] if r["error"] is not None)
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


def _open_columns(requests: Sequence[Record]) -> dict[str, list[Any]]:
    changes: list[tuple[float, int, int]] = []
    for request in requests:
        first = request["chunk_times_s"][0] if request["chunk_times_s"] else request["end_s"]
        changes += [(request["due_s"], 1, 1), (first, 0, -1), (request["end_s"], -1, 0)]
    changes.sort()
    full: dict[str, list[float]] = {
        "t": [0.0, *(round(t, 4) for t, _, _ in changes)],
        "open": [0, *itertools.accumulate(change for _, change, _ in changes)],
        "waiting": [0, *itertools.accumulate(change for _, _, change in changes)],
    }
    kept = thin(full, ("open", "waiting"), MAX_POINTS)
    return {name: [column[i] for i in kept] for name, column in full.items()}


def _rate_columns(requests: Sequence[Record], longest: float) -> dict[str, list[Any]]:
    """A chunk may bring several tokens: each of a request's counts for the same share of them."""
    width = longest / _BINS
    tokens = [0.0] * _BINS
    for request in requests:
        times = request["chunk_times_s"]
        for moment in times:
            place = min(_BINS - 1, max(0, int(moment / width)))
            tokens[place] += request["output_tokens"] / len(times)
    starts = [round(i * width, 4) for i in range(_BINS + 1)]
    rates = [float(f"{count / width:.5g}") for count in tokens]
    return {"t": starts, "rate": [*rates, rates[-1]]}

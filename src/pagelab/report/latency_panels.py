"""The section on latency: distributions, percentiles, and who met the objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from pagelab import metrics
from pagelab.report.charts import distributions
from pagelab.report.figures import percent, seconds
from pagelab.report.page import Page, Panel
from pagelab.report.rows import Method, first_run, shown, workload_names
from pagelab.report.series import cdf_columns
from pagelab.results import RequestResult, Results

Found = list[tuple[Method, list[float]]]


class _Latency(NamedTuple):
    """A kind of latency."""

    short: str
    title: str
    of: Callable[[RequestResult], list[float]]
    objective: Literal["ttft_s", "tpot_s", "e2e_s"] | None = None


def _tpot(request: RequestResult) -> list[float]:
    value = metrics.tpot(request)
    return [] if value is None else [value]


_LATENCIES = (
    _Latency("TTFT", "time to first token", lambda r: [metrics.ttft(r)], "ttft_s"),
    _Latency("TPOT", "time per output token, a request", _tpot, "tpot_s"),
    _Latency("ITL", "gap between tokens, pooled", metrics.inter_token_latencies),
    _Latency("E2E", "end to end", lambda r: [metrics.end_to_end(r)], "e2e_s"),
)


def latency_panels(results: Results, page: Page) -> list[Panel]:
    """Distributions of TTFT, TPOT, ITL and E2E, one panel a workload."""
    objectives = results["experiment"]["objectives"]
    panels = []
    for name in workload_names(results):
        measures = []
        for kind in _LATENCIES:
            found: Found = []
            for method in shown(results):
                run = first_run(method, name)
                done = metrics.completed(run["requests"]) if run else []
                values = [value for request in done for value in kind.of(request)]
                if values:
                    found.append((method, values))
            limit = objectives[kind.objective] if kind.objective else None
            measures.append(_measure(kind, found, limit, name, page))
        panels.append({"workload": name, "measures": measures})
    return panels


def _measure(kind: _Latency, found: Found, limit: float | None, workload: str, page: Page) -> Panel:
    table = []
    for method, values in found:
        figures = [metrics.percentile(values, q) for q in (50, 90, 95, 99)]
        cells = [metrics.mean(values), *figures, max(values)]
        within = "–"
        if limit is not None:
            within = percent(sum(value <= limit for value in values) / len(values))
        table.append((method, len(values), [*(seconds(v) for v in cells), within]))
    series = [(page.add_data(cdf_columns(values)), m) for m, values in found]
    return {
        "short": kind.short,
        "title": kind.title,
        "objective": None if limit is None else seconds(limit),
        "chart": _chart(kind, found, series, limit, workload, page) if found else None,
        "series": series,
        "table": table,
    }


def _chart(
    kind: _Latency,
    found: Found,
    series: list[tuple[str, Method]],
    limit: float | None,
    workload: str,
    page: Page,
) -> Panel:
    every = [value for _, values in found for value in values]
    low, high = min(every), max(every)
    if limit is not None:
        low, high = min(low, limit), max(high, limit)
    # Queueing spreads TTFT over decades; a log scale cannot show a zero.
    log = low > 0 and high / low > 50
    objective = None
    if limit is not None:
        middle = (low * high) ** 0.5 if log else high / 2
        objective = (limit, f"objective {seconds(limit)}", limit > middle)
    drawn = [(data, m.color, m.dash) for data, m in series]
    spec = distributions(drawn, kind.short, log=log, objective=objective)
    hover = {
        "mode": "after",
        "unit": "share",
        "rows": [[data, "share", m.name] for data, m in series],
    }
    marked = f", objective {seconds(limit)} marked" if limit is not None else ""
    label = f"Distribution of {kind.short} on {workload}{marked}"
    return page.add_chart(spec, label, [data for data, _ in series], hover)

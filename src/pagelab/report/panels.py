"""The sections of the HTML report that have charts: what each shows, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pagelab import metrics
from pagelab.config import format_bytes
from pagelab.report import charts
from pagelab.report.figures import (
    Method,
    Row,
    first_run,
    interval,
    methods,
    percent,
    rate,
    rows,
    seconds,
)
from pagelab.report.series import (
    Columns,
    cdf_columns,
    has_ledger,
    memory_columns,
    step_columns,
)
from pagelab.report.words import STATES
from pagelab.results import RequestResult, Results, Spread, WorkloadRun

Panel = dict[str, Any]


class Page:
    """Collects the charts of a page and the columns that they draw."""

    def __init__(self) -> None:
        self.charts: list[dict[str, Any]] = []
        self.data: dict[str, Columns] = {}

    def add_data(self, columns: Columns) -> str:
        """Keep columns under a new name."""
        name = f"d{len(self.data)}"
        self.data[name] = columns
        return name

    def add_chart(
        self,
        spec: charts.Spec,
        label: str,
        uses: Sequence[str] = (),
        hover: Mapping[str, Any] | None = None,
    ) -> Panel:
        """Keep a chart; the template draws a place for it.

        Args:
            spec: Vega-Lite.
            label: what it shows, for those who cannot see it.
            uses: names of the columns that it draws.
            hover: figures at the pointer: `mode` (`before`: the first entry at or after it,
                `after`: the last one up to it), `unit`, and rows of data, field and label.
        """
        identity = f"chart-{len(self.charts)}"
        self.charts.append({"id": identity, "spec": spec, "uses": list(uses), "hover": hover})
        return {"id": identity, "label": label, "height": spec["height"] + 36}


def workload_names(results: Results) -> list[str]:
    """Workloads that any method finished, in the order in which they were asked."""
    done = {w["name"] for run in results["runs"] for w in run["workloads"]}
    return [w["name"] for w in results["experiment"]["workloads"] if w["name"] in done]


def method_panels(results: Results, page: Page) -> list[Panel]:
    """The methods side by side, one panel a workload."""
    return [_method_panel(rows(results, name), name, page) for name in workload_names(results)]


def _method_panel(table: list[Row], workload: str, page: Page) -> Panel:
    bars = []
    for key, title in (
        ("output_tokens_per_s", "output tokens a second"),
        ("mean_running", "requests running at once, mean"),
    ):
        values = [_bar(row, row.summary[key]) for row in table]  # type: ignore[literal-required]
        colors = {row.method.label: row.method.color for row in table}
        spread = any(row.summary["repeats"] > 1 for row in table)
        if values:
            spec = charts.bars(values, colors, title, spread=spread)
            bars.append(page.add_chart(spec, f"{title} of each method on {workload}"))
    return {"workload": workload, "rows": [_method_cells(row) for row in table], "charts": bars}


def _bar(row: Row, spread: Spread) -> dict[str, Any]:
    return {
        "method": row.method.label,
        "value": spread["median"],
        "min": spread["min"],
        "max": spread["max"],
        "text": rate(spread["median"]),
    }


def _method_cells(row: Row) -> Panel:
    summary, method = row.summary, row.method

    def cell(spread: Spread, show: Callable[[float], str]) -> Panel:
        return {
            "text": show(spread["median"]),
            "range": interval(show(spread["min"]), show(spread["max"])),
        }

    def plain(text: str, below: str = "") -> Panel:
        return {"text": text, "range": below}

    kv = method.kv

    return {
        "method": method,
        "repeats": summary["repeats"],
        "cells": [
            cell(summary["output_tokens_per_s"], rate),
            cell(summary["duration_s"], seconds),
            cell(summary["ttft_mean_s"], seconds),
            cell(summary["ttft_p95_s"], seconds),
            cell(summary["itl_mean_s"], seconds),
            cell(summary["mean_running"], rate),
            plain(str(row.peak_running)),
            cell(summary["live_share"], percent),
            plain(f"{kv['slots']:,} slots", format_bytes(kv["bytes"])) if kv else plain("–"),
            cell(summary["peak_rss_bytes"], format_bytes),
            plain("–" if method.startup_s is None else seconds(method.startup_s)),
        ],
    }


def pool_panels(results: Results, page: Page) -> list[Panel]:
    """The pool over time and on average, one panel a workload, all methods on the same scales."""
    panels = []
    for name in workload_names(results):
        table = rows(results, name)
        runs = [(row, run) for row in table if (run := first_run(row.method, name)) is not None]
        panels.append(_pool_panel(name, runs, page))
    return panels


def _pool_panel(workload: str, runs: list[tuple[Row, WorkloadRun]], page: Page) -> Panel:
    longest = max((run["duration_s"] for _, run in runs), default=0.0)
    slots = max((row.method.kv["slots"] for row, _ in runs if row.method.kv), default=0)
    strips = []
    for i, (row, run) in enumerate(runs, 1):
        columns = step_columns(run) if has_ledger(run) else None
        strip: Panel = {"method": row.method, "note": _pool_note(row, run), "chart": None}
        if columns is not None:
            data = page.add_data(columns)
            spec = charts.pool_areas(data, slots, longest, titled=i == len(runs))
            hover = {
                "mode": "before",
                "unit": "slots",
                "rows": [[data, s.name, s.name] for s in STATES],
                "own": columns["t"][-1],
                "same": longest,
            }
            label = f"KV pool of {row.method.label} on {workload} over time, by ledger state"
            strip |= {"chart": page.add_chart(spec, label, [data], hover), "data": data}
        strips.append(strip)
    shares = [{"method": row.method.label} | row.shares for row, _ in runs if row.shares]
    mean = None
    if shares:
        label = f"Mean division of the KV pool on {workload}"
        mean = page.add_chart(charts.pool_shares(shares), label)
    return {
        "workload": workload,
        "strips": strips,
        "mean": mean,
        "shares": [
            (row.method, [percent(row.shares[s.name]) for s in STATES])
            for row, _ in runs
            if row.shares
        ],
    }


def _pool_note(row: Row, run: WorkloadRun) -> str:
    parts = [f"{percent(row.shares['live'])} live"] if row.shares else ["no ledger recorded"]
    parts += [f"{rate(run['ledger']['mean_running'])} at once", f"{seconds(run['duration_s'])}"]
    if run["prefix_hits"]:
        parts.append(f"{run['prefix_hits']:,} prompt tokens found in the prefix cache")
    saved = max(run["steps"].get("shared_saved") or [0])
    if saved:
        parts.append(f"up to {saved:,} slots saved by sharing")
    return ", ".join(parts)


def queue_panels(results: Results, page: Page, pools: list[Panel]) -> list[Panel]:
    """Running and waiting requests over time, from the columns of the pool panels."""
    panels = []
    for pool in pools:
        series = _step_series(results, pool, page)
        longest = max((page.data[data]["t"][-1] for _, data in series), default=0.0)
        pair = []
        for field in ("running", "waiting"):
            hover = {
                "mode": "before",
                "unit": field,
                "rows": [[data, field, m.label] for m, data in series],
            }
            drawn = [(data, m.color, m.dash) for m, data in series]
            spec = charts.lines(drawn, field, f"requests {field}", longest=longest)
            label = f"Requests {field} over time on {pool['workload']}"
            if series:
                pair.append(page.add_chart(spec, label, [d for _, d in series], hover))
        panels.append({"workload": pool["workload"], "charts": pair, "series": series})
    return panels


def _step_series(results: Results, pool: Panel, page: Page) -> list[tuple[Method, str]]:
    """Each method's step columns, added where the pool panel had no ledger to draw."""
    known = {strip["method"].label: strip.get("data") for strip in pool["strips"]}
    series = []
    for method in methods(results):
        data = known.get(method.label)
        run = first_run(method, pool["workload"])
        if data is None and run is not None and (columns := step_columns(run)) is not None:
            data = page.add_data(columns)
        if data is not None:
            series.append((method, data))
    return series


_LATENCIES: tuple[tuple[str, str, Callable[[RequestResult], list[float]]], ...] = (
    ("TTFT", "time to first token", lambda r: [metrics.ttft(r)]),
    ("ITL", "gap between tokens", metrics.inter_token_latencies),
    ("E2E", "end to end", lambda r: [metrics.end_to_end(r)]),
)


def latency_panels(results: Results, page: Page) -> list[Panel]:
    """Distributions of TTFT, ITL and E2E, one panel a workload."""
    panels = []
    for name in workload_names(results):
        measures = []
        for short, title, of in _LATENCIES:
            found = []
            for method in methods(results):
                run = first_run(method, name)
                done = metrics.completed(run["requests"]) if run else []
                values = [value for request in done for value in of(request)]
                if values:
                    found.append((method, values))
            measures.append(_latency(short, title, found, name, page))
        panels.append({"workload": name, "measures": measures})
    return panels


def _latency(
    short: str, title: str, found: list[tuple[Method, list[float]]], workload: str, page: Page
) -> Panel:
    table = []
    for method, values in found:
        figures = [metrics.percentile(values, q) for q in (50, 90, 95, 99)]
        cells = [metrics.mean(values), *figures, max(values)]
        table.append((method, len(values), [seconds(v) for v in cells]))
    chart = None
    if found:
        every = [value for _, values in found for value in values]
        # Queueing spreads TTFT over decades; a log scale cannot show a zero.
        log = min(every) > 0 and max(every) / min(every) > 50
        series = [(page.add_data(cdf_columns(values)), m) for m, values in found]
        drawn = [(data, m.color, m.dash) for data, m in series]
        spec = charts.distributions(drawn, short, log=log)
        hover = {
            "mode": "after",
            "unit": "share",
            "rows": [[data, "share", m.label] for data, m in series],
        }
        label = f"Distribution of {short} on {workload}"
        chart = page.add_chart(spec, label, [data for data, _ in series], hover)
    return {"short": short, "title": title, "chart": chart, "table": table}


def memory_panels(results: Results, page: Page) -> list[Panel]:
    """Memory of each method's process over time, all on the same scales."""
    sampled = [
        (method, columns)
        for method in methods(results)
        if method.first["memory"] and (columns := memory_columns(method.first["memory"]))
    ]
    if not sampled:
        return []
    tops = [max(max(c["rss"]), max(c.get("device", [0]))) for _, c in sampled]
    end = max(columns["t"][-1] for _, columns in sampled)
    return [_memory_panel(m, columns, max(tops) * 1.08, end, page) for m, columns in sampled]


def _memory_panel(method: Method, columns: Columns, top: float, end: float, page: Page) -> Panel:
    snapshots = method.first["snapshots"]
    marks: list[dict[str, Any]] = []
    shown = 0.0
    for number, snapshot in enumerate(snapshots, 1):
        apart = not marks or snapshot["t"] - shown > end / 28  # numbers must not overlap
        shown = snapshot["t"] if apart else shown
        mib = snapshot["rss_bytes"] / (1 << 20)
        marks.append({"number": number, "t": snapshot["t"], "mib": mib, "shown": apart})
    data = page.add_data(columns)
    fields = [name for name in ("rss", "device") if name in columns]
    spec = charts.memory_lines(data, fields, marks, top, end)
    hover = {"mode": "after", "unit": "MiB", "rows": [[data, f, f] for f in fields]}
    chart = page.add_chart(spec, f"Memory of {method.label} over time", [data], hover)
    return {
        "method": method,
        "chart": chart,
        "data": data,
        "source": method.first["memory"]["source"] if method.first["memory"] else "",
        "peak": format_bytes(method.peak_rss_bytes) if method.peak_rss_bytes else "–",
        "device": format_bytes(method.peak_device_bytes) if method.peak_device_bytes else "",
        "snapshots": [
            [
                str(number),
                s["label"],
                seconds(s["t"]),
                format_bytes(s["rss_bytes"]),
                "–" if s["device_bytes"] is None else format_bytes(s["device_bytes"]),
                format_bytes(s["kv_allocated_bytes"]),
                format_bytes(s["kv_live_bytes"]),
            ]
            for number, s in enumerate(snapshots, 1)
        ],
    }


def preemption_rows(results: Results) -> list[list[str]]:
    """Who was preempted, how often, and what it cost; empty when nobody was."""
    table = []
    for run in results["runs"]:
        for w in run["workloads"]:
            lost = sum(p["tokens"] for p in w["preemptions"])
            if not w["preemptions"]:
                continue
            who = list(dict.fromkeys(p["request"] for p in w["preemptions"]))
            named = ", ".join(who[:6]) + (f" and {len(who) - 6} more" if len(who) > 6 else "")
            share = lost / w["output_tokens"] if w["output_tokens"] else 0.0
            table.append(
                [
                    run["label"],
                    w["name"],
                    str(run["repeat"] + 1),
                    str(len(w["preemptions"])),
                    f"{lost:,}",
                    rate(share),
                    named,
                ]
            )
    return table

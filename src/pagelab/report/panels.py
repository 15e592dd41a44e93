"""The sections of the HTML report that have charts: what each shows, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagelab.config import format_bytes
from pagelab.report import charts
from pagelab.report.figures import interval, percent, rate, seconds
from pagelab.report.page import Page, Panel
from pagelab.report.rows import Method, Row, first_run, rows, shown, shown_rows, workload_names
from pagelab.report.series import Columns, memory_columns, points_each, step_columns
from pagelab.report.sweeps import RUNNING, THROUGHPUT
from pagelab.results import Results, Spread

MOST_TOGETHER = 5  # lines in one chart of running requests: more of them are a tangle
Series = tuple[Method, str]  # and the name of its columns


def method_panels(results: Results, page: Page) -> list[Panel]:
    """The methods side by side, one panel a workload: all cells in its table, the base in bars."""
    return [_method_panel(results, name, page) for name in workload_names(results)]


def _method_panel(results: Results, workload: str, page: Page) -> Panel:
    drawn = shown_rows(results, workload)
    bars = []
    for measure in (THROUGHPUT, RUNNING):
        title, values = measure.title, [_bar(row, measure.of(row)) for row in drawn]
        colors = {row.method.name: row.method.color for row in drawn}
        spread = any(row.summary["repeats"] > 1 for row in drawn)
        if values:
            spec = charts.bars(values, colors, title, spread=spread)
            bars.append(page.add_chart(spec, f"{title} of each method on {workload}"))
    table = rows(results, workload)
    goodput = any(row.summary["goodput_per_s"] is not None for row in table)
    return {
        "workload": workload,
        "rows": [_method_cells(row, goodput=goodput) for row in table],
        "goodput": goodput,
        "charts": bars,
    }


def _bar(row: Row, spread: Spread) -> dict[str, Any]:
    return {
        "method": row.method.name,
        "value": spread["median"],
        "min": spread["min"],
        "max": spread["max"],
        "text": rate(spread["median"]),
    }


def _method_cells(row: Row, *, goodput: bool) -> Panel:
    summary, method = row.summary, row.method

    def cell(spread: Spread, show: Callable[[float], str]) -> Panel:
        return {
            "text": show(spread["median"]),
            "range": interval(show(spread["min"]), show(spread["max"])),
        }

    def plain(text: str, below: str = "") -> Panel:
        return {"text": text, "range": below}

    kv = method.kv
    met = summary["goodput_per_s"]
    good = [plain("–") if met is None else cell(met, rate)] if goodput else []
    return {
        "method": method,
        "repeats": summary["repeats"],
        "cells": [
            cell(summary["output_tokens_per_s"], rate),
            *good,
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


def queue_panels(results: Results, page: Page, pools: list[Panel]) -> list[Panel]:
    """Running and waiting requests over time, from the columns of the pool panels.

    Few methods share two charts; more of them have a small one each, on the same scales.
    """
    panels = []
    for pool in pools:
        series = _step_series(results, pool, page)
        panel: Panel = {"workload": pool["workload"], "series": series, "charts": [], "each": []}
        if len(series) > MOST_TOGETHER:
            panel["each"] = _queue_each(series, pool["workload"], page)
        elif series:
            panel["charts"] = _queue_together(series, pool["workload"], page)
        panels.append(panel)
    return panels


def _queue_together(series: list[Series], workload: str, page: Page) -> list[Panel]:
    longest = max(page.data[data]["t"][-1] for _, data in series)
    pair = []
    for field in ("running", "waiting"):
        hover = {
            "mode": "before",
            "unit": field,
            "rows": [[data, field, m.name] for m, data in series],
        }
        drawn = [(data, m.color, m.dash) for m, data in series]
        spec = charts.lines(drawn, field, f"requests {field}", longest=longest)
        label = f"Requests {field} over time on {workload}"
        pair.append(page.add_chart(spec, label, [d for _, d in series], hover))
    return pair


def _queue_each(series: list[Series], workload: str, page: Page) -> list[tuple[Method, Panel]]:
    longest = max(page.data[data]["t"][-1] for _, data in series)
    top = max(max(page.data[d]["running"] + page.data[d]["waiting"]) for _, d in series)
    each = []
    for method, data in series:
        hover = {
            "mode": "before",
            "unit": "requests",
            "rows": [[data, "running", "running"], [data, "waiting", "waiting"]],
        }
        spec = charts.queue(data, method.color, method.dash, longest=longest, top=top)
        label = f"Requests running and waiting over time on {workload}, {method.name}"
        each.append((method, page.add_chart(spec, label, [data], hover)))
    return each


def _step_series(results: Results, pool: Panel, page: Page) -> list[Series]:
    """Each method's step columns, added where the pool panel had no ledger to draw."""
    known = {strip["method"].label: strip.get("data") for strip in pool["strips"]}
    most = points_each(len(known) * len(workload_names(results)))
    series = []
    for method in shown(results):
        data = known.get(method.label)
        run = first_run(method, pool["workload"])
        if data is None and run is not None and (columns := step_columns(run, most)) is not None:
            data = page.add_data(columns)
        if data is not None:
            series.append((method, data))
    return series


def memory_panels(results: Results, page: Page) -> list[Panel]:
    """Memory of each method's process over time, all on the same scales."""
    sampled = [
        (method, columns)
        for method in shown(results)
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
    last = 0.0
    for number, snapshot in enumerate(snapshots, 1):
        apart = not marks or snapshot["t"] - last > end / 28  # numbers must not overlap
        last = snapshot["t"] if apart else last
        mib = snapshot["rss_bytes"] / (1 << 20)
        marks.append({"number": number, "t": snapshot["t"], "mib": mib, "shown": apart})
    data = page.add_data(columns)
    fields = [name for name in ("rss", "device") if name in columns]
    spec = charts.memory_lines(data, fields, marks, top, end)
    hover = {"mode": "after", "unit": "MiB", "rows": [[data, f, f] for f in fields]}
    chart = page.add_chart(spec, f"Memory of {method.name} over time", [data], hover)
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
            if not w["num_preemptions"]:
                continue
            lost = w["recomputed_tokens"]
            who = list(dict.fromkeys(p["request"] for p in w["preemptions"]))
            named = ", ".join(who[:6]) + (f" and {len(who) - 6} more" if len(who) > 6 else "")
            share = lost / w["output_tokens"] if w["output_tokens"] else 0.0
            table.append(
                [
                    run["label"],
                    w["name"],
                    str(run["repeat"] + 1),
                    f"{w['num_preemptions']:,}",
                    f"{lost:,}",
                    rate(share),
                    named,
                ]
            )
    return table

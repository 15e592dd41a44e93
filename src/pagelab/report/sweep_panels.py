"""The sections on the grid: one setting at a time, placements, and the same batch for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagelab.metrics import differ
from pagelab.report.charts import bars
from pagelab.report.figures import interval, percent, rate, seconds, times
from pagelab.report.page import Page, Panel
from pagelab.report.rows import Method, Row, workload_names
from pagelab.report.sweep_charts import sweep_lines
from pagelab.report.sweeps import (
    EXTERNAL,
    RUNNING,
    THROUGHPUT,
    Measure,
    Sweep,
    placements,
    same_batch,
    sweeps,
)
from pagelab.results import Results, Spread


def sweep_panels(results: Results, page: Page) -> list[Panel]:
    """Every setting with several values, one panel a setting and workload."""
    found = [sweep for name in workload_names(results) for sweep in sweeps(results, name)]
    return [_sweep_panel(sweep, page) for sweep in found]


def _sweep_panel(sweep: Sweep, page: Page) -> Panel:
    setting = sweep.setting
    labels = [setting.show(value) for value in sweep.values]
    return {
        "title": setting.title,
        "note": setting.note,
        "workload": sweep.workload,
        "methods": [line.method for line in sweep.lines],
        "charts": [(m.title, _sweep_chart(sweep, m, labels, page)) for m in setting.measures],
        "labels": labels,
        "tables": [(m.title, _sweep_cells(sweep, m)) for m in setting.measures],
    }


def _sweep_chart(sweep: Sweep, measure: Measure, labels: list[str], page: Page) -> Panel:
    setting = sweep.setting
    series: list[tuple[str, Method]] = []
    for line in sweep.lines:
        figures = [measure.of(row) for _, row in line.points]
        columns: dict[str, list[Any]] = {"x": [value for value, _ in line.points]}
        columns["value"] = [float(f"{figure['median']:.6g}") for figure in figures]
        columns["min"] = [float(f"{figure['min']:.6g}") for figure in figures]
        columns["max"] = [float(f"{figure['max']:.6g}") for figure in figures]
        series.append((page.add_data(columns), line.method))
    spec = sweep_lines(
        [(data, method.style) for data, method in series],
        sweep.values,
        labels,
        log=setting.log and min(sweep.values) > 0,
        share=measure.share,
        spread=any(row.summary["repeats"] > 1 for line in sweep.lines for _, row in line.points),
    )
    hover = {
        "mode": "nearest",
        "unit": "share" if measure.share else measure.title,
        "xs": sweep.values,
        "names": [f"{setting.title} {label}" for label in labels],
        "rows": [[data, "value", method.name] for data, method in series],
    }
    label = f"{measure.title} by {setting.title} on {sweep.workload}"
    return page.add_chart(spec, label, [data for data, _ in series], hover)


def _sweep_cells(sweep: Sweep, measure: Measure) -> list[tuple[Method, list[Panel]]]:
    table = []
    for line in sweep.lines:
        at = dict(line.points)
        cells = [_cell(measure, at[v]) if v in at else _plain("–") for v in sweep.values]
        table.append((line.method, cells))
    return table


def placement_panels(results: Results, page: Page) -> list[Panel]:
    """Contiguous allocators under each placement, one panel a workload."""
    panels = []
    for workload in workload_names(results):
        table = placements(results, workload)
        if not table:
            continue
        measures = (THROUGHPUT, RUNNING, EXTERNAL)
        panels.append(
            {
                "workload": workload,
                "charts": [
                    (m.title, _bars(table, m, f"{m.title} by placement on {workload}", page))
                    for m in measures
                ],
                "rows": [
                    (row.method, row.method.settings["placement"], _placement_cells(row, measures))
                    for row in table
                ],
            }
        )
    return panels


def _placement_cells(row: Row, measures: Sequence[Measure]) -> list[Panel]:
    cells = [_cell(measure, row) for measure in measures]
    return [*cells, _plain(percent(row.share("rounding")))]


def batch_panels(results: Results, page: Page) -> list[Panel]:
    """The price of paging itself, one panel a workload; empty where that axis was not run."""
    panels = []
    for workload in workload_names(results):
        table = same_batch(results, workload)
        if len(table) < 2:
            continue
        measures = (
            THROUGHPUT,
            Measure("gap between tokens, mean", lambda r: r.summary["itl_mean_s"], seconds),
        )
        panels.append(
            {
                "workload": workload,
                "batch": results["experiment"]["batch"],
                "sentences": [_price(row, table[0]) for row in table[1:]],
                "charts": [
                    (m.title, _bars(table, m, f"{m.title} at the same batch on {workload}", page))
                    for m in measures
                ],
                "rows": [(row.method, _batch_cells(row, table[0])) for row in table],
            }
        )
    return panels


def _batch_cells(row: Row, reference: Row) -> list[Panel]:
    summary = row.summary
    steps = [len(run["steps"]["t"]) for run in row.runs]
    ours = summary["output_tokens_per_s"]["median"]
    theirs = reference.summary["output_tokens_per_s"]["median"]
    return [
        _spread(summary["output_tokens_per_s"], rate),
        _plain("–" if row is reference or not theirs else f"{(ours / theirs - 1) * 100:+.1f} %"),
        _spread(summary["itl_mean_s"], seconds),
        _spread(summary["itl_p95_s"], seconds),
        _spread(summary["ttft_mean_s"], seconds),
        _plain(f"{steps[0]:,}" if steps and steps[0] else "–"),
        _spread(summary["mean_running"], rate),
        _plain(str(row.peak_running)),
    ]


def _price(row: Row, reference: Row) -> str:
    """What a method costs beside the traditional allocator when both run as many requests."""
    ours, theirs = (r.summary["output_tokens_per_s"] for r in (row, reference))
    what = f"{row.method.name} wrote {rate(ours['median'])} tokens a second"
    other = f"{reference.method.name} {rate(theirs['median'])}"
    order = differ(ours, theirs)
    if order == 0:
        return f"{what}, {other}: no difference, within 5 % or the spread of the repeats."
    ratio = times(ours["median"] / theirs["median"]) if theirs["median"] else "many"
    kind = "faster" if order > 0 else "slower"
    return f"{what}, {other}: {ratio} times, so {kind}."


def _bars(table: Sequence[Row], measure: Measure, label: str, page: Page) -> Panel:
    """Bars of rows of several cells: what sets a row apart follows its method's name."""
    several = len({row.method.settings["placement"] for row in table}) > 1
    values, colors = [], {}
    for row in table:
        method = row.method
        name = f"{method.name.removeprefix('pagelab ')}, {method.settings['placement']}"
        name = name if several else method.name
        figure = measure.of(row)
        colors[name] = method.color
        values.append(
            {"method": name, "value": figure["median"], "text": measure.show(figure["median"])}
            | {"min": figure["min"], "max": figure["max"]}
        )
    spread = any(row.summary["repeats"] > 1 for row in table)
    return page.add_chart(bars(values, colors, None, spread=spread), label)


def _cell(measure: Measure, row: Row) -> Panel:
    return _spread(measure.of(row), measure.show)


def _spread(figure: Spread, show: Any) -> Panel:
    between = interval(show(figure["min"]), show(figure["max"]))
    return {"text": show(figure["median"]), "range": between}


def _plain(text: str) -> Panel:
    return {"text": text, "range": ""}

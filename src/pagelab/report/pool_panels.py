"""The section on the KV pool: strips over time, and the mean division."""

from __future__ import annotations

from pagelab.report.figures import percent, rate, seconds
from pagelab.report.page import Page, Panel
from pagelab.report.pool_charts import pool_areas, pool_shares, share_segments
from pagelab.report.rows import Row, first_run, shown_rows, workload_names
from pagelab.report.series import has_ledger, points_each, step_columns
from pagelab.report.words import STATES
from pagelab.results import Results, WorkloadRun

_STACKED = 5  # so many strips stand under each other; more of them stand in two columns

Pair = tuple[Row, WorkloadRun]


def pool_panels(results: Results, page: Page) -> list[Panel]:
    """The pool over time and on average, one panel a workload, all methods on the same scales."""
    pairs = {name: _pairs(results, name) for name in workload_names(results)}
    most = points_each(sum(map(len, pairs.values())))
    return [_pool_panel(name, found, most, page) for name, found in pairs.items()]


def _pairs(results: Results, workload: str) -> list[Pair]:
    table = shown_rows(results, workload)
    return [(row, run) for row in table if (run := first_run(row.method, workload)) is not None]


def _pool_panel(workload: str, runs: list[Pair], most: int, page: Page) -> Panel:
    longest = max((run["duration_s"] for _, run in runs), default=0.0)
    slots = max((row.method.kv["slots"] for row, _ in runs if row.method.kv), default=0)
    columns = 1 if len(runs) <= _STACKED else 2
    strips = []
    for i, (row, run) in enumerate(runs, 1):
        titled = i > len(runs) - columns
        strips.append(_strip(workload, row, run, (slots, longest, most, titled), page))
    with_shares = [row for row, _ in runs if row.shares]
    mean = None
    if with_shares:
        segments = [
            segment
            for row in with_shares
            for segment in share_segments(row.method.name, row.shares, row.share("rounding"))
        ]
        label = f"Mean division of the KV pool on {workload}"
        mean = page.add_chart(pool_shares(segments, len(with_shares)), label)
    return {
        "workload": workload,
        "strips": strips,
        "columns": columns,
        "mean": mean,
        "shares": [(row.method, _share_cells(row)) for row in with_shares],
        "notes": _notes([row for row, _ in runs]),
        "rounded": any(row.share("rounding") > 0 for row in with_shares),
    }


def _strip(
    workload: str, row: Row, run: WorkloadRun, shape: tuple[int, float, int, bool], page: Page
) -> Panel:
    slots, longest, most, titled = shape
    strip: Panel = {"method": row.method, "note": _strip_note(row, run), "chart": None}
    columns = step_columns(run, most) if has_ledger(run) else None
    if columns is None:
        return strip
    data = page.add_data(columns)
    rows = [[data, s.name, s.name] for s in STATES]
    if any(columns["rounding"]):
        rows.append([data, "rounding", "of external: rounded up"])
    hover = {
        "mode": "before",
        "unit": "slots",
        "rows": rows,
        "own": columns["t"][-1],
        "same": longest,
    }
    label = f"KV pool of {row.method.name} on {workload} over time, by ledger state"
    spec = pool_areas(data, slots, longest, titled=titled)
    return strip | {"chart": page.add_chart(spec, label, [data], hover), "data": data}


def _share_cells(row: Row) -> list[str]:
    """Each state's share, what of external was rounded up, and what sharing saved."""
    states = [percent(row.shares[state.name]) for state in STATES]
    return [*states, percent(row.share("rounding")), percent(row.share("shared_saved"))]


def _strip_note(row: Row, run: WorkloadRun) -> str:
    parts = [f"{percent(row.shares['live'])} live"] if row.shares else ["no ledger recorded"]
    parts += [f"{rate(run['ledger']['mean_running'])} at once", f"{seconds(run['duration_s'])}"]
    if row.method.contiguous:
        parts.append(f"{row.method.settings['placement']} placement")
    if run["prefix_hits"]:
        parts.append(f"{run['prefix_hits']:,} prompt tokens found in the prefix cache")
    saved = max(run["steps"].get("shared_saved") or [0])
    if saved:
        parts.append(f"up to {saved:,} slots saved by sharing")
    return ", ".join(parts)


def _notes(rows: list[Row]) -> list[str]:
    """What must be known to read the division: placement, rounding, and the prefix cache."""
    notes = []
    contiguous = [row for row in rows if row.method.contiguous]
    parts = [
        f"{row.method.name} {percent(row.share('rounding') / row.share('external'))}"
        for row in contiguous
        if row.share("rounding") > 0
    ]
    if parts:
        placement = contiguous[0].method.settings["placement"]
        notes.append(
            f"Of external, so much is what the placement lost by rounding ranges up ({placement}), "
            f"not by holes: {', '.join(parts)}."
        )
    if contiguous:
        notes.append(
            "Contiguous ranges cannot share blocks: under the contiguous allocators the prefix "
            "cache is off."
        )
    return notes

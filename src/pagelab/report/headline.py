"""The result in one sentence, and the figures that it rests on, computed from the summary.

Both are of the base cell. What is compared is `pagelab paged` where it ran, else another of our
allocators that pages, else the fastest method that pages; all others are its rivals.
"""

from __future__ import annotations

from typing import NamedTuple

from pagelab.config import format_bytes
from pagelab.metrics import differ
from pagelab.report.figures import joined, percent, rate, times
from pagelab.report.rows import Row, shown_rows
from pagelab.report.styles import FIRST
from pagelab.results import Results, Spread

_NAMED = 3  # of the methods that were beaten; all that were not are named


class KeyFigure(NamedTuple):
    """One figure of the paged method beside the same figure of the others."""

    name: str
    value: str
    others: tuple[tuple[str, str], ...]  # name, value


def headline_workload(results: Results) -> str | None:
    """The workload with the most output that lets paging be compared; else the largest one."""
    sizes = {
        w["name"]: sum(r["max_tokens"] for r in w["requests"])
        for w in results["experiment"]["workloads"]
    }
    done = {s["workload"] for s in results["summary"]}
    candidates = sorted(done, key=lambda name: -sizes.get(name, 0))
    comparable = [name for name in candidates if None not in sides(results, name)]
    return next(iter(comparable or candidates), None)


def headline(results: Results) -> str:
    """One sentence: what paging did here, to speed and to concurrency."""
    workload = headline_workload(results)
    if workload is None:
        return "No method finished a workload, so there is nothing to compare."
    ours, rivals = sides(results, workload)
    if ours is None or rivals is None:
        only = joined(row.method.name for row in shown_rows(results, workload))
        return f"On the {workload} workload only {only} finished, so paging cannot be compared."
    speed = rate(ours.summary["output_tokens_per_s"]["median"])
    budget = format_bytes(ours.method.settings["kv_memory_bytes"])
    start = "Simulated: on" if ours.method.simulated else "On"
    return (
        f"{start} the {workload} workload, with {budget} for K/V, {ours.method.name} wrote {speed} "
        f"tokens a second, {_speeds(ours, rivals)}, and ran {_concurrency(ours, rivals[0])}."
    )


def key_figures(results: Results) -> list[KeyFigure]:
    """What the top of a report shows large; empty where paging cannot be compared."""
    workload = headline_workload(results)
    ours, rivals = sides(results, workload) if workload else (None, None)
    if ours is None or rivals is None:
        return []

    def figure(name: str, show: str, value_of: str) -> KeyFigure:
        def text(row: Row) -> str:
            spread: Spread = row.summary[value_of]  # type: ignore[literal-required]
            return percent(spread["median"]) if show == "%" else rate(spread["median"])

        return KeyFigure(name, text(ours), tuple((r.method.name, text(r)) for r in rivals))

    return [
        figure("output tokens a second", "n", "output_tokens_per_s"),
        figure("requests running at once", "n", "mean_running"),
        figure("of the KV pool live", "%", "live_share"),
    ]


def sides(results: Results, workload: str) -> tuple[Row | None, list[Row] | None]:
    """Ours, and its rivals: `contiguous-max`, the same engine's others, then by speed."""
    table = shown_rows(results, workload)
    ours = max((row for row in table if row.method.phase == "paged"), key=_ours, default=None)
    if ours is None:
        return None, None
    rivals = [row for row in table if row is not ours]
    rivals.sort(
        key=lambda row: (
            row.method.allocator != "contiguous-max",
            row.method.engine != ours.method.engine,
            -_speed(row),
        )
    )
    return ours, rivals or None


def _ours(row: Row) -> tuple[bool, bool, float]:
    return row.method.name == FIRST, row.method.allocator is not None, _speed(row)


def _speed(row: Row) -> float:
    return row.summary["output_tokens_per_s"]["median"]


def _speeds(ours: Row, rivals: list[Row]) -> str:
    faster: list[str] = []
    same: list[str] = []
    slower: list[str] = []
    for row in rivals:
        mine, other = (r.summary["output_tokens_per_s"] for r in (ours, row))
        order = differ(mine, other)
        ratio = times(mine["median"] / other["median"]) if other["median"] else "many"
        group = faster if order > 0 else slower if order < 0 else same
        group.append(row.method.name if order == 0 else f"{ratio} times {row.method.name}")
    more = len(faster) - _NAMED
    named = faster if more <= 1 else [*faster[:_NAMED], f"more than each of {more} others"]
    parts = [joined(named)] if faster else []
    parts += [f"no different from {joined(same)}"] if same else []
    parts += [f"only {joined(slower)}"] if slower else []
    return ", ".join(parts)


def _concurrency(ours: Row, rival: Row) -> str:
    mine, other = ours.summary["mean_running"], rival.summary["mean_running"]
    pair = f"{rate(mine['median'])} requests at once"
    if differ(mine, other) == 0:
        return f"as many requests at once as {rival.method.name} ({rate(mine['median'])})"
    return f"{pair} where {rival.method.name} ran {rate(other['median'])}"

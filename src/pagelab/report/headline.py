"""The result in one sentence, and the figures that it rests on, computed from the summary."""

from __future__ import annotations

from typing import NamedTuple

from pagelab.config import format_bytes
from pagelab.report.figures import Row, differ, joined, percent, rate, rows, times
from pagelab.results import Results, Spread


class KeyFigure(NamedTuple):
    """One figure of the paged method beside the same figure of the others."""

    name: str
    value: str
    others: tuple[tuple[str, str], ...]  # label, value


def headline_workload(results: Results) -> str | None:
    """The workload with the most output that lets paging be compared; else the largest one."""
    sizes = {
        w["name"]: sum(r["max_tokens"] for r in w["requests"])
        for w in results["experiment"]["workloads"]
    }
    done = {s["workload"] for s in results["summary"]}
    candidates = sorted(done, key=lambda name: -sizes.get(name, 0))
    comparable = [name for name in candidates if None not in _sides(results, name)]
    return next(iter(comparable or candidates), None)


def headline(results: Results) -> str:
    """One sentence: what paging did here, to speed and to concurrency."""
    workload = headline_workload(results)
    if workload is None:
        return "No method finished a workload, so there is nothing to compare."
    ours, rivals = _sides(results, workload)
    if ours is None or rivals is None:
        only = joined(row.method.label for row in rows(results, workload))
        return f"On the {workload} workload only {only} finished, so paging cannot be compared."
    speed = rate(ours.summary["output_tokens_per_s"]["median"])
    budget = format_bytes(results["experiment"]["kv_memory_bytes"])
    return (
        f"On the {workload} workload, with {budget} for K/V, {ours.method.label} wrote {speed} "
        f"tokens a second, {_speeds(ours, rivals)}, and ran {_concurrency(ours, rivals[0])}."
    )


def key_figures(results: Results) -> list[KeyFigure]:
    """What the top of a report shows large; empty where paging cannot be compared."""
    workload = headline_workload(results)
    ours, rivals = _sides(results, workload) if workload else (None, None)
    if ours is None or rivals is None:
        return []

    def figure(name: str, show: str, value_of: str) -> KeyFigure:
        def text(row: Row) -> str:
            spread: Spread = row.summary[value_of]  # type: ignore[literal-required]
            return percent(spread["median"]) if show == "%" else rate(spread["median"])

        return KeyFigure(name, text(ours), tuple((r.method.label, text(r)) for r in rivals))

    return [
        figure("output tokens a second", "n", "output_tokens_per_s"),
        figure("requests running at once", "n", "mean_running"),
        figure("of the KV pool live", "%", "live_share"),
    ]


def _sides(results: Results, workload: str) -> tuple[Row | None, list[Row] | None]:
    """The fastest paged method, and the others: the same engine first, then by speed."""
    table = rows(results, workload)
    paged = [row for row in table if row.method.phase == "paged"]
    rivals = [row for row in table if row.method.phase != "paged"]
    if not paged:
        return None, None
    ours = max(paged, key=lambda row: row.summary["output_tokens_per_s"]["median"])
    rivals.sort(
        key=lambda row: (
            row.method.engine != ours.method.engine,
            -row.summary["output_tokens_per_s"]["median"],
        )
    )
    return ours, rivals or None


def _speeds(ours: Row, rivals: list[Row]) -> str:
    faster: list[str] = []
    same: list[str] = []
    slower: list[str] = []
    for row in rivals:
        mine, other = (r.summary["output_tokens_per_s"] for r in (ours, row))
        order = differ(mine, other)
        ratio = times(mine["median"] / other["median"]) if other["median"] else "many"
        group = faster if order > 0 else slower if order < 0 else same
        group.append(row.method.label if order == 0 else f"{ratio} times {row.method.label}")
    parts = [joined(faster)] if faster else []
    parts += [f"no different from {joined(same)}"] if same else []
    parts += [f"only {joined(slower)}"] if slower else []
    return ", ".join(parts)


def _concurrency(ours: Row, rival: Row) -> str:
    mine, other = ours.summary["mean_running"], rival.summary["mean_running"]
    pair = f"{rate(mine['median'])} requests at once"
    if differ(mine, other) == 0:
        return f"as many requests at once as {rival.method.label} ({rate(mine['median'])})"
    return f"{pair} where {rival.method.label} ran {rate(other['median'])}"

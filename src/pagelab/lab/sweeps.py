"""Findings from the cells beside the base one: what each option does, all else as in the base.

Like is compared with like: paging with the contiguous allocators of the same cell, a row with the
rows that differ from it in one setting, and at the same batch with `contiguous-max`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from pagelab.config import format_bytes
from pagelab.lab.comparison import (
    THROUGHPUT,
    Row,
    base_rows,
    compare,
    compare_spreads,
    in_cell,
    info,
    ours_among,
)
from pagelab.results import ExperimentInfo, Finding, RunSettings, SettingKey, is_base


def further_cells(workload: str, rows: Sequence[Row], asked: ExperimentInfo) -> list[Finding]:
    """Paging against the contiguous allocators in every other cell of budget and block size."""
    cells: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        settings = row.settings
        others_are_base = (settings["watermark"], settings["placement"]) == (
            asked["watermark"],
            asked["placement"],
        )
        if row.run["axis"] == "budget" and others_are_base:
            cell = (settings["kv_memory_bytes"], settings["block_size"])
            cells.setdefault(cell, []).append(row)
    cells.pop((asked["kv_memory_bytes"], asked["block_size"]), None)
    findings = []
    for members in cells.values():
        ours = ours_among(members)
        if ours is not None:
            where = in_cell(ours.settings, asked)
            findings += [
                compare(workload, THROUGHPUT, ours, row, where)
                for row in members
                if row.contiguous and row.settings == ours.settings
            ]
    return findings


def same_batch(workload: str, rows: Sequence[Row], asked: ExperimentInfo) -> list[Finding]:
    """What each allocator costs when all run as many requests at once as `contiguous-max`."""
    batch = asked["batch"]
    members = [row for row in rows if row.run["axis"] == "batch"]
    capped = [row for row in members if row.contiguous_max]
    held = [row for row in base_rows(rows, asked) if row.contiguous_max]
    reference = next(iter(capped + held), None)
    if batch is None or reference is None:
        return []
    return [_price(workload, row, reference, batch) for row in members if row is not reference]


def _price(workload: str, row: Row, reference: Row, batch: int) -> Finding:
    """One allocator against `contiguous-max` at the same batch.

    Both run the same code in the same steps, so the difference is small, and smaller than the
    noise between two runs: on a shared virtual machine with 2 cores, paging was 20 % faster in
    one pair of runs and 11 % slower in the median of three repeats. One run each gives no verdict.
    """
    ours, theirs = (r.summary["output_tokens_per_s"] for r in (row, reference))
    verdict = compare_spreads(ours, theirs, more_is_better=True)
    mine, its = ours["median"], theirs["median"]
    gaps = [r.summary["itl_mean_s"]["median"] for r in (row, reference)]
    running = [r.summary["mean_running"]["median"] for r in (row, reference)]
    change = mine / its - 1 if its else 0.0
    itself = "paging itself" if row.paged else f"{row.name} itself"
    if _noise_unknown((row, reference)):
        verdict = "info"
        says = f"{change:+.1%}, but one run each does not tell this from noise; --repeats 3 may"
    elif verdict == "same":
        says = f"no difference ({change:+.1%}), so {itself} costs nothing that shows"
    elif verdict == "better":
        says = f"{change:.1%} faster, so {itself} costs nothing here"
    else:
        says = f"{-change:.1%} slower: the price of {itself}"
    return {
        "workload": workload,
        "verdict": verdict,
        "text": f"At the same batch of {batch}, {row.name} writes {THROUGHPUT.show(mine)} and "
        f"{reference.name} {THROUGHPUT.show(its)}: {says}. Between two tokens "
        f"{gaps[0] * 1e3:.3g} ms and {gaps[1] * 1e3:.3g} ms; {running[0]:.2f} and "
        f"{running[1]:.2f} requests at a time.",
        "figures": {
            "batch": float(batch),
            "paged_output_tokens_per_s": mine,
            "other_output_tokens_per_s": its,
            "ratio": mine / its if its else 0.0,
            "paged_itl_mean_s": gaps[0],
            "other_itl_mean_s": gaps[1],
            "paged_mean_running": running[0],
            "other_mean_running": running[1],
        },
    }


def sweeps(workload: str, rows: Sequence[Row], asked: ExperimentInfo) -> list[Finding]:
    """What budget, block size, watermark and placement do, one at a time."""
    findings = _budgets(workload, rows, asked)
    for group in _groups(rows, asked, "block_size"):
        findings.append(_block_sizes(workload, group))
    for group in _groups(rows, asked, "watermark"):
        findings.append(_watermarks(workload, group))
    for group in _groups(rows, asked, "placement"):
        findings.append(_placements(workload, group))
    return findings


def _groups(rows: Iterable[Row], asked: ExperimentInfo, key: SettingKey) -> list[list[Row]]:
    """Rows of one method or allocator that differ in `key` alone; two at least in each group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if is_base(row.run, asked, but=key):
            groups.setdefault(row.name, []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def _budgets(workload: str, rows: Sequence[Row], asked: ExperimentInfo) -> list[Finding]:
    """Paging against each contiguous allocator, budget by budget."""
    groups = _groups(rows, asked, "kv_memory_bytes")
    ours = next((group for group in groups if ours_among(group) is not None), None)
    if ours is None:
        return []
    by_budget = {row.settings["kv_memory_bytes"]: row for row in ours}
    findings = []
    for group in groups:
        if not group[0].contiguous:
            continue
        parts, figures = [], {}
        for row in group:
            budget = row.settings["kv_memory_bytes"]
            rate = row.summary["output_tokens_per_s"]["median"]
            if budget in by_budget and rate > 0:
                ratio = by_budget[budget].summary["output_tokens_per_s"]["median"] / rate
                parts.append(f"{format_bytes(budget)}: {ratio:.2f} times")
                figures[f"ratio at {budget} bytes"] = ratio
        if len(parts) > 1:
            text = (
                f"{ours[0].name} against {group[0].name} in output tokens a second, by KV budget: "
                f"{'; '.join(parts)}."
            )
            findings.append(info(workload, text, figures))
    return findings


def _block_sizes(workload: str, group: Sequence[Row]) -> Finding:
    def words(row: Row) -> str:
        return f"{_rate(row)}, {row.share('internal'):.1%} internal"

    return _sweep(
        workload, group, "block size", _block, words, {"internal": lambda r: r.share("internal")}
    )


def _watermarks(workload: str, group: Sequence[Row]) -> Finding:
    """The price of recompute at saturation."""

    def price(row: Row) -> float:
        return row.summary["recomputed_per_output_token"]["median"]

    def preempted(row: Row) -> float:
        return row.summary["num_preemptions"]["median"]

    def words(row: Row) -> str:
        return (
            f"{price(row):.2f} tokens recomputed for each generated, {preempted(row):g} "
            f"preemptions, {_rate(row)}"
        )

    figures = {"recomputed_per_output_token": price, "preemptions": preempted}
    finding = _sweep(workload, group, "watermark", _watermark, words, figures)
    if all(preempted(row) == 0 for row in group):
        finding["text"] += " Nobody was preempted: the pool was never full."
    else:
        least = min(group, key=price)
        finding["text"] += f" The least is recomputed at {_watermark(least.settings)}."
    return finding


def _placements(workload: str, group: Sequence[Row]) -> Finding:
    def words(row: Row) -> str:
        text = f"{_rate(row)}, {row.share('external'):.1%} external"
        rounding = row.share("rounding")
        return f"{text} ({rounding:.1%} rounding up)" if rounding else text

    return _sweep(
        workload,
        group,
        "placement",
        lambda settings: settings["placement"],
        words,
        {
            "external": lambda row: row.share("external"),
            "rounding": lambda row: row.share("rounding"),
        },
    )


def _sweep(
    workload: str,
    group: Sequence[Row],
    option: str,
    value: Callable[[RunSettings], str],
    words: Callable[[Row], str],
    more: Mapping[str, Callable[[Row], float]],
) -> Finding:
    """Every value with its figures, and which of them is the fastest."""
    parts = [f"{value(row.settings)}: {words(row)}" for row in group]
    figures: dict[str, float] = {}
    for row in group:
        name = value(row.settings)
        figures[f"{name}: output_tokens_per_s"] = row.summary["output_tokens_per_s"]["median"]
        figures |= {f"{name}: {what}": figure(row) for what, figure in more.items()}
    text = f"{group[0].name} by {option}: {'; '.join(parts)}. {_fastest(group, option, value)}"
    return info(workload, text, figures)


def _fastest(group: Sequence[Row], option: str, value: Callable[[RunSettings], str]) -> str:
    def rate(row: Row) -> float:
        return row.summary["output_tokens_per_s"]["median"]

    if _noise_unknown(group):
        return "Each ran once, so the speeds are not ranked; --repeats 3 may."
    best = max(group, key=rate)
    equal = [
        row
        for row in group
        if row is not best
        and compare_spreads(
            best.summary["output_tokens_per_s"],
            row.summary["output_tokens_per_s"],
            more_is_better=True,
        )
        == "same"
    ]
    if len(equal) == len(group) - 1:
        return f"The {option} makes no difference to the speed here."
    also = f", not different from {', '.join(value(r.settings) for r in equal)}" if equal else ""
    return f"The fastest: {value(best.settings)}{also}."


def _noise_unknown(rows: Iterable[Row]) -> bool:
    """Whether times of one measured run are among them; simulated times have no noise.

    The fastest of several single runs is the luckiest one as often as the best one.
    """
    return any(row.summary["repeats"] < 2 and not row.run["simulated"] for row in rows)


def _rate(row: Row) -> str:
    return THROUGHPUT.show(row.summary["output_tokens_per_s"]["median"])


def _block(settings: RunSettings) -> str:
    return f"block {settings['block_size']}"


def _watermark(settings: RunSettings) -> str:
    return f"{settings['watermark'] * 100:g} %"

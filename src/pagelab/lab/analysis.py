"""Findings: what the figures of a run say, computed from them and from nothing else.

How two figures are compared, and that there is a sentence for winning, drawing and losing:
`pagelab.lab.comparison`. What the cells beside the base one say: `pagelab.lab.sweeps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pagelab.lab.comparison import (
    CONCURRENCY,
    LIVE,
    PEAK,
    THROUGHPUT,
    TTFT,
    Row,
    Verdict,
    base_rows,
    compare,
    compare_spreads,
    in_cell,
    info,
    ours_among,
    point,
    rows_of,
)
from pagelab.lab.methods import NATIVE
from pagelab.lab.sweeps import further_cells, same_batch, sweeps
from pagelab.memory.allocators import Paged
from pagelab.metrics import SAME_WITHIN
from pagelab.results import (
    Equality,
    ExperimentInfo,
    Finding,
    MethodRun,
    Objectives,
    Summary,
    WorkloadInfo,
    is_base,
)

BUSY_CORES = 0.15  # of a core in other programs' use: more than a quiet machine's background


def analyse(
    asked: ExperimentInfo,
    runs: Sequence[MethodRun],
    summary: Sequence[Summary],
    equality: Sequence[Equality],
    other_load: Mapping[str, float] | None = None,
) -> list[Finding]:
    """All findings of an experiment, workload by workload, the most telling first.

    `other_load` has the cores that other programs took from each row while it ran.
    """
    findings: list[Finding] = []
    for name in dict.fromkeys(entry["workload"] for entry in summary):
        rows = rows_of(name, runs, summary)
        findings += _base_cell(name, base_rows(rows, asked), runs, asked)
        findings += same_batch(name, rows, asked)
        findings += further_cells(name, rows, asked)
        findings += sweeps(name, rows, asked)
    findings += _peak_memory(runs, summary, asked)
    findings += _equalities(equality, runs, asked)
    findings += _left_out(asked["workloads"])
    findings += _simulated(runs, asked)
    findings += _failures(runs)
    findings += _busy_machine(other_load or {})
    if any(not run["simulated"] for run in runs) and all(e["repeats"] == 1 for e in summary):
        findings += [_one_repeat()] if summary else []
    return findings


def _base_cell(
    workload: str, base: Sequence[Row], runs: Sequence[MethodRun], asked: ExperimentInfo
) -> list[Finding]:
    """Paging against every other row of the base cell."""
    ours = ours_among(base)
    if ours is None:
        return _no_paging(runs, workload)
    others = [row for row in base if row is not ours]
    where = in_cell(ours.settings, asked)
    findings = [compare(workload, THROUGHPUT, ours, row, where) for row in others]
    for row in others:
        if row.contiguous_max:
            findings += [compare(workload, m, ours, row, where) for m in (CONCURRENCY, LIVE)]
    findings += [compare(workload, TTFT, ours, row, where) for row in others]
    findings += _goodput(workload, ours, others, asked["objectives"])
    findings.append(_waste(workload, ours, base))
    findings.append(_preemption_price(workload, ours))
    return findings


def _no_paging(runs: Sequence[MethodRun], workload: str) -> list[Finding]:
    paged = [r for r in runs if r["method"] == NATIVE and r["allocator"] == Paged.name]
    if any(run["axis"] == "batch" for run in paged) and len({r["axis"] for r in paged}) == 1:
        return []  # the same budget was not asked for
    why = f": {_first_line(paged[0]['reason'])}" if paged and paged[0]["reason"] else ""
    state = "did not finish" if paged else "was not run"
    return [
        info(
            workload,
            f"Paging {state} on this workload{why}; there is nothing to compare it with.",
        )
    ]


def _goodput(
    workload: str, ours: Row, others: Sequence[Row], objectives: Objectives
) -> list[Finding]:
    """Requests a second that met the objectives, against the best of the others."""
    rates = {row.label: row.summary["goodput_per_s"] for row in (ours, *others)}
    known = {label: rate for label, rate in rates.items() if rate is not None}
    mine = known.pop(ours.label, None)
    if mine is None:
        return []
    verdict: Verdict = "info"
    if known:
        best = max(known.values(), key=lambda rate: rate["median"])
        verdict = compare_spreads(mine, best, more_is_better=True)
    limits = {
        "first token within {} s": objectives["ttft_s"],
        "{} s a token": objectives["tpot_s"],
        "all within {} s": objectives["e2e_s"],
    }
    stated = ", ".join(text.format(f"{v:g}") for text, v in limits.items() if v is not None)
    parts = [f"{label} {rate['median']:.3g}" for label, rate in known.items()]
    return [
        {
            "workload": workload,
            "verdict": verdict,
            "text": f"Goodput, in requests a second that met the objectives ({stated}): "
            + "; ".join([f"{ours.label} {mine['median']:.3g}", *parts])
            + ".",
            "figures": {
                label: rate["median"] for label, rate in {ours.label: mine, **known}.items()
            },
        }
    ]


def _waste(workload: str, ours: Row, base: Sequence[Row]) -> Finding:
    """Each row's live and wasted share of the pool; paging's waste against contiguous-max's."""
    wasted: dict[str, float] = {}
    parts: list[str] = []
    figures: dict[str, float] = {}
    for row in base:
        live, reserved = row.share("live"), row.share("reserved")
        internal, external, rounding = (
            row.share("internal"),
            row.share("external"),
            row.share("rounding"),
        )
        wasted[row.label] = reserved + internal + external
        figures[f"{row.label}: live"] = live
        figures[f"{row.label}: waste"] = wasted[row.label]
        rounded = f", {rounding:.1%} of it by rounding up" if rounding else ""
        parts.append(
            f"{row.label} {live:.1%} live, {wasted[row.label]:.1%} wasted (reserved "
            f"{reserved:.1%}, internal {internal:.1%}, external {external:.1%}{rounded})"
        )
    text = f"Of the KV pool, weighted by time: {'; '.join(parts)}."
    verdict: Verdict = "info"
    traditional = next((row for row in base if row.contiguous_max), None)
    if traditional is not None:
        mine, theirs = point(wasted[ours.label]), point(wasted[traditional.label])
        verdict = compare_spreads(mine, theirs, more_is_better=False)
        we = "Paging" if ours.paged else ours.label
        text += {
            "better": f" {we} wastes less than contiguous-max.",
            "worse": f" {we} wastes more than contiguous-max here.",
        }.get(verdict, f" {we} and contiguous-max waste the same.")
    return {"workload": workload, "verdict": verdict, "text": text, "figures": figures}


def _preemption_price(workload: str, ours: Row) -> Finding:
    """What paging paid for filling the pool: tokens computed again."""
    summary = ours.summary
    preempted = summary["num_preemptions"]["median"]
    price = summary["recomputed_per_output_token"]["median"]
    we = "Paging" if ours.paged else ours.label
    verdict: Verdict = "info"
    if preempted == 0:
        text = f"{we} preempted nobody, so nothing was recomputed."
    else:
        verdict = "worse" if price > SAME_WITHIN else "info"
        text = (
            f"{we} preempted {preempted:g} times and recomputed {price:.2f} tokens for each "
            "token generated."
        )
    figures = {"preemptions": preempted, "recomputed_per_output_token": price}
    return {"workload": workload, "verdict": verdict, "text": text, "figures": figures}


def _peak_memory(
    runs: Sequence[MethodRun], summary: Sequence[Summary], asked: ExperimentInfo
) -> list[Finding]:
    """Peak memory is the process's, over all workloads: one finding for each other row."""
    first: dict[str, Row] = {}
    for name in dict.fromkeys(entry["workload"] for entry in summary):
        for row in base_rows(rows_of(name, runs, summary), asked):
            first.setdefault(row.label, row)
    rows = [row for row in first.values() if row.summary["peak_rss_bytes"]["median"] > 0]
    ours = ours_among(rows)
    if ours is None:
        return []
    where = in_cell(ours.settings, asked)
    return [compare(None, PEAK, ours, row, where) for row in rows if row is not ours]


def _equalities(
    equality: Sequence[Equality], runs: Sequence[MethodRun], asked: ExperimentInfo
) -> list[Finding]:
    """One finding for each row of the base cell and each that differs; the rest in one."""
    if asked["temperature"] > 0:
        text = (
            f"Tokens were sampled at temperature {asked['temperature']:g}, by each method with "
            "its own generator: they differ, and are not compared."
        )
        return [info(None, text)]
    base = {run["label"] for run in runs if is_base(run, asked)}
    findings: list[Finding] = []
    rest: dict[tuple[str, str], list[Equality]] = {}
    for entry in equality:
        if entry["label"] in base or entry["equal"] < entry["total"]:
            findings.append(_equality(entry))
        else:
            rest.setdefault((entry["workload"], entry["reference"]), []).append(entry)
    for (workload, reference), entries in rest.items():
        if len(entries) == 1:
            findings.append(_equality(entries[0]))
            continue
        total = entries[0]["total"]
        text = f"All {len(entries)} rows of further cells gave the same tokens as {reference} "
        findings.append(info(workload, f"{text}for all {total}.", {"rows": float(len(entries))}))
    return findings


def _equality(entry: Equality) -> Finding:
    equal, total = entry["equal"], entry["total"]
    figures = {"equal": float(equal), "total": float(total)}
    if equal == total:
        text = f"{entry['label']} gave the same tokens as {entry['reference']} for all {total}."
    else:
        earliest = min(entry["differences"], key=lambda difference: difference["position"])
        figures["first_position"] = float(earliest["position"])
        text = (
            f"{entry['label']} gave other tokens than {entry['reference']} for "
            f"{total - equal} of {total}; the earliest at position {earliest['position']} "
            f"of {earliest['request']}."
        )
    return {"workload": entry["workload"], "verdict": "info", "text": text, "figures": figures}


def _left_out(workloads: Iterable[WorkloadInfo]) -> list[Finding]:
    """What of a trace was not run as it is."""
    findings = []
    for workload in workloads:
        counts = workload["counts"]
        if counts is None:
            continue
        words = {
            "too long and left out": counts["dropped"],
            "too long and cut": counts["clipped"],
            "entries without a request": counts.get("left_out", 0),
            "bad lines left out": counts["bad"],
        }
        parts = [f"{count:,} {what}" for what, count in words.items() if count]
        if parts:
            first = f" The first bad one: {counts['first_bad']}" if counts["first_bad"] else ""
            text = f"Of {counts['read']:,} requests read: {', '.join(parts)}.{first}"
            figures = {what: float(count) for what, count in words.items()}
            findings.append(info(workload["name"], text, {"read": float(counts["read"])} | figures))
    return findings


def _simulated(runs: Sequence[MethodRun], asked: ExperimentInfo) -> list[Finding]:
    labels = dict.fromkeys(run["label"] for run in runs if run["simulated"])
    if not labels:
        return []
    every = dict.fromkeys(run["label"] for run in runs)
    which = "Every row is" if len(labels) == len(every) else f"{', '.join(labels)} are"
    text = (
        f"{which} simulated: the real scheduler and allocators under a virtual clock, with times "
        f"from the cost model {asked['cost_model'] or 'of the simulator'}, not measured."
    )
    return [info(None, text, {"rows": float(len(labels))})]


def _failures(runs: Sequence[MethodRun]) -> list[Finding]:
    return [
        {
            "workload": None,
            "verdict": "info",
            "text": f"{run['label']} (repeat {run['repeat'] + 1}) is {run['status']}: "
            f"{_first_line(run['reason'])}",
            "figures": {},
        }
        for run in runs
        if run["status"] != "ok"
    ]


def _busy_machine(other_load: Mapping[str, float]) -> list[Finding]:
    busy = {label: cores for label, cores in other_load.items() if cores >= BUSY_CORES}
    if not busy:
        return []
    parts = ", ".join(f"{cores:.1f} while {label} ran" for label, cores in busy.items())
    return [
        {
            "workload": None,
            "verdict": "info",
            "text": f"The machine was not idle: other programs used this many cores: {parts}. "
            "Times and rates of these methods, and what is said of them, are not to be trusted.",
            "figures": {f"{label}: other cores": cores for label, cores in busy.items()},
        }
    ]


def _first_line(text: str | None) -> str:
    return text.splitlines()[0] if text else "no reason known"


def _one_repeat() -> Finding:
    return {
        "workload": None,
        "verdict": "info",
        "text": "Each method ran once, so the spread between runs is not known. On a shared "
        "virtual machine of 2 cores the same row has differed by a third from run to run, so "
        "smaller differences in times and rates may be noise. --repeats 3 shows the spread.",
        "figures": {"repeats": 1.0},
    }

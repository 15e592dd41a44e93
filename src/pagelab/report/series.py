"""Series for charts: columns, thinned to what a chart can show, with their peaks kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagelab.report.words import STATES
from pagelab.results import MemorySamples, Steps, WorkloadRun

MAX_POINTS = 1_000
ALL_POINTS = 24_000  # of all series of a page together, so that many methods stay fast to open
LEAST_POINTS = 150
Columns = dict[str, list[Any]]


def thin(columns: Mapping[str, Sequence[float]], keep: Sequence[str], most: int) -> list[int]:
    """Indices of at most `most` entries that keep the outline of the columns named in `keep`.

    The entries are cut into equal stretches, and of each stretch the first entry and those
    with the largest and smallest value of each column stay; so do the first and the last of all.
    """
    count = min((len(column) for column in columns.values()), default=0)
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 1) // (1 + 2 * len(keep)))
    chosen = {count - 1}
    for i in range(stretches):
        stretch = range(i * count // stretches, (i + 1) * count // stretches)
        chosen.add(stretch[0])
        for name in keep:
            chosen.add(max(stretch, key=columns[name].__getitem__))
            chosen.add(min(stretch, key=columns[name].__getitem__))
    return sorted(chosen)


def points_each(series: int) -> int:
    """How many points each of several series may have."""
    return max(LEAST_POINTS, min(MAX_POINTS, ALL_POINTS // max(1, series)))


def step_columns(run: WorkloadRun, most: int = MAX_POINTS) -> Columns | None:
    """Ledger and queue over time, for a chart that draws each value back to the step before.

    Before the first step everything is free. None where no steps were recorded; a ledger
    column that is missing or too short counts as 0. At most `most` steps are kept.
    """
    steps = run["steps"]
    times = steps["t"]
    if not times:
        return None
    names = [*(state.name for state in STATES), "rounding", "running", "waiting"]
    full = {"t": list(times)} | {name: padded(steps, name, len(times)) for name in names}
    at = thin(full, ("live", "running"), most)
    pool = sum(full[state.name][0] for state in STATES)
    start = dict.fromkeys(names, 0) | {"free": pool, "waiting": full["waiting"][0]}
    columns: Columns = {"t": [0.0, *(round(full["t"][i], 4) for i in at)]}
    for name in names:
        columns[name] = [start[name], *(full[name][i] for i in at)]
    return columns


def has_ledger(run: WorkloadRun) -> bool:
    """Whether the run recorded the states of its pool."""
    steps = run["steps"]
    return bool(steps["t"]) and any(any(padded(steps, s.name, 1)) for s in STATES)


def memory_columns(memory: MemorySamples) -> Columns | None:
    """Memory over time in MiB; None where nothing was sampled."""
    if not memory["t"] or not memory["rss_bytes"]:
        return None
    device = memory["device_bytes"]
    full: dict[str, Sequence[float]] = {"t": memory["t"], "rss": memory["rss_bytes"]}
    if device:
        full["device"] = device
    at = thin(full, [name for name in full if name != "t"], MAX_POINTS)
    columns: Columns = {"t": [round(memory["t"][i], 3) for i in at]}
    for name in full:
        if name != "t":
            columns[name] = [round(full[name][i] / (1 << 20), 1) for i in at]
    return columns


def cdf_columns(values: Sequence[float], most: int = 200) -> Columns:
    """A distribution: which share of the values is at or below each value, from a share of 0."""
    ordered = sorted(values)
    last = len(ordered) - 1
    at = {round(i * last / most) for i in range(most + 1)} if last > most else range(last + 1)
    points = [(float(f"{ordered[i]:.5g}"), round((i + 1) / len(ordered), 5)) for i in sorted(at)]
    points = [(points[0][0], 0.0), *points] if points else []
    return {"x": [x for x, _ in points], "share": [share for _, share in points]}


def padded(steps: Steps, name: str, count: int) -> list[int]:
    """A column of `count` entries, whatever was recorded of it: 0 where it ends early."""
    column: list[int] = list(steps.get(name) or ())  # type: ignore[call-overload]
    return column[:count] + [0] * (count - len(column))

"""The grid, one setting at a time: lines over the values of a setting, all else as in the base.

::

    block size      8    16    32        a `Sweep` of a workload
      paged         ·     ·     ·        a `Line`: one method, a `Row` for each value
      reserved      ·     ·     ·
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pagelab.report.figures import percent, rate, size, watermark
from pagelab.report.rows import Method, Row, rows
from pagelab.results import Results, SettingKey, Spread, is_base


class Measure(NamedTuple):
    """A figure that a sweep shows."""

    title: str
    of: Callable[[Row], Spread]
    show: Callable[[float], str]
    share: bool = False


THROUGHPUT = Measure("output tokens a second", lambda r: r.summary["output_tokens_per_s"], rate)
RUNNING = Measure("requests running at once, mean", lambda r: r.summary["mean_running"], rate)
INTERNAL = Measure(
    "internal, share of the pool", lambda r: r.share_spread("internal"), percent, True
)
EXTERNAL = Measure(
    "external, share of the pool", lambda r: r.share_spread("external"), percent, True
)
RECOMPUTED = Measure(
    "tokens computed again for each output token",
    lambda r: r.summary["recomputed_per_output_token"],
    rate,
)
PREEMPTIONS = Measure("preemptions", lambda r: r.summary["num_preemptions"], lambda v: f"{v:,.0f}")


class Setting(NamedTuple):
    """A setting that the grid can vary."""

    key: SettingKey
    title: str
    note: str
    measures: tuple[Measure, ...]
    show: Callable[[float], str]
    log: bool  # its values usually double


SETTINGS = (
    Setting(
        "kv_memory_bytes",
        "KV budget",
        "More memory lets more requests run at once; how many more is up to the allocator.",
        (THROUGHPUT, RUNNING),
        size,
        True,
    ),
    Setting(
        "block_size",
        "Block size",
        "Small blocks waste less in a request's last one; large ones mean fewer of them to look "
        "up, to share and to hash.",
        (THROUGHPUT, INTERNAL, RUNNING),
        lambda value: f"{value:g}",
        True,
    ),
    Setting(
        "watermark",
        "Watermark",
        "Blocks kept free at admission leave room for running requests to grow. Too few, and "
        "requests are preempted and computed again: the price of a full pool.",
        (RECOMPUTED, PREEMPTIONS, THROUGHPUT),
        watermark,
        False,
    ),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One method over the values of a setting, in their order."""

    method: Method  # any of its cells: for its name and style
    points: list[tuple[float, Row]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One setting on one workload."""

    setting: Setting
    workload: str
    values: list[float]
    lines: list[Line]


def sweeps(results: Results, workload: str) -> list[Sweep]:
    """The sweeps of the settings that have several values, for methods that have several."""
    found = []
    for setting in SETTINGS:
        lines = [
            Line(
                group[0].method, sorted(((_value(row, setting), row) for row in group), key=_first)
            )
            for group in _groups(results, workload, setting.key)
        ]
        values = sorted({value for line in lines for value, _ in line.points})
        if lines:
            found.append(Sweep(setting, workload, values, lines))
    return found


def placements(results: Results, workload: str) -> list[Row]:
    """Rows that differ in how contiguous ranges are placed, allocator by allocator."""
    return [row for group in _groups(results, workload, "placement") for row in group]


def same_batch(results: Results, workload: str) -> list[Row]:
    """The rows of the second fair axis, the traditional allocator first.

    Where `contiguous-max` holds no more than this batch anyway it was not run again: its row of
    the same budget is one of the same batch, too.
    """
    table = rows(results, workload)
    members = [row for row in table if row.method.axis == "batch"]
    names = {row.method.name for row in members}
    held = [r for r in table if r.method.base and r.method.allocator == "contiguous-max"]
    members = [row for row in held if row.method.name not in names] + members if members else []
    return sorted(members, key=lambda row: row.method.allocator != "contiguous-max")


def _groups(results: Results, workload: str, key: SettingKey) -> list[list[Row]]:
    """Rows of one method that differ in `key` alone and are else the base's; two at least."""
    asked = results["experiment"]
    groups: dict[str, list[Row]] = {}
    for row in rows(results, workload):
        if is_base(row.method.first, asked, but=key):
            groups.setdefault(row.method.name, []).append(row)
    return [g for g in groups.values() if len({r.method.settings[key] for r in g}) > 1]


def _value(row: Row, setting: Setting) -> float:
    value = row.method.settings[setting.key]
    assert not isinstance(value, str)
    return value


def _first(point: tuple[float, Row]) -> float:
    return point[0]

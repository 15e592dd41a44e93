"""Block events and progress, coded small enough to embed and to replay in a browser.

Everything is whole numbers in flat lists. A run of blocks that one request takes or gives back in
one step is one entry of four numbers::

    events   [step − previous step, first block − end of the previous entry, blocks, holder] …
    t        differences, in tenths of a millisecond
    tokens   of a request: [steps without a token, tokens in consecutive steps] …

`assets/blockmap.js` decodes it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from pagelab.report.rows import Method
from pagelab.report.series import padded
from pagelab.report.styles import FIRST
from pagelab.results import (
    ExperimentInfo,
    MethodRun,
    RequestResult,
    Results,
    WorkloadRun,
    is_base,
)

# Maps beyond this many numbers in all (about 3 bytes each) are left out: cells beside the base
# first, and later repeats.
MAX_NUMBERS = 700_000
MAX_MAPS = 60  # a longer list would be of no use, and the browser decodes what it opens
_OF_REQUEST = 12  # numbers that a request's id and names take the room of


def block_maps(results: Results) -> tuple[list[dict[str, Any]], int]:
    """The maps of all runs that have blocks, and how many were left out for the file's size."""
    experiment = results["experiment"]
    order = sorted(results["runs"], key=lambda r: (not is_base(r, experiment), r["repeat"]))
    runs = [
        (run, workload)
        for run in order
        if run["kv"] is not None and run["kv"]["num_blocks"] and run["kv"]["block_size"]
        for workload in run["workloads"]
        if workload["block_events"] and workload["steps"]["t"]
    ]
    maps: list[dict[str, Any]] = []
    left_out, numbers = 0, 0
    for run, workload in runs:
        if len(maps) == MAX_MAPS:
            left_out += 1
            continue
        coded = _code(run, workload, experiment)
        size = len(coded["events"]) + len(coded["t"]) * 4
        size += sum(len(r["tokens"]) + _OF_REQUEST for r in coded["requests"])
        if numbers + size > MAX_NUMBERS:
            left_out += 1
        else:
            maps.append(coded)
            numbers += size
    return maps, left_out


def first_view(
    maps: Sequence[dict[str, Any]], methods: Iterable[Method], workload: str | None
) -> dict[str, int]:
    """Which map to open with, which beside it, and at which step.

    A traditional method beside a paged one on the headline's workload, at the moment when
    the paged one has most of its pool live: there the difference is easiest to see.
    """
    if not maps:
        return {}
    known = {method.label: method for method in methods}

    def rank(i: int) -> bool:
        return known[maps[i]["label"]].name not in ("pagelab contiguous-max", FIRST)

    here = [i for i, m in enumerate(maps) if m["workload"] == workload] or list(range(len(maps)))
    here = sorted((i for i in here if known[maps[i]["label"]].base), key=rank) or here
    paged = [i for i in here if known[maps[i]["label"]].phase == "paged"]
    others = [i for i in here if i not in paged]
    main = (others or paged)[0]
    beside = next((i for i in paged if i != main), -1)
    guide = maps[beside if beside >= 0 else main]
    live = _sums(guide["live"])
    moment = _sums(guide["t"])[live.index(max(live))]
    steps = _sums(maps[main]["t"])
    return {"map": main, "beside": beside, "step": min(bisect_left(steps, moment), len(steps) - 1)}


def code_events(events: Iterable[tuple[int, int, int]]) -> list[int]:
    """Code block events; see the module's docstring."""
    coded: list[int] = []
    last_step = end = 0
    for step, block, holder in sorted(events, key=_order):
        if coded and step == last_step and block == end and holder == coded[-1]:
            coded[-2] += 1
        else:
            coded += [step - last_step, block - end, 1, holder]
        last_step, end = step, block + 1
    return coded


def code_tokens(token_times: Sequence[float], step_times: Sequence[float]) -> list[int]:
    """Code in which steps a request's tokens came; see the module's docstring."""
    coded: list[int] = []
    expected = 0
    for time in token_times:
        step = _nearest(step_times, time)
        if coded and step == expected:
            coded[-1] += 1
        else:
            coded += [step - expected, 1]  # below 0: a second token in the same step
        expected = step + 1
    return coded


def _code(run: MethodRun, workload: WorkloadRun, experiment: ExperimentInfo) -> dict[str, Any]:
    assert run["kv"] is not None
    steps = workload["steps"]
    count = len(steps["t"])
    asked = {
        r["id"]: r
        for info in experiment["workloads"]
        if info["name"] == workload["name"]
        for r in info["requests"]
    }

    def request(result: RequestResult) -> dict[str, Any]:
        info = asked.get(result["id"])
        return {
            "id": result["id"],
            "prompt": info["prompt_tokens"] if info else 0,
            "max": info["max_tokens"] if info else len(result["output_token_ids"]),
            "tokens": code_tokens(result["token_times_s"], steps["t"]),
        }

    return {
        "label": run["label"],
        "workload": workload["name"],
        "repeat": run["repeat"],
        "blocks": run["kv"]["num_blocks"],
        "size": run["kv"]["block_size"],
        "t": _differences(round(t * 1e4) for t in steps["t"]),
        "live": _differences(padded(steps, "live", count)),
        "saved": _differences(padded(steps, "shared_saved", count)),
        "waiting": _differences(padded(steps, "waiting", count)),
        "events": code_events(workload["block_events"]),
        "requests": [request(result) for result in workload["requests"]],
    }


def _order(event: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is given back by block, for long runs; what is taken stays in its table's order."""
    step, block, holder = event
    return (step, 0, block) if holder < 0 else (step, 1, 0)


def _nearest(ordered: Sequence[float], value: float) -> int:
    """The index of the closest entry: token and step times may be rounded differently."""
    i = bisect_left(ordered, value)
    if i == len(ordered) or (i > 0 and value - ordered[i - 1] < ordered[i] - value):
        return max(0, i - 1)
    return i


def _differences(values: Iterable[int]) -> list[int]:
    return [after - before for before, after in pairwise([0, *values])]


def _sums(differences: Iterable[int]) -> list[int]:
    total, sums = 0, []
    for difference in differences:
        total += difference
        sums.append(total)
    return sums

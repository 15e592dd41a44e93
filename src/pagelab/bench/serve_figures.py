"""From what became of requests to figures, each with its confidence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain

from typing_extensions import TypedDict

from pagelab.bench.serve_load import Served
from pagelab.metrics import mean, percentile
from pagelab.results import Objectives

PERCENTILES = (50, 90, 95, 99)
_RESAMPLES = 200
_MOST_VALUES = 2_000_000  # numbers that all resamples of one figure may draw


class Interval(TypedDict):
    """A figure and its 95 % confidence interval (bootstrap over requests)."""

    value: float
    low: float
    high: float


def figures(
    served: Sequence[Served], duration_s: float, objectives: Objectives, seed: int = 0
) -> dict[str, Interval]:
    """All figures, by name; latencies in seconds, rates a second. Failed requests have none.

    An interval is the middle 95 % of the figure over resamples of the requests with replacement,
    so gaps of one request stay together. It says how much the figure hangs on these requests, not
    what the machine did otherwise that day.
    """
    done = [one for one in served if one.error is None]
    found: dict[str, Interval] = {}
    samples: dict[str, list[list[float]]] = {
        "ttft": [[one.ttft_s] for one in done],
        "itl": [one.gaps_s for one in done],
        "tpot": [[one.tpot_s] if one.tpot_s is not None else [] for one in done],
        "e2e": [[one.e2e_s] for one in done],
    }
    for name, values in samples.items():
        found[f"{name}_mean_s"] = _interval(values, mean, seed)
        for q in PERCENTILES:
            found[f"{name}_p{q}_s"] = _interval(values, _Percentile(q), seed)
    per_s = 1 / duration_s if duration_s > 0 else 0.0

    def rate(values: list[list[float]]) -> Interval:
        return _interval(values, lambda drawn: sum(drawn) * per_s, seed)

    found["output_tokens_per_s"] = rate([[float(one.output_tokens)] for one in done])
    found["total_tokens_per_s"] = rate(
        [[float(one.prompt_tokens + one.output_tokens)] for one in done]
    )
    found["requests_per_s"] = rate([[1.0] for _ in done])
    if any(limit is not None for limit in objectives.values()):
        found["goodput_per_s"] = rate([[float(meets(one, objectives))] for one in done])
    return found


def meets(one: Served, objectives: Objectives) -> bool:
    """Whether a request was as fast as stated, in everything that is stated."""
    pairs = (
        (one.ttft_s, objectives["ttft_s"]),
        (one.tpot_s, objectives["tpot_s"]),
        (one.e2e_s, objectives["e2e_s"]),
    )
    return all(value is None or limit is None or value <= limit for value, limit in pairs)


class _Percentile:
    def __init__(self, q: float) -> None:
        self._q = q

    def __call__(self, values: Sequence[float]) -> float:
        return percentile(values, self._q)


def _interval(
    groups: Sequence[list[float]], figure: Callable[[Sequence[float]], float], seed: int
) -> Interval:
    value = figure(list(chain.from_iterable(groups)))
    if len(groups) < 2:
        return {"value": value, "low": value, "high": value}
    rng = random.Random(seed)
    count = sum(map(len, groups))
    resamples = max(20, min(_RESAMPLES, _MOST_VALUES // max(1, count)))
    drawn = [
        figure(list(chain.from_iterable(rng.choices(groups, k=len(groups)))))
        for _ in range(resamples)
    ]
    return {"value": value, "low": percentile(drawn, 2.5), "high": percentile(drawn, 97.5)}

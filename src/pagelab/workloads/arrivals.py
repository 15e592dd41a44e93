"""When requests arrive: `--rate`.

    burst            all at the start
    4, poisson:4     a Poisson process, 4 requests/s: exponential gaps
    gamma:4,cv=2     4 requests/s in gaps from a gamma distribution of this coefficient of
                     variation: 1 is Poisson, more comes in bursts, less is more regular
    trace            the trace's own times
    trace:2          the same at twice the pace

The first request arrives at 0. Only `random.random()` is drawn from, whose stream is the same in
every version of Python.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pagelab.errors import ConfigError

if TYPE_CHECKING:
    from pagelab.workloads.shapes import RequestShape

RATES = "burst, a number of requests a second, poisson:4, gamma:4,cv=2, trace or trace:2"


@dataclass(frozen=True, slots=True)
class Rate:
    """A parsed `--rate`.

    Attributes:
        kind: how gaps are made.
        value: requests a second; for `trace` how many times its own pace.
        cv: coefficient of variation of the gaps (standard deviation / mean).
    """

    kind: Literal["burst", "poisson", "gamma", "trace"]
    value: float = 1.0
    cv: float = 1.0

    @property
    def words(self) -> str:
        """For a title."""
        if self.kind == "burst":
            return "all at the start"
        if self.kind == "trace":
            return "as they arrived" + (f", {self.value:g} times as fast" * (self.value != 1))
        varies = f", gaps of variation {self.cv:g}" * (self.kind == "gamma")
        return f"{self.value:g} requests/s ({self.kind}{varies})"

    def apply(self, shapes: Iterator[RequestShape], seed: int) -> Iterator[RequestShape]:
        """The shapes with these arrivals; drawn gaps depend on the seed alone."""
        if self.kind == "trace":
            if self.value == 1:
                return shapes
            return (s._replace(arrival_s=s.arrival_s / self.value) for s in shapes)
        if self.kind == "burst":
            return (s._replace(arrival_s=0.0) if s.arrival_s else s for s in shapes)
        return self._drawn(shapes, random.Random(f"arrivals/{seed}"))

    def _drawn(self, shapes: Iterator[RequestShape], rng: random.Random) -> Iterator[RequestShape]:
        shape = self.cv**-2
        now = 0.0
        for item in shapes:
            yield item._replace(arrival_s=now)
            gap = exponential(rng) if self.kind == "poisson" else gamma(rng, shape) / shape
            now += gap / self.value


def parse_rate(text: str | None) -> Rate | None:
    """What a `--rate` says; None for None.

    Raises:
        ConfigError: it is none of the forms above.
    """
    if text is None:
        return None
    kind, _, rest = text.strip().partition(":")
    if kind in ("burst", "trace") and ":" not in text:
        return Rate("burst" if kind == "burst" else "trace")
    if kind == "trace":
        return Rate("trace", _positive(rest, text))
    if kind == "poisson":
        return Rate("poisson", _positive(rest, text))
    if kind == "gamma":
        value, _, cv = rest.partition(",cv=")
        return Rate("gamma", _positive(value, text), _positive(cv, text) if cv else 1.0)
    return Rate("poisson", _positive(text, text))


def exponential(rng: random.Random) -> float:
    """An exponential number with mean 1."""
    return -math.log(1.0 - rng.random())


def gamma(rng: random.Random, shape: float) -> float:
    """A gamma number with this shape and scale 1, so with mean `shape`.

    Marsaglia and Tsang, "A simple method for generating gamma variables", ACM TOMS 26 (2000): a
    cube of a normal number, accepted or drawn again; below shape 1 through shape + 1.
    """
    if shape < 1:
        power: float = (1.0 - rng.random()) ** (1 / shape)
        return gamma(rng, shape + 1) * power
    d = shape - 1 / 3
    while True:
        x = _normal(rng.random)
        v = (1 + x / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(1.0 - rng.random()) < x * x / 2 + d - d * v + d * math.log(v):
            return d * v


def _normal(draw: Callable[[], float]) -> float:
    """Box and Muller's."""
    radius = math.sqrt(-2 * math.log(1.0 - draw()))
    return radius * math.cos(2 * math.pi * draw())


def _positive(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-6 <= value <= 1e6:
        raise ConfigError(
            f"no rate {whole!r}: --rate takes {RATES}, with numbers from 0.000001 to 1000000"
        )
    return value

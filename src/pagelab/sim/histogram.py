"""Percentiles of any number of values in bounded memory."""

from __future__ import annotations

import math

_RATIO = 1.02  # of neighbouring bounds: a bucket's middle is within 1 % of all its values
_LOG_RATIO = math.log(_RATIO)
_LEAST = 1e-9  # below a nanosecond a time is nothing


class LogHistogram:
    """Counts of non-negative values in buckets that grow by 2 %.

    ::

        buckets   … | 1.0 … 1.02 | 1.02 … 1.0404 | …     a value is known to within 1 %
        values            3              1

    The mean, the least and the greatest value are exact. Some 1,400 buckets hold everything from
    a nanosecond to half an hour; only those in use are kept.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.greatest = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, so many times."""
        bucket = -(1 << 30) if value < _LEAST else math.floor(math.log(value) / _LOG_RATIO)
        self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.count += count
        self.total += value * count
        if value < self.least:
            self.least = value
        if value > self.greatest:
            self.greatest = value

    @property
    def mean(self) -> float:
        """The arithmetic mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, q: float) -> float:
        """The value at rank ⌊q/100 · (n−1)⌋ of the sorted ones, to within 1 %; 0 of nothing."""
        if not 0 <= q <= 100:
            raise ValueError(f"a percentile is from 0 to 100, not {q}")
        if not self.count:
            return 0.0
        rank = math.floor(q / 100 * (self.count - 1))
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen > rank:
                break
        middle = 0.0 if bucket < -(1 << 29) else math.exp((bucket + 0.5) * _LOG_RATIO)
        return min(max(middle, self.least), self.greatest)

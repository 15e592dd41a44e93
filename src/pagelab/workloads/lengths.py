"""Seeded lengths like those of known datasets, any number of them.

Fitted to the figures of the PagedAttention paper (Kwon et al., SOSP 2023, section 6.1 and Fig. 2;
OPT's tokenizer, 2,048 tokens at most), which gives no more than means::

                      paper             here, mean of 200,000 (coefficient of variation)
                      input   output    input           output
    sharegpt-like     161.31  337.99    161.2  (1.11)   338.1  (0.87)
    alpaca-like        19.31   58.45     19.3  (0.48)    58.5  (1.11)

- `sharegpt-like`: the shares of Fig. 2 tell the spread. Orca (Max) holds 7 requests, with live
  slots 20.4 % and reserved ones 13.3 % of 15.7K: weighted by time in the pool a request has 457
  tokens and 298 yet to come. So E[o^2] / (2 E[o]) = 298 and E[i o] / E[o] = 159, almost the mean
  input: outputs vary by 0.87 and do not depend on the input. A Weibull distribution of shape 1.13
  has this (297 and 159 here). Inputs are log-normal, at most 1,024 tokens.
- `alpaca-like`: log-normal both; how much they vary is our guess, about that of the public
  dataset's instructions and answers.

A pair beyond 2,048 tokens is drawn again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from statistics import NormalDist

from pagelab.workloads.shapes import RequestShape

LONGEST = 2048
"""Tokens of input and output together, at most (OPT's context)."""


def sharegpt_like(rng: random.Random) -> Iterator[RequestShape]:
    """Endless shapes with lengths like ShareGPT's in the PagedAttention paper."""
    return _pairs(
        lambda: _log_normal(rng, 4.602, 1.2, least=4, most=1024),
        lambda: max(1, round(357.5 * (-math.log(1.0 - rng.random())) ** (1 / 1.13))),
    )


def alpaca_like(rng: random.Random) -> Iterator[RequestShape]:
    """Endless shapes with lengths like Alpaca's in the PagedAttention paper."""
    return _pairs(
        lambda: _log_normal(rng, 2.857, 0.45, least=3, most=LONGEST),
        lambda: _log_normal(rng, 3.664, 0.9, least=1, most=LONGEST),
    )


def uniform(
    rng: random.Random, inputs: tuple[int, int], outputs: tuple[int, int]
) -> Iterator[RequestShape]:
    """Endless shapes with lengths uniform in these ranges, ends included."""
    while True:
        yield RequestShape(between(rng, *inputs), between(rng, *outputs))


def between(rng: random.Random, low: int, high: int) -> int:
    """Uniform in low..high. Only `random()` is used: its stream is the same in every Python."""
    return low + int(rng.random() * (high - low + 1))


def _pairs(draw_input: Callable[[], int], draw_output: Callable[[], int]) -> Iterator[RequestShape]:
    while True:
        tokens, output = draw_input(), draw_output()
        if tokens + output <= LONGEST:
            yield RequestShape(tokens, output)


def _log_normal(rng: random.Random, mu: float, sigma: float, *, least: int, most: int) -> int:
    """exp of a normal number, rounded; below `least` it is `least`, beyond `most` drawn again."""
    normal = NormalDist(mu, sigma)
    while True:
        # inv_cdf wants more than 0; random() can be 0.
        value = round(math.exp(normal.inv_cdf(max(rng.random(), 2.0**-54))))
        if value <= most:
            return max(least, value)

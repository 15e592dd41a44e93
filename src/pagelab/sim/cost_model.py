"""How long a step takes: a sum of what it does, each with its price in seconds.

::

    seconds = constant
            + Σ slope[k] · new tokens from knot[k] to knot[k + 1]   linear layers, see below
            + per_sequence · sequences                      inputs, attention calls
            + per_sample · tokens sampled                   the output head, sampling
            + per_kv_token · K/V positions read             attention's bytes
            + per_pair · (query, key) pairs of chunks       attention's arithmetic

A linear layer reads its weights once, whatever the rows, and computes for every row: flat as long
as reading takes longer, then rising. The slopes between the knots draw that curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pagelab.errors import ConfigError
from pagelab.results import write_text_safely
from pagelab.scheduling.batch import Batch

KNOTS = (0, 1, 8, 16, 32, 64, 128, 256, 512)
"""Where the calibrated curve of new tokens may bend."""

SCHEMA = "pagelab.cost-model"
VERSION = 1


class StepFeatures(NamedTuple):
    """What a step does, in counts.

    For a sequence with m new tokens from position s, K/V read is s + m positions, and where
    m > 1 the pairs are those of a causal chunk: m·s + m(m+1)/2.
    """

    tokens: int
    sequences: int
    samples: int
    kv_tokens: int
    pairs: int


def features_of(batch: Batch) -> StepFeatures:
    """Count what a batch does."""
    tokens = samples = kv_tokens = pairs = 0
    for part in batch.sequences:
        start, count = part[1], part[2]
        tokens += count
        kv_tokens += start + count
        samples += part[5]
        if count > 1:
            pairs += count * start + count * (count + 1) // 2
    return StepFeatures(tokens, len(batch.sequences), samples, kv_tokens, pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Prices in seconds; see the formula above.

    Attributes:
        name: for people: `unit`, `roofline:h100`, `calibrated: …`.
        constant: of a step.
        knots: rising numbers of new tokens, at which the price of a token changes.
        slopes: the price of a token between each knot and the next; below the first it is free.
        per_sequence, per_sample, per_kv_token, per_pair: as in the formula.
        provenance: where it comes from: machine, model, error of the fit.
    """

    name: str
    constant: float = 0.0
    knots: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    per_sequence: float = 0.0
    per_sample: float = 0.0
    per_kv_token: float = 0.0
    per_pair: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prices = (
            self.constant,
            *self.slopes,
            self.per_sequence,
            self.per_sample,
            self.per_kv_token,
            self.per_pair,
        )
        if len(self.knots) != len(self.slopes) or list(self.knots) != sorted(set(self.knots)):
            raise ConfigError("a cost model's knots must rise, with one slope each")
        if not all(0 <= price < 1e9 for price in prices) or not any(prices):
            raise ConfigError("a cost model's prices must be seconds, not negative, not all 0")

    def seconds(self, step: StepFeatures) -> float:
        """How long such a step takes."""
        total = (
            self.constant
            + self.per_sequence * step.sequences
            + self.per_sample * step.samples
            + self.per_kv_token * step.kv_tokens
            + self.per_pair * step.pairs
        )
        for (knot, end), slope in zip(pairwise((*self.knots, math.inf)), self.slopes, strict=True):
            if step.tokens <= knot:
                break
            total += slope * (min(step.tokens, end) - knot)
        return total

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            ReportError: it cannot be written.
        """
        data = {"schema": SCHEMA, "version": VERSION, **asdict(self)}
        write_text_safely(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read what `save` wrote.

        Raises:
            ConfigError: there is no such file, or it is no cost model.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--cost-model {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"--cost-model {path} is not JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise ConfigError(f"--cost-model {path} is no file of `pagelab calibrate`")
        if data.pop("version", None) != VERSION:
            raise ConfigError(f"--cost-model {path} is of another version: calibrate again")
        try:
            data["knots"], data["slopes"] = tuple(data["knots"]), tuple(data["slopes"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"--cost-model {path} is damaged: {error}") from error


UNIT = CostModel(name="unit", constant=1.0)
"""A step is a second: time counts steps."""


class DeviceLimits(NamedTuple):
    """What a device could do at best."""

    bandwidth: float  # bytes a second
    flops: float  # operations a second, dense, in the weights' dtype


class ModelWork(NamedTuple):
    """What a model asks of a device."""

    weight_bytes: int  # read by a step
    layer_flops: int  # of a token, output head left out
    head_flops: int  # of a sampled token
    kv_bytes: int  # of a token
    pair_flops: int  # attention's, of one query and one key


def roofline(name: str, work: ModelWork, limits: DeviceLimits) -> CostModel:
    """A device's limit: bytes over bandwidth and operations over rate, part by part.

    Linear layers take the longer of reading their weights and computing; K/V is read and chunks
    are computed on top. No machine is faster by much; real ones are slower.
    """
    reading = work.weight_bytes / limits.bandwidth
    computing = work.layer_flops / limits.flops
    return CostModel(
        name=name,
        constant=reading,
        knots=(reading / computing,),
        slopes=(computing,),
        per_sample=work.head_flops / limits.flops,
        per_kv_token=work.kv_bytes / limits.bandwidth,
        per_pair=work.pair_flops / limits.flops,
        provenance={"limits": limits._asdict(), "work": work._asdict()},
    )


def relative_errors(
    model: CostModel, steps: Sequence[StepFeatures], seconds: Sequence[float]
) -> list[float]:
    """predicted / measured - 1, a step."""
    return [
        model.seconds(step) / measured - 1 for step, measured in zip(steps, seconds, strict=True)
    ]

"""What a step costs: features counted by hand, and the curve that the slopes draw."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from pagelab.errors import ConfigError
from pagelab.lab.calibrate import LOADS, Load, Measured, fit
from pagelab.models.shape_source import built_in_shape
from pagelab.scheduling.batch import Batch, ScheduledSequence
from pagelab.sim.cost_model import (
    KNOTS,
    UNIT,
    CostModel,
    DeviceLimits,
    ModelWork,
    StepFeatures,
    features_of,
    roofline,
)
from pagelab.sim.prices import card_roofline, model_work
from pagelab.types import BlockId, RequestId, SamplingParams, SequenceId


def part(name: str, start: int, count: int, samples: bool) -> ScheduledSequence:
    return ScheduledSequence(
        SequenceId(RequestId(name), 0),
        start,
        count,
        (1,) * count,
        (BlockId(0),),
        samples,
        (0, 0),
        SamplingParams(),
    )


def test_features_count_what_a_batch_does() -> None:
    batch = Batch(0, (part("a", 9, 1, True), part("b", 10, 4, False), part("c", 0, 3, True)))
    # K/V read: 10 + 14 + 3; pairs: b 4·10 + 10, c 6; one query has no pairs of a chunk
    assert features_of(batch) == StepFeatures(8, 3, 2, 27, 56)


def test_a_token_costs_what_its_segment_says() -> None:
    model = CostModel(name="x", knots=(0.0, 2.0, 10.0), slopes=(0.0, 3.0, 1.0))

    def seconds(tokens: int) -> float:
        return model.seconds(StepFeatures(tokens, 1, 1, tokens, 0))

    assert [seconds(n) for n in (1, 2, 3, 10, 11, 20)] == [0.0, 0.0, 3.0, 24.0, 25.0, 34.0]


def test_every_feature_has_its_price() -> None:
    model = CostModel(
        name="x", constant=1.0, per_sequence=10.0, per_sample=100.0, per_kv_token=1e3, per_pair=1e4
    )
    assert model.seconds(StepFeatures(9, 2, 3, 4, 5)) == 1.0 + 20.0 + 300.0 + 4e3 + 5e4
    assert UNIT.seconds(StepFeatures(9, 2, 3, 4, 5)) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"knots": (0.0,), "slopes": ()}, "one slope each"),
        ({"knots": (4.0, 4.0), "slopes": (1.0, 1.0)}, "must rise"),
        ({"constant": -1.0}, "not negative"),
        ({"constant": float("nan")}, "not negative"),
        ({}, "not all 0"),
    ],
)
def test_impossible_prices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostModel(name="x", **fields)


def test_a_roofline_is_flat_until_computing_takes_longer_than_reading() -> None:
    work = ModelWork(weight_bytes=1000, layer_flops=20, head_flops=5, kv_bytes=7, pair_flops=3)
    model = roofline("x", work, DeviceLimits(bandwidth=100.0, flops=40.0))
    # reading takes 10 s, a token 0.5 s: they meet at 20 tokens
    assert model.seconds(StepFeatures(1, 1, 0, 0, 0)) == 10.0
    assert model.seconds(StepFeatures(20, 1, 0, 0, 0)) == 10.0
    assert model.seconds(StepFeatures(30, 1, 0, 0, 0)) == 15.0
    assert model.seconds(StepFeatures(1, 1, 8, 0, 0)) == 11.0
    assert model.seconds(StepFeatures(1, 1, 0, 100, 0)) == 17.0
    assert model.seconds(StepFeatures(1, 1, 0, 0, 40)) == 13.0


def test_an_h100_decodes_llama_8b_no_faster_than_it_reads_it() -> None:
    shape = built_in_shape("llama-3.1-8b")
    model = card_roofline("h100", shape, "bfloat16")
    work = model_work(shape, "bfloat16")
    assert 6.9e9 < work.layer_flops / 2 < 7.0e9
    assert 7.4e9 < work.weight_bytes / 2 < 7.6e9  # without the table of input tokens
    step = model.seconds(StepFeatures(64, 64, 64, 64 * 1000, 0))
    assert step == pytest.approx((work.weight_bytes + 64_000 * 131_072) / 3.35e12, rel=0.02)


def test_calibration_follows_a_curve_that_flattens() -> None:
    """Prices of a token may fall with the number of tokens, as they do on CPUs."""
    truth = CostModel(
        name="truth", constant=0.04, knots=(0.0, 8.0, 128.0), slopes=(0.0, 0.0016, 0.0011)
    )
    steps = [StepFeatures(n, 1, 1, n, 0) for n in range(1, 512, 3) for _ in range(2)]
    found = fit(Measured(steps, [truth.seconds(step) for step in steps]))
    for tokens in (1, 30, 100, 200, 500):
        step = StepFeatures(tokens, 1, 1, tokens, 0)
        assert found.seconds(step) == pytest.approx(truth.seconds(step), rel=0.02)


def test_disturbed_steps_are_left_out_and_counted() -> None:
    steps = [StepFeatures(1 + n % 40, 1, 1, 1 + n % 40, 0) for n in range(400)]
    truth = CostModel(name="truth", constant=0.01, knots=(0.0,), slopes=(0.001,))
    seconds = [truth.seconds(step) * (10 if n % 50 == 3 else 1) for n, step in enumerate(steps)]
    found = fit(Measured(steps, seconds))
    assert found.provenance["steps_left_out_as_disturbed"] == 8
    step = StepFeatures(20, 1, 1, 20, 0)
    assert found.seconds(step) == pytest.approx(truth.seconds(step), rel=0.01)


def test_the_loads_of_calibration_reach_every_knot_and_stay_within_a_steps_budget() -> None:
    lone = [load.prompt_tokens for load in LOADS if load.requests == 1]
    for low, high in pairwise(KNOTS[1:]):
        assert any(low < tokens <= high for tokens in lone), (low, high)
    lengths = [Load(24, 70, 10).prompt_length(i) for i in range(24)]
    assert min(lengths) < 30
    assert max(lengths) > 105
    assert sum(lengths) / 24 == pytest.approx(70, rel=0.1)
    assert all(load.longest >= load.prompt_length(i) for load in LOADS for i in range(32))

"""Metrics against figures worked out by hand."""

from __future__ import annotations

import random

import pytest

from pagelab import metrics
from pagelab.results import MethodRun
from tests.unit.test_lab_fakes import method_run, request_result, workload_run


def test_one_request_by_hand() -> None:
    request = request_result("a", [1, 2, 3], [1.5, 2.0, 3.5], arrival=1.0)
    assert metrics.ttft(request) == 0.5
    assert metrics.inter_token_latencies(request) == [0.5, 1.5]
    assert metrics.end_to_end(request) == 2.5
    assert metrics.tpot(request) == 1.0


def test_one_token_has_no_gap_and_no_tpot() -> None:
    request = request_result("a", [1], [1.5])
    assert metrics.inter_token_latencies(request) == []
    assert metrics.tpot(request) is None


@pytest.mark.parametrize(
    ("q", "expected"), [(0, 1.0), (25, 1.75), (50, 2.5), (95, 3.85), (100, 4.0)]
)
def test_percentile_interpolates_linearly(q: float, expected: float) -> None:
    assert metrics.percentile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)


def test_percentile_agrees_with_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    rng = random.Random(0)
    for count in range(1, 30):
        values = [rng.random() for _ in range(count)]
        for q in (0, 1, 33.3, 50, 95, 99, 100):
            assert metrics.percentile(values, q) == pytest.approx(numpy.percentile(values, q))


def test_nothing_gives_zero_and_a_bad_percentile_is_a_bug() -> None:
    assert metrics.percentile([], 50) == metrics.mean([]) == 0
    assert metrics.spread([]) == {"median": 0, "min": 0, "max": 0}
    assert metrics.output_rate(10, 0.0) == 0
    with pytest.raises(ValueError, match="0 to 100"):
        metrics.percentile([1.0], 101)


def test_spread_is_the_median_and_the_ends() -> None:
    assert metrics.spread([3.0, 1.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0}


def test_failed_requests_have_no_latencies() -> None:
    good = request_result("a", [1, 2], [1.0, 2.0])
    bad = request_result("b", [], [])
    bad["finish_reason"] = "error"
    assert metrics.completed([good, bad]) == [good]


def test_summary_pools_gaps_and_takes_the_repeats_median() -> None:
    def repeat(number: int, scale: float) -> MethodRun:
        requests = [
            request_result("a", [1, 2, 3], [1 * scale, 2 * scale, 3 * scale]),
            request_result("b", [1], [5 * scale]),
        ]
        run = workload_run("w", requests, duration=5 * scale)
        return method_run("m", [run], repeat=number, peak=int(100 * scale))

    (entry,) = metrics.summarize([repeat(0, 1.0), repeat(1, 2.0), repeat(2, 4.0)])
    assert (entry["label"], entry["workload"], entry["repeats"]) == ("m", "w", 3)
    assert entry["duration_s"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    assert entry["ttft_mean_s"]["median"] == pytest.approx(2 * (1 + 5) / 2)
    assert entry["ttft_p95_s"]["median"] == pytest.approx(2 * (1 + 0.95 * 4))
    assert entry["itl_mean_s"]["median"] == pytest.approx(2.0)
    assert entry["tpot_mean_s"]["median"] == pytest.approx(2.0)
    assert entry["e2e_mean_s"]["median"] == pytest.approx(2 * (3 + 5) / 2)
    assert entry["output_tokens_per_s"]["max"] == pytest.approx(4 / 5)
    assert entry["peak_rss_bytes"] == {"median": 200.0, "min": 100.0, "max": 400.0}


def test_a_workload_that_only_one_repeat_finished_counts_once() -> None:
    done = workload_run("w", [request_result("a", [1], [1.0])])
    runs = [method_run("m", [done]), method_run("m", [], repeat=1, status="failed")]
    (entry,) = metrics.summarize(runs)
    assert entry["repeats"] == 1


def test_goodput_counts_what_met_every_stated_objective() -> None:
    requests = [
        request_result("fast", [1, 2, 3], [1.0, 1.1, 1.2]),
        request_result("slow to begin", [1, 2, 3], [5.0, 5.1, 5.2]),
        request_result("slow to go on", [1, 2, 3], [1.0, 2.0, 3.0]),
        request_result("one token", [1], [2.0]),  # it has no TPOT to miss
    ]
    failed = request_result("failed", [], [])
    failed["finish_reason"] = "error"
    run = workload_run("w", [*requests, failed], duration=4.0)

    def rate(ttft: float | None, tpot: float | None, e2e: float | None) -> float:
        return metrics.goodput(run, {"ttft_s": ttft, "tpot_s": tpot, "e2e_s": e2e})

    assert rate(2.0, 0.2, None) == 2 / 4
    assert rate(2.0, None, None) == 3 / 4
    assert rate(None, None, 2.5) == 2 / 4
    assert rate(None, None, None) == 4 / 4
    assert rate(0.5, 0.2, None) == 0
    (entry,) = metrics.summarize(
        [method_run("m", [run])], {"ttft_s": 2.0, "tpot_s": 0.2, "e2e_s": None}
    )
    assert entry["goodput_per_s"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    nothing_stated = metrics.summarize(
        [method_run("m", [run])], {"ttft_s": None, "tpot_s": None, "e2e_s": None}
    )
    assert nothing_stated[0]["goodput_per_s"] is None
    assert metrics.summarize([method_run("m", [run])])[0]["goodput_per_s"] is None


def test_recomputed_tokens_are_counted_for_each_one_generated() -> None:
    run = workload_run("w", [request_result("a", [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0])])
    run["recomputed_tokens"], run["num_preemptions"] = 6, 2
    (entry,) = metrics.summarize([method_run("m", [run])])
    assert entry["recomputed_per_output_token"]["median"] == 1.5
    assert entry["num_preemptions"]["median"] == 2
    nothing = workload_run("w", [])
    (entry,) = metrics.summarize([method_run("m", [nothing])])
    assert entry["recomputed_per_output_token"]["median"] == 0

"""Results that are wrong are refused with the first thing that is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagelab.lab.methods.recording import StepRecorder, summarize_ledger
from pagelab.lab.validate import problem_with
from pagelab.results import KVCapacity, WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest
from tests.unit.test_lab_fakes import request_result, workload_run

ASKED = Workload(
    "w",
    "",
    (
        WorkloadRequest(id="a", prompt_token_ids=(1,), max_tokens=2),
        WorkloadRequest(id="b", prompt_token_ids=(1,), max_tokens=1),
    ),
)
CAPACITY: KVCapacity = {
    "bytes": 100,
    "slots": 10,
    "num_blocks": None,
    "block_size": None,
    "note": "",
}


def good() -> WorkloadRun:
    run = workload_run(
        "w", [request_result("a", [1, 2], [1.0, 2.0]), request_result("b", [3], [3.0])]
    )
    recorder = StepRecorder(10)
    recorder.record(1.0, new_tokens=1, running=1, waiting=1, live=4, internal=3)
    recorder.record(3.0, new_tokens=1, running=2, waiting=0, live=2, reserved=1)
    run["steps"] = recorder.steps
    return run


def test_good_results_have_no_problem() -> None:
    assert problem_with(good(), CAPACITY, ASKED) is None


def drop_request(run: WorkloadRun) -> None:
    run["requests"].pop()


def too_few_tokens(run: WorkloadRun) -> None:
    run["requests"][0]["output_token_ids"].pop()
    run["requests"][0]["token_times_s"].pop()


def lost_time(run: WorkloadRun) -> None:
    run["requests"][0]["token_times_s"].pop()


def backwards(run: WorkloadRun) -> None:
    run["requests"][0]["token_times_s"].reverse()


def wrong_count(run: WorkloadRun) -> None:
    run["output_tokens"] += 1


def short_column(run: WorkloadRun) -> None:
    run["steps"]["running"].pop()


def leaking(run: WorkloadRun) -> None:
    run["steps"]["free"][1] += 1


def miscounted(run: WorkloadRun) -> None:
    run["num_preemptions"] = 3


def more_recomputed(run: WorkloadRun) -> None:
    run["recomputed_tokens"] = 7


def more_rounding(run: WorkloadRun) -> None:
    run["steps"]["rounding"][1] = 1


def lost_rounding(run: WorkloadRun) -> None:
    run["steps"]["rounding"].pop()


def negative(run: WorkloadRun) -> None:
    run["steps"]["free"][1] -= 20
    run["steps"]["live"][1] += 20


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_request, "other requests"),
        (too_few_tokens, "request a: 1 tokens instead of 2"),
        (lost_time, "request a: 2 tokens and 1 token times"),
        (backwards, "run backwards"),
        (wrong_count, "4 output tokens and delivered 3"),
        (short_column, "differ in length"),
        (leaking, "at step 1 the ledger is not the pool of 10: live 2, reserved 1"),
        (negative, "at step 1 the ledger"),
        (miscounted, "3 preemptions and lists 0"),
        (more_recomputed, "7 recomputed tokens, its requests 0"),
        (more_rounding, "at step 1 rounding is 1 of 0 external slots"),
        (lost_rounding, "differ in length"),
    ],
)
def test_each_kind_of_error_is_found(spoil: Callable[[WorkloadRun], None], words: str) -> None:
    run = good()
    spoil(run)
    assert words in str(problem_with(run, CAPACITY, ASKED))


def test_results_without_a_capacity_mean_nothing() -> None:
    assert "no KV capacity" in str(problem_with(good(), None, ASKED))


def test_a_failed_request_needs_no_tokens() -> None:
    run = good()
    failed = request_result("b", [], [])
    failed["finish_reason"] = "error"
    run["requests"][1], run["output_tokens"] = failed, 2
    assert problem_with(run, CAPACITY, ASKED) is None


def test_the_summary_weighs_steps_by_their_time() -> None:
    # 1 s with 4 live and 1 running, then 2 s with 2 live and 2 running
    ledger = summarize_ledger(good()["steps"], 10)
    assert ledger["live"] == pytest.approx((1 * 4 + 2 * 2) / 3 / 10)
    assert ledger["internal"] == pytest.approx(1 * 3 / 3 / 10)
    assert ledger["reserved"] == pytest.approx(2 * 1 / 3 / 10)
    assert ledger["free"] == pytest.approx((1 * 3 + 2 * 7) / 3 / 10)
    assert ledger["mean_running"] == pytest.approx((1 * 1 + 2 * 2) / 3)
    assert (ledger["peak_running"], ledger["peak_live_slots"]) == (2, 4)
    assert ledger["peak_allocated_slots"] == 7


def test_steps_in_which_nothing_ran_do_not_count() -> None:
    recorder = StepRecorder(10)
    recorder.record(1.0, new_tokens=1, running=1, waiting=0, live=5)
    recorder.record(9.0, new_tokens=0, running=0, waiting=0, live=0)
    assert summarize_ledger(recorder.steps, 10)["live"] == pytest.approx(0.5)


def test_no_steps_are_no_shares() -> None:
    assert summarize_ledger(StepRecorder(10).steps, 10)["mean_running"] == 0

"""Findings and equality on figures made by hand, paging winning, drawing and losing."""

from __future__ import annotations

from typing import Any

import pytest

from pagelab.lab.analysis import analyse
from pagelab.lab.comparison import compare_spreads
from pagelab.lab.equality import compare_outputs, first_difference
from pagelab.metrics import summarize
from pagelab.results import Finding, MethodRun, Spread
from tests.unit.test_lab_fakes import (
    experiment_info,
    method_run,
    request_result,
    workload_run,
)

ASKED = experiment_info()


def spread(median: float, low: float | None = None, high: float | None = None) -> Spread:
    return {
        "median": median,
        "min": median if low is None else low,
        "max": median if high is None else high,
    }


def run(
    label: str,
    rate: float,
    *,
    repeat: int = 0,
    live: float = 0.5,
    internal: float = 0.0,
    running: float = 1.0,
    ttft: float = 1.0,
    peak: int = 1 << 30,
    preempted: int = 0,
    recomputed: int = 0,
    **cell_of: Any,
) -> MethodRun:
    """A run with 100 output tokens at `rate` a second."""
    request = request_result("a", list(range(100)), [ttft] * 100)
    workload = workload_run(
        "mixed",
        [request],
        duration=100 / rate,
        live=live,
        internal=internal,
        running=running,
    )
    workload["num_preemptions"], workload["recomputed_tokens"] = preempted, recomputed
    return method_run(label, [workload], repeat=repeat, peak=peak, **cell_of)


def findings(*runs: MethodRun, **asked: Any) -> list[Finding]:
    info = experiment_info(**asked)
    return analyse(info, runs, summarize(runs, info["objectives"]), compare_outputs(runs))


def about(found: list[Finding], *words: str) -> Finding:
    (finding,) = [f for f in found if all(word in f["text"] for word in words)]
    return finding


@pytest.mark.parametrize(
    ("ours", "theirs", "more_is_better", "expected"),
    [
        (spread(20), spread(10), True, "better"),
        (spread(10), spread(20), True, "worse"),
        (spread(10), spread(20), False, "better"),
        (spread(20), spread(10), False, "worse"),
        (spread(10), spread(10), True, "same"),
        (spread(100), spread(95), True, "same"),  # exactly 5 % of the larger
        (spread(100), spread(94.9), True, "better"),
        (spread(20, 9, 30), spread(10, 5, 9), True, "same"),  # the ranges touch
        (spread(20, 9.1, 30), spread(10, 5, 9), True, "better"),
        (spread(0), spread(0), True, "same"),
        (spread(1), spread(0), True, "better"),
    ],
)
def test_two_figures_are_the_same_within_five_percent_or_the_spread(
    ours: Spread, theirs: Spread, more_is_better: bool, expected: str
) -> None:
    assert compare_spreads(ours, theirs, more_is_better=more_is_better) == expected


def test_paging_that_wins_is_said_to_win() -> None:
    found = findings(run("hf-generate", 10), run("pagelab paged", 45))
    finding = about(found, "output tokens a second", "hf-generate")
    assert finding["verdict"] == "better"
    assert finding["text"] == (
        "Paging beats hf-generate in output tokens a second at a KV budget of 192.0 MiB: "
        "45 tok/s against 10 tok/s (4.50 times)."
    )
    assert finding["figures"] == {
        "paged_output_tokens_per_s": pytest.approx(45),
        "other_output_tokens_per_s": pytest.approx(10),
        "ratio": pytest.approx(4.5),
    }
    assert finding["workload"] == "mixed"


def test_paging_that_loses_is_said_to_lose() -> None:
    found = findings(run("pagelab contiguous-max", 50), run("pagelab paged", 40))
    finding = about(found, "output tokens a second")
    assert finding["verdict"] == "worse"
    assert finding["text"] == (
        "Paging lost here to pagelab contiguous-max in output tokens a second at a KV budget of "
        "192.0 MiB: 40 tok/s against 50 tok/s (1.25 times less)."
    )


def test_a_draw_is_said_to_be_one() -> None:
    found = findings(run("pagelab contiguous-max", 100), run("pagelab paged", 103))
    finding = about(found, "output tokens a second")
    assert finding["verdict"] == "same"
    assert finding["text"].startswith(
        "No difference between paging and pagelab contiguous-max in output tokens a second"
    )


def test_a_gap_within_the_repeats_spread_is_a_draw() -> None:
    repeats = [
        *(run("hf-static", rate, repeat=i) for i, rate in enumerate((40, 60, 80))),
        *(run("pagelab paged", rate, repeat=i) for i, rate in enumerate((70, 90, 110))),
    ]
    found = findings(*repeats)
    assert about(found, "output tokens a second")["verdict"] == "same"
    assert not [f for f in found if "ran once" in f["text"]]


@pytest.mark.parametrize(("ttft", "verdict"), [(0.5, "better"), (1.02, "same"), (2.0, "worse")])
def test_less_waiting_is_better(ttft: float, verdict: str) -> None:
    found = findings(run("hf-static", 10), run("pagelab paged", 10, ttft=ttft))
    assert about(found, "time to first token")["verdict"] == verdict


@pytest.mark.parametrize(
    ("peak", "verdict"), [(1 << 29, "better"), (1 << 30, "same"), (1 << 31, "worse")]
)
def test_less_memory_is_better(peak: int, verdict: str) -> None:
    finding = about(
        findings(run("hf-static", 10), run("pagelab paged", 10, peak=peak)), "peak memory"
    )
    assert finding["verdict"] == verdict
    assert finding["workload"] is None
    assert "1.0 GiB" in finding["text"]


def test_concurrency_and_live_share_are_against_contiguous_at_the_same_budget() -> None:
    found = findings(
        run("pagelab contiguous-max", 10, running=2, live=0.05),
        run("pagelab paged", 20, running=8, live=0.4),
    )
    assert about(found, "requests running")["figures"]["ratio"] == pytest.approx(4)
    assert "40.0% against 5.0%" in about(found, "holds tokens")["text"]


def test_waste_sums_reserved_internal_and_external() -> None:
    worse = run("pagelab contiguous-max", 10, live=0.1, internal=0.5)
    ledger = worse["workloads"][0]["ledger"]
    ledger["reserved"], ledger["external"], ledger["free"] = 0.05, 0.25, 0.1
    found = findings(worse, run("pagelab paged", 20, live=0.4, internal=0.01))
    finding = about(found, "Of the KV pool")
    assert finding["verdict"] == "better"
    assert finding["figures"]["pagelab contiguous-max: waste"] == pytest.approx(0.8)
    assert finding["figures"]["pagelab paged: waste"] == pytest.approx(0.01)
    assert "(reserved 5.0%, internal 50.0%, external 25.0%)" in finding["text"]


def test_paging_that_wastes_more_is_said_to() -> None:
    found = findings(
        run("pagelab contiguous-max", 10, internal=0.1), run("pagelab paged", 20, internal=0.3)
    )
    assert about(found, "Of the KV pool")["verdict"] == "worse"
    assert about(found, "Of the KV pool")["text"].endswith("wastes more than contiguous-max here.")


@pytest.mark.parametrize(
    ("preempted", "recomputed", "verdict", "words"),
    [
        (0, 0, "info", "preempted nobody"),
        (1, 4, "info", "preempted 1 times and recomputed 0.04 tokens for each"),
        (3, 60, "worse", "preempted 3 times and recomputed 0.60 tokens for each"),
    ],
)
def test_preemptions_have_a_price(
    preempted: int, recomputed: int, verdict: str, words: str
) -> None:
    found = findings(run("pagelab paged", 10, preempted=preempted, recomputed=recomputed))
    finding = about(found, "preempted")
    assert finding["verdict"] == verdict
    assert words in finding["text"]
    assert finding["figures"]["recomputed_per_output_token"] == pytest.approx(recomputed / 100)


def test_without_paging_there_is_no_conclusion() -> None:
    failed = method_run("pagelab paged", [], status="failed", reason="out of memory\ntrace")
    found = findings(run("hf-generate", 10), failed)
    assert about(found, "nothing to compare")["text"].startswith(
        "Paging did not finish on this workload: out of memory;"
    )
    assert about(found, "is failed")["text"] == "pagelab paged (repeat 1) is failed: out of memory"
    assert "was not run" in about(findings(run("hf-generate", 10)), "nothing to compare")["text"]


def test_one_repeat_says_that_the_spread_is_unknown() -> None:
    assert about(findings(run("pagelab paged", 10)), "ran once")["verdict"] == "info"


def test_a_busy_machine_is_said_to_be() -> None:
    runs = [run("hf-static", 10), run("pagelab paged", 20)]
    found = analyse(ASKED, runs, summarize(runs), [], {"hf-static": 0.1, "pagelab paged": 0.8})
    finding = about(found, "not idle")
    assert "0.8 while pagelab paged ran" in finding["text"]
    assert finding["figures"] == {"pagelab paged: other cores": 0.8}


def test_no_runs_give_no_findings() -> None:
    assert findings() == []


Tokens = list[int]


def outputs(label: str, tokens: dict[str, Tokens], **options: object) -> MethodRun:
    requests = [request_result(name, ids, [1.0] * len(ids)) for name, ids in tokens.items()]
    return method_run(label, [workload_run("w", requests)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "tokens", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 9, 3], (1, 2, 9)),
        ([1, 2, 3], [1, 2], (2, 3, None)),
        ([1], [1, 2], (1, None, 2)),
    ],
)
def test_the_first_difference(
    reference: Tokens, tokens: Tokens, expected: tuple[int, int | None, int | None] | None
) -> None:
    found = first_difference("a", reference, tokens)
    if expected is None:
        assert found is None
    else:
        position, theirs, ours = expected
        assert found == {
            "request": "a",
            "position": position,
            "reference_token": theirs,
            "token": ours,
        }


def test_outputs_are_compared_with_the_first_method_that_finished() -> None:
    runs = [
        method_run("hf-generate", [], status="failed"),
        outputs("hf-static", {"a": [1, 2], "b": [3, 4]}),
        outputs("pagelab paged", {"a": [1, 2], "b": [3, 5]}),
        outputs("pagelab paged", {"a": [9, 9], "b": [9, 9]}, repeat=1),
    ]
    (entry,) = compare_outputs(runs)
    assert (entry["reference"], entry["label"]) == ("hf-static", "pagelab paged")
    assert (entry["equal"], entry["total"]) == (1, 2)
    assert [d["request"] for d in entry["differences"]] == ["b"]
    found = analyse(ASKED, runs, summarize(runs), [entry])
    assert about(found, "other tokens")["text"] == (
        "pagelab paged gave other tokens than hf-static for 1 of 2; the earliest at position 1 "
        "of b."
    )


def test_equal_outputs_are_said_to_be() -> None:
    runs = [outputs("hf-generate", {"a": [1]}), outputs("pagelab paged", {"a": [1]})]
    found = analyse(ASKED, runs, summarize(runs), compare_outputs(runs))
    assert about(found, "the same tokens")["figures"] == {"equal": 1.0, "total": 1.0}

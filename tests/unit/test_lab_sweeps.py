"""Findings beside the base cell: sweeps, the same batch, further cells; like against like."""

from __future__ import annotations

from typing import Any

import pytest

from pagelab.results import Finding, MethodRun
from tests.unit.test_lab_analysis import about, findings, run
from tests.unit.test_lab_fakes import BUDGET, cell

HALF = BUDGET // 2


def silent(found: list[Finding], *words: str) -> bool:
    return not [f for f in found if all(word in f["text"] for word in words)]


def test_further_cells_compare_paging_with_the_contiguous_rows_of_the_same_cell() -> None:
    half: dict[str, Any] = {"settings": cell(kv_memory_bytes=HALF)}
    found = findings(
        run("hf-static, 96 MiB", 9, **half),
        run("pagelab contiguous-max, 192 MiB", 20),
        run("pagelab contiguous-max, 96 MiB", 10, **half),
        run("pagelab paged, 192 MiB", 30),
        run("pagelab paged, 96 MiB", 40, **half),
        kv_memories=[BUDGET, HALF],
    )
    finding = about(found, "Paging beats", "at a KV budget of 96.0 MiB", "tokens a second")
    assert finding["text"] == (
        "Paging beats pagelab contiguous-max, 96 MiB in output tokens a second at a KV budget of "
        "96.0 MiB: 40 tok/s against 10 tok/s (4.00 times)."
    )
    about(found, "Paging beats pagelab contiguous-max, 192 MiB in output tokens a second")
    assert silent(found, "hf-static, 96 MiB", "tokens a second")  # neither base nor ours


def test_the_budget_sweep_gives_the_ratio_at_each_budget() -> None:
    half: dict[str, Any] = {"settings": cell(kv_memory_bytes=HALF)}
    found = findings(
        run("pagelab contiguous-max, 192 MiB", 20),
        run("pagelab contiguous-max, 96 MiB", 10, **half),
        run("pagelab paged, 192 MiB", 30),
        run("pagelab paged, 96 MiB", 40, **half),
        kv_memories=[BUDGET, HALF],
    )
    finding = about(found, "by KV budget")
    assert finding["text"] == (
        "pagelab paged against pagelab contiguous-max in output tokens a second, by KV budget: "
        "192.0 MiB: 1.50 times; 96.0 MiB: 4.00 times."
    )
    assert finding["figures"] == {
        f"ratio at {BUDGET} bytes": pytest.approx(1.5),
        f"ratio at {HALF} bytes": pytest.approx(4),
    }


def twice(label: str, rate: float, **options: Any) -> list[MethodRun]:
    """Two repeats of a row, so that its spread is known."""
    return [run(label, rate, repeat=repeat, **options) for repeat in range(2)]


def block_runs(*rates: float, repeats: int = 2) -> list[MethodRun]:
    return [
        run(
            f"pagelab paged, block {size}",
            rate,
            repeat=repeat,
            internal=size / 1000,
            settings=cell(block_size=size),
        )
        for repeat in range(repeats)
        for size, rate in zip((16, 1, 128), rates, strict=True)
    ]


def test_single_measured_runs_are_not_ranked_but_simulated_ones_are() -> None:
    runs = block_runs(100, 90, 130, repeats=1)
    found = findings(*runs, block_sizes=[16, 1, 128])
    text = about(found, "by block size")["text"]
    assert "fastest" not in text
    assert text.endswith("Each ran once, so the speeds are not ranked; --repeats 3 may.")
    for simulated in runs:
        simulated["simulated"] = True
    found = findings(*runs, block_sizes=[16, 1, 128])
    assert about(found, "by block size")["text"].endswith("The fastest: block 128.")


def test_the_block_size_sweep_names_the_fastest_and_its_equals() -> None:
    found = findings(*block_runs(100, 90, 102), block_sizes=[16, 1, 128])
    assert about(found, "by block size")["text"] == (
        "pagelab paged by block size: block 16: 100 tok/s, 1.6% internal; "
        "block 1: 90 tok/s, 0.1% internal; block 128: 102 tok/s, 12.8% internal. "
        "The fastest: block 128, not different from block 16."
    )
    found = findings(*block_runs(100, 97, 99), block_sizes=[16, 1, 128])
    finding = about(found, "by block size")
    assert finding["text"].endswith("The block size makes no difference to the speed here.")
    assert finding["figures"]["block 128: internal"] == pytest.approx(0.128)
    assert finding["figures"]["block 1: output_tokens_per_s"] == pytest.approx(97)


def test_a_sweep_needs_two_values_that_finished() -> None:
    found = findings(*block_runs(100, 90, 102)[:1], block_sizes=[16, 1, 128])
    assert silent(found, "by block size")


def test_a_cell_that_differs_in_two_settings_is_in_no_sweep() -> None:
    both = cell(block_size=8, watermark=0.01)
    found = findings(
        run("pagelab paged, block 16, watermark 5 %", 10),
        run("pagelab paged, block 8, watermark 1 %", 20, settings=both),
        block_sizes=[16, 8],
        watermarks=[0.05, 0.01],
    )
    assert silent(found, "by block size")
    assert silent(found, "by watermark")


def test_the_watermark_sweep_is_the_price_of_recompute() -> None:
    found = findings(
        *twice("pagelab paged, watermark 5 %", 100, preempted=2, recomputed=15),
        *twice(
            "pagelab paged, watermark 1 %",
            80,
            preempted=12,
            recomputed=60,
            settings=cell(watermark=0.01),
        ),
        watermarks=[0.05, 0.01],
    )
    finding = about(found, "by watermark")
    assert finding["text"] == (
        "pagelab paged by watermark: 5 %: 0.15 tokens recomputed for each generated, 2 "
        "preemptions, 100 tok/s; 1 %: 0.60 tokens recomputed for each generated, 12 preemptions, "
        "80 tok/s. The fastest: 5 %. The least is recomputed at 5 %."
    )
    assert finding["figures"]["1 %: recomputed_per_output_token"] == pytest.approx(0.6)


def test_a_pool_that_was_never_full_has_no_such_price() -> None:
    found = findings(
        *twice("pagelab paged, watermark 5 %", 100),
        *twice("pagelab paged, watermark 1 %", 100, settings=cell(watermark=0.01)),
        watermarks=[0.05, 0.01],
    )
    assert about(found, "by watermark")["text"].endswith(
        "makes no difference to the speed here. Nobody was preempted: the pool was never full."
    )


def test_placements_are_compared_by_what_they_lose() -> None:
    buddy = twice("pagelab contiguous-max, buddy", 10)
    for each in buddy:
        ledger = each["workloads"][0]["ledger"]
        ledger["external"], ledger["rounding"], ledger["free"] = 0.3, 0.2, 0.2
    first_fit = twice("pagelab contiguous-max, first-fit", 20, settings=cell(placement="first-fit"))
    found = findings(
        *buddy, *first_fit, run("pagelab paged", 30), placements=["buddy", "first-fit"]
    )
    assert about(found, "by placement")["text"] == (
        "pagelab contiguous-max by placement: buddy: 10 tok/s, 30.0% external (20.0% rounding "
        "up); first-fit: 20 tok/s, 0.0% external. The fastest: first-fit."
    )


@pytest.mark.parametrize(
    ("rate", "verdict", "words"),
    [
        (80, "worse", "20.0% slower: the price of paging itself"),
        (98, "same", "no difference (-2.0%), so paging itself costs nothing that shows"),
        (125, "better", "25.0% faster, so paging itself costs nothing here"),
    ],
)
def test_the_same_batch_gives_the_price_of_paging_itself(
    rate: float, verdict: str, words: str
) -> None:
    two: dict[str, Any] = {"axis": "batch", "settings": cell(max_num_seqs=2)}
    repeats = [
        row
        for repeat in range(2)
        for row in (
            run("pagelab contiguous-max", 100, running=2, repeat=repeat),
            run("pagelab paged", 300, running=9, repeat=repeat),
            run("pagelab paged, batch 2", rate, running=2, repeat=repeat, **two),
        )
    ]
    found = findings(*repeats, batch=2)
    finding = about(found, "At the same batch of 2")
    assert finding["verdict"] == verdict
    assert words in finding["text"]
    assert "2.00 and 2.00 requests at a time" in finding["text"]
    assert finding["figures"]["ratio"] == pytest.approx(rate / 100)
    assert silent(found, "batch 2", "KV budget")  # it is in no comparison of the same budget


@pytest.mark.parametrize("rate", [80, 98, 125])
def test_one_run_each_gives_no_verdict_on_the_price_of_paging(rate: float) -> None:
    two: dict[str, Any] = {"axis": "batch", "settings": cell(max_num_seqs=2)}
    found = findings(
        run("pagelab contiguous-max", 100), run("pagelab paged, batch 2", rate, **two), batch=2
    )
    finding = about(found, "At the same batch of 2")
    assert finding["verdict"] == "info"
    assert "does not tell this from noise" in finding["text"]
    assert f"{rate / 100 - 1:+.1%}" in finding["text"]
    assert "faster" not in finding["text"]
    assert "slower" not in finding["text"]


def test_a_capped_contiguous_row_is_the_reference_of_the_same_batch() -> None:
    one: dict[str, Any] = {"axis": "batch", "settings": cell(max_num_seqs=1)}
    repeats = [
        row
        for repeat in range(2)
        for row in (
            run("pagelab contiguous-max", 100, repeat=repeat),
            run("pagelab paged", 300, repeat=repeat),
            run("pagelab contiguous-max, batch 1", 50, repeat=repeat, **one),
            run("pagelab paged, batch 1", 40, repeat=repeat, **one),
        )
    ]
    found = findings(*repeats, batch=1)
    assert "20.0% slower" in about(found, "same batch of 1")["text"]


def test_goodput_counts_requests_within_the_objectives() -> None:
    limits = {"ttft_s": 2.0, "tpot_s": 0.2, "e2e_s": None}
    found = findings(
        run("hf-static", 10, ttft=3.0), run("pagelab paged", 20, ttft=1.0), objectives=limits
    )
    finding = about(found, "Goodput")
    assert finding["verdict"] == "better"
    assert finding["text"] == (
        "Goodput, in requests a second that met the objectives (first token within 2 s, 0.2 s a "
        "token): pagelab paged 0.2; hf-static 0."
    )
    assert silent(findings(run("pagelab paged", 20)), "Goodput")


def test_simulated_rows_are_said_to_be() -> None:
    found = findings(
        run("pagelab paged", 20, simulated=True),
        run("pagelab contiguous-max", 10, simulated=True),
        cost_model="fitted on an EPYC",
    )
    assert "Every row is simulated" in about(found, "fitted on an EPYC")["text"]
    assert silent(found, "ran once")  # a simulation has no noise
    assert silent(findings(run("pagelab paged", 20)), "simulated")


def test_what_a_trace_left_out_is_counted() -> None:
    counts = {"read": 1200, "bad": 2, "dropped": 0, "clipped": 3, "first_bad": "x.csv, line 7: …"}
    asked: list[dict[str, Any]] = [
        {"name": "x", "title": "", "requests": [], "rate": None, "counts": counts}
    ]
    finding = about(findings(run("pagelab paged", 20), workloads=asked), "requests read")
    assert finding["text"] == (
        "Of 1,200 requests read: 3 too long and cut, 2 bad lines left out. The first bad one: "
        "x.csv, line 7: …"
    )
    clean = [{**asked[0], "counts": {**counts, "bad": 0, "clipped": 0, "first_bad": None}}]
    assert silent(findings(run("pagelab paged", 20), workloads=clean), "requests read")


def test_ones_own_allocator_that_pages_is_compared_under_its_own_name() -> None:
    mine = run("pagelab headroom", 20)
    mine["phase"] = "paged"
    found = findings(run("pagelab contiguous-max", 10), mine)
    assert about(found, "output tokens a second")["text"].startswith(
        "pagelab headroom beats pagelab contiguous-max in output tokens a second"
    )
    both = findings(run("pagelab paged", 40), mine)
    assert about(both, "output tokens a second")["text"].startswith("Paging beats pagelab headroom")


def test_sampled_tokens_are_not_compared() -> None:
    found = findings(run("hf-static", 10), run("pagelab paged", 20), temperature=0.8)
    assert "temperature 0.8" in about(found, "not compared")["text"]
    assert silent(found, "the same tokens")


def test_further_cells_with_equal_tokens_share_one_sentence() -> None:
    found = findings(
        run("pagelab contiguous-max", 10), *block_runs(10, 11, 12), block_sizes=[16, 1, 128]
    )
    about(found, "pagelab paged, block 16 gave the same tokens")
    assert about(found, "rows of further cells")["text"] == (
        "All 2 rows of further cells gave the same tokens as pagelab contiguous-max for all 1."
    )


def test_without_the_budget_axis_nothing_is_said_to_be_missing() -> None:
    two: dict[str, Any] = {"axis": "batch", "settings": cell(max_num_seqs=2)}
    found = findings(
        run("pagelab contiguous-max, batch 2", 50, **two),
        run("pagelab paged, batch 2", 40, **two),
        batch=2,
    )
    assert silent(found, "nothing to compare")
    about(found, "At the same batch of 2")

"""What a report computes: figures, the headline, thinned series, coded block events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagelab.metrics import differ
from pagelab.report.blockmap import block_maps, code_events, code_tokens, first_view
from pagelab.report.figures import interval, joined, percent, rate, seconds
from pagelab.report.headline import headline, headline_workload, key_figures
from pagelab.report.rows import methods, rows
from pagelab.report.series import cdf_columns, step_columns, thin
from pagelab.report.words import STATES
from pagelab.results import Results, Spread, load_results, save_results
from tests.support.synthetic_results import BLOCK, make_long_results, make_results


def spread(median: float, low: float | None = None, high: float | None = None) -> Spread:
    return {
        "median": median,
        "min": median if low is None else low,
        "max": median if high is None else high,
    }


def test_synthetic_results_are_valid_results(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"repeats": 3}, {"failed": True}, {"interrupted": True}]
    for kwargs in variants:
        results = make_results(**kwargs)
        save_results(results, tmp_path / "results.json")
        assert load_results(tmp_path / "results.json")["runs"]


def test_synthetic_ledgers_add_up_and_agree_with_their_block_events() -> None:
    for run in make_results()["runs"]:
        assert run["kv"] is not None
        for workload in run["workloads"]:
            steps = workload["steps"]
            holders: dict[int, int] = {}
            events = iter([*workload["block_events"], (1 << 30, 0, -1)])
            event = next(events)
            for i in range(len(steps["t"])):
                slots = [steps[state.name][i] for state in STATES]
                assert sum(slots) == run["kv"]["slots"]
                assert min(slots) >= 0
                while event[0] <= i:
                    holders[event[1]] = event[2]
                    event = next(events)
                if run["kv"]["num_blocks"] is not None:
                    held = sum(holder >= 0 for holder in holders.values()) * BLOCK
                    assert held == sum(slots[:3])
                    assert sum(h == -2 for h in holders.values()) * BLOCK == steps["cached"][i]


def test_synthetic_long_results_have_over_10000_steps() -> None:
    counts = [len(w["steps"]["t"]) for run in make_long_results()["runs"] for w in run["workloads"]]
    assert max(counts) > 10_000


def test_coded_events_replay_to_the_same_holders_at_every_step() -> None:
    for run in make_results()["runs"]:
        for workload in run["workloads"]:
            coded = code_events(workload["block_events"])
            raw: dict[int, int] = {}
            order: dict[int, list[int]] = {}
            replayed: list[tuple[int, int, int]] = []
            step = block = 0
            for i in range(0, len(coded), 4):
                step += coded[i]
                block += coded[i + 1]
                replayed += [(step, block + k, coded[i + 3]) for k in range(coded[i + 2])]
                block += coded[i + 2]
            assert sorted(replayed) == sorted(workload["block_events"])
            for _, block_id, holder in workload["block_events"]:
                raw[block_id] = holder
                if holder >= 0:
                    order.setdefault(holder, []).append(block_id)
            again: dict[int, list[int]] = {}
            for _, block_id, holder in replayed:
                if holder >= 0:
                    again.setdefault(holder, []).append(block_id)
            assert again == order  # the order of a block table survives


def test_a_contiguous_range_is_one_entry() -> None:
    events = [(3, block, 0) for block in range(8, 72)]
    freed = [(9, block, -1) for block in (70, *range(8, 70), 71)]
    assert code_events(events + freed) == [3, 8, 64, 0, 6, -64, 64, -1]


def test_coded_tokens_name_the_step_of_every_token() -> None:
    steps = [0.1 * i for i in range(10)]
    assert code_tokens([0.2001, 0.3, 0.3999, 0.7, 0.8], steps) == [2, 3, 2, 2]
    assert code_tokens([0.5, 0.5], steps) == [5, 1, -1, 1]  # two tokens in one step
    assert code_tokens([], steps) == []


def test_block_maps_beyond_the_limit_leave_later_repeats_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = make_results(repeats=3)
    everything, none_left_out = block_maps(results)
    assert (len(everything), none_left_out) == (12, 0)
    monkeypatch.setattr("pagelab.report.blockmap.MAX_NUMBERS", 10_000)
    some, left_out = block_maps(results)
    assert len(some) + left_out == 12
    assert left_out > 0
    assert {m["repeat"] for m in some[:4]} == {0}


def test_first_view_is_a_traditional_map_beside_a_paged_one() -> None:
    results = make_results()
    maps, _ = block_maps(results)
    view = first_view(maps, methods(results), "mixed")
    assert maps[view["map"]]["label"] == "pagelab contiguous-max"
    assert maps[view["beside"]]["label"] == "pagelab paged"
    assert maps[view["map"]]["workload"] == maps[view["beside"]]["workload"] == "mixed"
    assert 0 < view["step"] < len(maps[view["map"]]["t"])
    assert first_view([], methods(results), "mixed") == {}


def test_thin_keeps_every_peak() -> None:
    values = [0.0] * 5000
    values[1234], values[4321] = 9.0, -9.0
    at = thin({"v": values}, ["v"], 300)
    assert len(at) <= 300
    assert {0, 1234, 4321, 4999} <= set(at)
    assert at == sorted(at)
    assert thin({"v": [1.0, 2.0]}, ["v"], 300) == [0, 1]


def test_step_columns_start_from_a_free_pool_and_survive_missing_columns() -> None:
    run = make_results()["runs"][3]["workloads"][1]
    columns = step_columns(run)
    assert columns is not None
    assert columns["t"][0] == 0
    assert columns["free"][0] == 182 * BLOCK
    run["steps"]["live"] = run["steps"]["live"][:5]
    run["steps"]["external"] = []
    columns = step_columns(run)
    assert columns is not None
    assert len({len(column) for column in columns.values()}) == 1
    run["steps"]["t"] = []
    assert step_columns(run) is None


def test_cdf_goes_from_0_to_1() -> None:
    columns = cdf_columns([3.0, 1.0, 2.0, 2.0])
    assert columns["x"] == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert columns["share"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    many = cdf_columns([float(i) for i in range(10_000)])
    assert len(many["x"]) <= 202
    assert many["share"][-1] == 1.0
    assert cdf_columns([]) == {"x": [], "share": []}


def test_figures_read_well() -> None:
    assert [seconds(v) for v in (0, 0.00042, 0.0995, 0.9996, 1.234, 54.91)] == [
        "0 s", "0.4 ms", "100 ms", "1.00 s", "1.23 s", "54.9 s",
    ]  # fmt: skip
    assert [rate(v) for v in (0.5, 0.996, 9.62, 118.9, 1234.5)] == [
        "0.50", "1.0", "9.6", "119", "1,234",
    ]  # fmt: skip
    assert [percent(v) for v in (0, 0.004, 0.0995, 0.5512)] == ["0 %", "0.4 %", "10 %", "55 %"]
    assert interval("54.5 ms", "58.4 ms") == "54.5–58.4 ms"
    assert interval("980 ms", "1.02 s") == "980 ms–1.02 s"
    assert interval("17", "17") == ""
    assert joined(["a", "b", "c"]) == "a, b and c"


def test_a_difference_is_claimed_only_beyond_5_percent_and_the_spread() -> None:
    assert differ(spread(120), spread(60)) == 1
    assert differ(spread(60), spread(120)) == -1
    assert differ(spread(100), spread(103)) == 0
    assert differ(spread(120, 90, 130), spread(100, 95, 105)) == 0


def test_headline_names_the_figures_of_the_larger_workload() -> None:
    results = make_results()
    assert headline_workload(results) == "mixed"
    assert headline(results) == (
        "On the mixed workload, with 128.0 MiB for K/V, pagelab paged wrote 121 tokens a second, "
        "2.0 times pagelab contiguous-max, 5.6 times hf-static and 7.3 times hf-generate, "
        "and ran 9.6 requests at once where pagelab contiguous-max ran 1.9."
    )
    speed = key_figures(results)[0]
    assert (speed.name, speed.value) == ("output tokens a second", "121")
    assert speed.others[0] == ("pagelab contiguous-max", "61.2")


def test_headline_says_when_paging_lost_and_when_nothing_differs() -> None:
    results = make_results()
    set_rate(results, "pagelab paged", 50.0)
    set_rate(results, "pagelab contiguous-max", 100.0)
    set_rate(results, "hf-static", 51.0)
    sentence = headline(results)
    assert "no different from hf-static" in sentence
    assert "only 0.50 times pagelab contiguous-max" in sentence


def test_headline_of_partial_results() -> None:
    results = make_results()
    results["runs"] = [r for r in results["runs"] if r["phase"] == "traditional"]
    results["summary"] = [s for s in results["summary"] if s["label"] != "pagelab paged"]
    assert headline(results) == (
        "On the mixed workload only hf-generate, hf-static and pagelab contiguous-max finished, "
        "so paging cannot be compared."
    )
    assert key_figures(results) == []
    results["runs"], results["summary"] = [], []
    assert headline(results) == "No method finished a workload, so there is nothing to compare."


def test_methods_without_figures_take_no_style_from_those_with_figures() -> None:
    found = {m.label: m for m in methods(make_results(failed=True))}
    assert found["pagelab paged"].color == "var(--paged-0)"
    assert found["pagelab paged"].dash == ()
    drawn = [m for m in found.values() if m.first["workloads"]]
    assert len({(m.color, m.dash) for m in drawn}) == len(drawn)


def test_rows_give_shares_of_the_whole_pool() -> None:
    for row in rows(make_results(repeats=2), "mixed"):
        assert sum(row.shares.values()) == pytest.approx(1.0)
        assert row.peak_running >= row.summary["mean_running"]["median"]


def set_rate(results: Results, label: str, value: float) -> None:
    for summary in results["summary"]:
        if summary["label"] == label:
            summary["output_tokens_per_s"] = spread(value)

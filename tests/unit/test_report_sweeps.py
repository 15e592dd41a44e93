"""What a report makes of a grid: the base first, one setting at a time, the same batch."""

from __future__ import annotations

import copy
import io
import json
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pagelab.report.asked import asked, workload_facts
from pagelab.report.blockmap import MAX_MAPS, block_maps, first_view
from pagelab.report.headline import headline, key_figures, sides
from pagelab.report.html import MOST_FINDINGS, MOST_REQUESTS, render_html
from pagelab.report.pool_charts import ROUNDING, share_segments
from pagelab.report.rows import methods, rows, shown, shown_rows
from pagelab.report.series import ALL_POINTS, points_each
from pagelab.report.styles import Style, styles
from pagelab.report.sweeps import placements, same_batch, sweeps
from pagelab.report.terminal import print_summary
from pagelab.report.words import STATES
from pagelab.results import Phase, Results, is_base, load_results, save_results
from tests.support.synthetic_results import MIB, make_results
from tests.support.synthetic_sweeps import (
    Sweep,
    make_all_methods_results,
    make_grid_results,
    make_long_grid_results,
)
from tests.unit.test_report_html import EVIL, Page


@pytest.fixture(scope="module")
def grid() -> Results:
    return make_grid_results()


@pytest.fixture(scope="module")
def page(grid: Results) -> Page:
    return Page(render_html(grid))


@pytest.fixture
def simulated() -> Results:
    return make_grid_results(Sweep(simulated=True, requests=8))


def printed(results: Results, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    print_summary(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# -- rows and styles


def test_synthetic_grids_are_valid_results_whose_ledgers_add_up(
    grid: Results, tmp_path: Path
) -> None:
    save_results(grid, tmp_path / "results.json")
    assert len(load_results(tmp_path / "results.json")["runs"]) == 65
    for run in grid["runs"]:
        assert run["kv"] is not None
        [workload] = run["workloads"]
        columns = [workload["steps"][state.name] for state in STATES]
        assert {sum(slots) for slots in zip(*columns, strict=True)} == {run["kv"]["slots"]}


def test_charts_show_the_base_cell_and_the_table_every_cell_base_first(grid: Results) -> None:
    base = [run["label"] for run in grid["runs"] if is_base(run, grid["experiment"])]
    assert [row.method.label for row in shown_rows(grid, "chat")] == base
    assert [row.method.name for row in shown_rows(grid, "chat")] == [
        "pagelab contiguous-max",
        "pagelab contiguous-oracle",
        "pagelab paged",
    ]
    every = [row.method.label for row in rows(grid, "chat")]
    assert every[:3] == base
    assert sorted(every) == sorted(summary["label"] for summary in grid["summary"])


def test_without_a_base_cell_the_rows_that_ran_are_shown_under_unique_names() -> None:
    batch_only = make_grid_results(Sweep(batch=2, requests=6))
    batch_only["runs"] = [run for run in batch_only["runs"] if run["axis"] == "batch"]
    assert len(shown(batch_only)) == len(batch_only["runs"]) > 0
    elsewhere = make_grid_results(
        Sweep(kv_memories=(64 * MIB, 32 * MIB, 128 * MIB), allocators=("paged",), requests=6)
    )
    elsewhere["runs"] = [
        run for run in elsewhere["runs"] if run["label"] != "pagelab paged, 64 MiB"
    ]
    elsewhere["summary"] = [
        s for s in elsewhere["summary"] if s["label"] != "pagelab paged, 64 MiB"
    ]
    names = [method.name for method in shown(elsewhere)]
    assert names == ["pagelab paged, 32 MiB", "pagelab paged, 128 MiB"]
    assert "Simulated" not in Page(render_html(elsewhere)).words


def test_a_method_looks_the_same_in_every_cell(grid: Results) -> None:
    looks: dict[str, set[Style]] = {}
    for method in methods(grid):
        looks.setdefault(method.name, set()).add(method.style)
    assert all(len(found) == 1 for found in looks.values())


def test_ten_methods_differ_without_their_colours() -> None:
    traditional = [(f"t{i}", "traditional") for i in range(8)]
    paged = [(f"p{i}", "paged") for i in range(4)]
    names: list[tuple[str, Phase]] = [*traditional, *paged, ("pagelab paged", "paged")]  # type: ignore[list-item]
    found = styles(names)
    assert found["pagelab paged"].color == "var(--paged-0)"
    assert found["pagelab paged"].dash == ()
    assert len({style.dash for style in found.values()}) == len(names)
    assert len({(style.shape, style.filled) for style in found.values()}) == len(names)
    assert len({style.color for style in found.values()}) == len(names)


def test_forty_methods_of_a_phase_differ_in_colour_or_dashes() -> None:
    found = styles((f"m{i}", "traditional") for i in range(40))
    assert len({(style.color, style.dash) for style in found.values()}) == 40


def luminance(color: str) -> float:
    def linear(part: int) -> float:
        value = part / 255
        return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4

    r, g, b = (linear(int(color[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_every_method_colour_stands_out_from_both_backgrounds() -> None:
    css = (files("pagelab.report") / "assets" / "page.css").read_text(encoding="utf-8")
    pairs = {
        name: (light, dark)
        for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    }
    used = {
        style.color[6:-1]
        for phase in ("paged", "traditional")
        for style in styles((f"m{i}", phase) for i in range(20)).values()
    }
    assert used <= set(pairs)
    for name in used:
        for color, background in zip(pairs[name], pairs["bg"], strict=True):
            high, low = sorted((luminance(color), luminance(background)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, name  # WCAG 1.4.11, graphics


# -- sweeps


def test_a_sweep_changes_one_setting_and_leaves_the_others_at_the_base(grid: Results) -> None:
    found = {sweep.setting.key: sweep for sweep in sweeps(grid, "chat")}
    assert list(found) == ["kv_memory_bytes", "block_size", "watermark"]
    assert found["kv_memory_bytes"].values == [32 * MIB, 64 * MIB, 128 * MIB]
    assert found["block_size"].values == [4, 16, 64]
    assert found["watermark"].values == [0.0, 0.01, 0.1]
    asked_for = grid["experiment"]
    for key, sweep in found.items():
        for line in sweep.lines:
            assert [value for value, _ in line.points] == sweep.values
            for value, row in line.points:
                expected: dict[str, Any] = {
                    "kv_memory_bytes": asked_for["kv_memory_bytes"],
                    "block_size": asked_for["block_size"],
                    "watermark": asked_for["watermark"],
                    "placement": asked_for["placement"],
                    "max_num_seqs": None,
                } | {key: value}
                assert row.method.settings == expected
                assert row.method.name == line.method.name
    [watermark_line] = found["watermark"].lines  # only what grows has a watermark
    assert watermark_line.method.name == "pagelab paged"


def test_one_value_makes_no_sweep() -> None:
    results = make_results()
    assert sweeps(results, "mixed") == []
    assert placements(results, "mixed") == []
    assert same_batch(results, "mixed") == []
    ids = Page(render_html(results)).ids
    assert "sweeps" not in ids
    assert "batch" not in ids


def test_placements_are_compared_for_contiguous_allocators_alone(grid: Results) -> None:
    table = placements(grid, "chat")
    assert [(row.method.allocator, row.method.settings["placement"]) for row in table] == [
        ("contiguous-max", "buddy"),
        ("contiguous-max", "first-fit"),
        ("contiguous-oracle", "buddy"),
        ("contiguous-oracle", "first-fit"),
    ]
    rounded = [row.share("rounding") > 0 for row in table]
    assert rounded == [False, False, True, False]  # 512 slots are a power of two of blocks


def test_the_same_batch_stands_beside_contiguous_max_of_the_same_budget(grid: Results) -> None:
    table = same_batch(grid, "chat")
    assert [(row.method.name, row.method.axis) for row in table] == [
        ("pagelab contiguous-max", "budget"),
        ("pagelab contiguous-oracle", "batch"),
        ("pagelab paged", "batch"),
    ]
    assert {row.peak_running for row in table} == {2}
    capped = copy.deepcopy(grid)
    for run in capped["runs"]:
        if run["allocator"] == "contiguous-oracle" and run["axis"] == "batch":
            run["allocator"] = "contiguous-max"
    first = same_batch(capped, "chat")[0].method
    assert (first.axis, first.allocator) == ("batch", "contiguous-max")


# -- the headline


def test_ours_is_pagelab_paged_even_where_another_paged_method_is_faster() -> None:
    results = make_all_methods_results()
    for summary in results["summary"]:
        if summary["label"] == "vllm":
            summary["output_tokens_per_s"] = {"median": 900.0, "min": 890.0, "max": 910.0}
    ours, rivals = sides(results, "chat")
    assert ours is not None
    assert rivals is not None
    assert ours.method.name == "pagelab paged"
    assert rivals[0].method.name == "pagelab contiguous-max"
    assert len(rivals) == 8
    sentence = headline(results)
    assert "and more than each of 4 others, only 0.15 times vllm" in sentence
    assert {name for name, _ in key_figures(results)[0].others} == {r.method.name for r in rivals}


def test_headline_falls_back_to_the_fastest_method_that_pages() -> None:
    results = make_all_methods_results()
    results["runs"] = [run for run in results["runs"] if run["label"] != "pagelab paged"]
    results["summary"] = [s for s in results["summary"] if s["label"] != "pagelab paged"]
    ours, _ = sides(results, "chat")
    assert ours is not None
    assert ours.method.name in ("hf-continuous-batching", "vllm")


# -- the page


def test_a_grid_has_its_sections_and_a_table_under_each_chart(page: Page) -> None:
    wanted = "asked methods pool map queue latency sweeps batch memory equality analysis words"
    assert [i for i in page.ids if i in wanted.split()] == wanted.split()
    links = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert {"sweeps", "batch"} <= links <= set(page.ids)
    regions = [value for _, name, value in page.attributes if name == "aria-label"]
    for label in ("KV budget on chat", "Block size on chat", "Watermark on chat"):
        assert label in regions
    assert "Placements on chat" in regions
    assert "The same batch on chat" in regions


def test_figures_of_sweeps_are_in_the_text(grid: Results, page: Page) -> None:
    for sweep in sweeps(grid, "chat"):
        for measure in sweep.setting.measures:
            for line in sweep.lines:
                cells = [measure.show(measure.of(row)["median"]) for _, row in line.points]
                assert f"{line.method.name} {' '.join(cells)}".replace(" ", "") in (
                    page.words.replace(" ", "")
                )
    assert "64 MiB (also 32 MiB, 128 MiB)" in page.words
    assert "Cells beside the base" in page.words
    assert "pagelab contiguous-oracle wrote" in page.words


def test_what_was_left_out_of_a_workload_is_said(page: Page) -> None:
    assert (
        "of 30 read: 1 bad and left out (the first: line 4: no number), 3 too long and dropped, "
        "2 too long and cut" in page.words
    )
    assert "24 asked for more tokens than they used" in page.words


def test_arrivals_rate_and_objectives_are_said() -> None:
    results = make_grid_results(Sweep(rate=4.0, requests=6, allocators=("paged",)))
    _, text, _ = workload_facts(results["experiment"]["workloads"][0])
    assert re.search(r"arriving over [\d.]+ m?s \(rate poisson:4\)", text)
    assert ("Objectives", "TTFT 2.00 s, TPOT 60.0 ms") in asked(results["experiment"])
    results["experiment"]["objectives"] = {"ttft_s": None, "tpot_s": None, "e2e_s": None}
    assert ("Objectives", "none") in asked(results["experiment"])


def test_objectives_are_marked_in_the_distributions_they_limit(page: Page) -> None:
    marked = {}
    for chart in json.loads(page.json)["charts"]:
        labels = json.dumps(chart["spec"])
        found = re.search(r'"label": "objective ([\d.]+ m?s)"', labels)
        title = re.search(r'"title": "(\w+), seconds', labels)
        if title:
            marked[title[1]] = found[1] if found else None
    assert marked == {"TTFT": "2.00 s", "TPOT": "60.0 ms", "ITL": None, "E2E": None}


def test_goodput_is_a_column_only_where_an_objective_is_stated(grid: Results, page: Page) -> None:
    assert "Goodput, req/s" in page.words
    without = copy.deepcopy(grid)
    for summary in without["summary"]:
        summary["goodput_per_s"] = None
    assert "Goodput, req/s" not in Page(render_html(without)).words


def test_simulated_rows_carry_the_word_and_the_cost_model_is_named(simulated: Results) -> None:
    page = Page(render_html(simulated))
    badges = [v for tag, name, v in page.attributes if (tag, name, v) == ("span", "class", "badge")]
    assert len(badges) > 2 * len(simulated["runs"])  # rows, strips, legends
    assert "All figures here are simulated, not measured" in page.words
    assert "(calibrated on this machine)" in page.words
    assert headline(simulated).startswith("Simulated: on the chat workload")
    assert "in a process of its own" not in page.words
    for run in simulated["runs"][1:]:
        run["simulated"] = False
    assert "Figures of 1 of the rows are simulated" in Page(render_html(simulated)).words
    simulated["runs"][0]["simulated"] = False
    assert "badge" not in [
        v for _, name, v in Page(render_html(simulated)).attributes if name == "class"
    ]


def test_what_the_placement_rounded_up_and_the_prefix_cache_are_said(page: Page) -> None:
    assert (
        "lost by rounding ranges up (buddy), not by holes: pagelab contiguous-oracle" in page.words
    )
    assert "under the contiguous allocators the prefix cache is off" in page.words
    assert (
        "contiguous"
        not in Page(render_html(make_grid_results(Sweep(allocators=("paged",), requests=4))))
        .words.split("The KV pool over time")[1]
        .split("Who holds which block")[0]
    )


@given(st.lists(st.floats(0.001, 1.0), min_size=6, max_size=6), st.floats(0.0, 1.0))
def test_segments_fill_the_bar_and_rounding_is_a_part_of_external(
    parts: list[float], rounded: float
) -> None:
    total = sum(parts)
    shares: dict[str, float] = {
        state.name: part / total for state, part in zip(STATES, parts, strict=True)
    }
    segments: list[Any] = share_segments("m", shares, rounded * shares["external"])
    assert segments[0]["start"] == 0
    assert segments[-1]["end"] == pytest.approx(1.0, abs=1e-4)
    assert all(a["end"] == pytest.approx(b["start"], abs=2e-5) for a, b in pairwise(segments))
    outside = sum(s["end"] - s["start"] for s in segments if s["state"] in ("external", ROUNDING))
    assert outside == pytest.approx(shares["external"], abs=1e-4)


def test_every_column_is_used_and_as_long_and_no_chart_depends_on_colour(page: Page) -> None:
    data = json.loads(page.json)
    assert {name for chart in data["charts"] for name in chart["uses"]} == set(data["data"])
    for columns in data["data"].values():
        assert len({len(column) for column in columns.values()}) == 1
    for chart in data["charts"]:
        layers = chart["spec"].get("layer", [])
        lines = [x["mark"] for x in layers if x["mark"]["type"] == "line"]
        looks = [tuple(mark.get("strokeDash", ())) for mark in lines]
        assert len(set(looks)) == len(looks), chart["id"]


# -- size


def test_requests_beyond_the_first_are_named_and_left_to_the_file() -> None:
    results = make_results()
    mixed = results["experiment"]["workloads"][1]
    mixed["requests"] = [
        {**mixed["requests"][0], "id": f"row-{i}."} for i in range(MOST_REQUESTS + 50)
    ]
    words = Page(render_html(results)).words
    assert f"row-{MOST_REQUESTS - 1}." in words
    assert f"row-{MOST_REQUESTS}." not in words
    assert f"The first {MOST_REQUESTS} of {MOST_REQUESTS + 50}; all are in results.json." in words


def test_findings_beyond_the_first_are_folded_away() -> None:
    results = make_results()
    finding = results["analysis"][0]
    results["analysis"] = [{**finding, "text": f"finding {i}"} for i in range(MOST_FINDINGS + 5)]
    words = Page(render_html(results)).words
    assert "5 more findings" in words
    assert f"finding {MOST_FINDINGS + 4}" in words
    assert "5 more findings are in the report" in printed(results, 80)


def test_maps_beyond_the_limit_leave_the_cells_beside_the_base_out(grid: Results) -> None:
    maps, left_out = block_maps(grid)
    assert len(maps) == MAX_MAPS
    assert left_out == len(grid["runs"]) - MAX_MAPS
    base = {run["label"] for run in grid["runs"] if is_base(run, grid["experiment"])}
    assert {m["label"] for m in maps[:3]} == base
    view = first_view(maps, methods(grid), "chat")
    assert maps[view["map"]]["label"] == "pagelab contiguous-max, 64 MiB, block 16, buddy"
    assert maps[view["beside"]]["label"] == "pagelab paged, 64 MiB, block 16, watermark 1 %"


def test_many_series_share_the_points_of_a_page() -> None:
    assert points_each(5) == 1_000
    assert points_each(60) * 60 <= ALL_POINTS
    assert points_each(10_000) == 150


def test_a_10000_step_run_of_five_allocators_stays_under_5_mb() -> None:
    results = make_long_grid_results()
    steps = [len(w["steps"]["t"]) for run in results["runs"] for w in run["workloads"]]
    assert max(steps) > 10_000
    assert len(results["runs"]) == 5
    assert len(render_html(results).encode()) < 5_000_000


# -- the terminal


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_a_grid_is_wider_than_the_terminal(grid: Results, width: int) -> None:
    for results in (grid, make_all_methods_results()):
        lines = printed(results, width).splitlines()
        assert max(cell_len(line) for line in lines) <= width
        assert "…" not in "".join(lines)  # nothing had to be cut


def test_the_terminal_has_sweeps_the_same_batch_and_every_cell(grid: Results) -> None:
    text = printed(grid, 80)
    for head in (
        "KV budget: output tokens a second 32 MiB 64 MiB 128 MiB",
        "Block size: internal, share of the pool",
        "Watermark: preemptions",
        "Placement",
        "The same batch for all",
        "Every cell",
    ):
        assert head in text
    every = text.split("Every cell")[1].splitlines()
    assert sum(line.startswith("pagelab ") for line in every) == 60
    assert "and 5 more in results.json" in every
    first = next(line for line in every if line.startswith("pagelab"))
    assert first.split()[:7] == ["pagelab", "contiguous-max", "64", "MiB", "16", "1", "%"]


def test_simulated_rows_are_marked_in_the_terminal() -> None:
    text = printed(make_grid_results(Sweep(simulated=True, requests=6)), 80)
    assert "Rows with ~ are simulated, not measured. Cost model: calibrated on this machine" in text
    assert "~ pagelab contiguous-max" in text
    assert "~" not in printed(make_results(), 80)


def test_a_comparison_of_one_cell_has_no_grid_in_the_terminal() -> None:
    text = printed(make_results(repeats=3), 120)
    assert "Every cell" not in text
    assert "Block size" not in text


def test_names_of_allocators_of_ones_own_cannot_become_markup() -> None:
    results = make_grid_results(
        Sweep(block_sizes=(16, 8), allocators=("paged", "contiguous-oracle"), requests=5, batch=2)
    )
    for run in results["runs"]:
        run["allocator"] = f"{run['allocator']}{EVIL}"
    page = Page(render_html(results))
    assert page.tags.count("script") == 4
    assert "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert f"pagelab paged{EVIL}" in page.words


def test_outputs_drawn_by_chance_are_said_not_to_be_compared() -> None:
    results = make_results()
    results["equality"] = []
    results["experiment"]["temperature"] = 0.7
    words = Page(render_html(results)).words
    assert "Outputs were not compared: at temperature 0.7 they are drawn by chance." in words
    assert "temperature 0.7" in dict(asked(results["experiment"]))["Sampling"]

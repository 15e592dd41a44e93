"""The summary in a terminal: its width, and that it reads without colour."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from pagelab.report.terminal import ledger_bar, print_summary
from pagelab.results import Results
from tests.support.synthetic_results import make_results


def printed(results: Results, width: int, **files: Path) -> str:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    print_summary(results, console, files)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = printed(make_results(repeats=3, failed=True, interrupted=True), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text  # not a terminal: no colour codes


def test_every_method_stands_in_one_line_with_its_figures() -> None:
    lines = printed(make_results(), 80).splitlines()
    assert any(line.split()[:4] == ["pagelab", "paged", "121", "7.39"] for line in lines)
    assert any(line.startswith("pagelab contiguous-max") and "61.2" in line for line in lines)
    assert not any("TTFT p95" in line for line in lines)
    assert any("TTFT p95" in line for line in printed(make_results(), 120).splitlines())


def test_repeats_are_shown_with_their_spread_where_there_is_room() -> None:
    assert "117–125" in printed(make_results(repeats=3), 120)
    assert "repeats" not in printed(make_results(), 120)


def test_failures_and_the_note_are_named() -> None:
    text = printed(make_results(failed=True, interrupted=True), 80)
    assert "Not complete. Interrupted by Ctrl-C" in text
    assert "hf-continuous-batching failed: worker ended: signal 9" in text
    assert "vllm unavailable: vllm is not installed" in text


def test_equality_names_the_first_difference() -> None:
    text = printed(make_results(), 80)
    assert "= pagelab paged: prompts 4 of 4, mixed 20 of 20" in text
    assert "≠ hf-static: prompts 4 of 4, mixed 19 of 20; first: mixed-20, output token 9" in text


def test_paths_stay_whole_however_long(tmp_path: Path) -> None:
    path = Path("/") / ("a-long-folder/" * 12) / "report.html"
    assert str(path) in printed(make_results(), 80, report=path)


def test_markup_in_labels_is_text() -> None:
    results = make_results()
    results["analysis"][0]["text"] = "[bold]not markup[/bold] [link=x]y[/link]"
    results["runs"][0]["status"], results["runs"][0]["reason"] = "failed", "[red]why[/red]"
    text = printed(results, 120)
    assert "[bold]not markup[/bold] [link=x]y[/link]" in text
    assert "[red]why[/red]" in text


def test_results_without_any_run_are_printed() -> None:
    results = make_results()
    results["runs"], results["summary"] = [], []
    results["equality"], results["analysis"] = [], []
    assert "nothing to compare" in printed(results, 80)


def test_a_bar_is_exactly_full_and_names_its_states() -> None:
    shares = {"live": 0.2, "reserved": 0.1, "internal": 0.4, "cached": 0, "free": 0.1}
    bar = ledger_bar(shares | {"external": 0.2}, 20).plain
    assert bar == "L███R▓I▒▒▒▒▒▒▒F·X░░░"
    assert len(ledger_bar({"live": 1 / 3, "free": 2 / 3}, 46).plain) == 46
    assert ledger_bar({}, 10).plain == ""


def test_colour_is_used_in_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    print_summary(make_results(), console)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[" in console.file.getvalue()

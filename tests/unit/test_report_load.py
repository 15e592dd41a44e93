"""The page of a load run: its figures are the record's, and it opens whatever a server did."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pagelab.bench.serve_figures import figures
from pagelab.bench.serve_load import Served
from pagelab.report.load import render_load_html
from pagelab.report.load_panels import errors, latency_panels, time_panels
from pagelab.report.page import Page
from pagelab.results import Objectives
from tests.support.browser import CHROMIUM, Browser

EVIL = "status 500: </script><script>alert(1)</script><b>&"


def served(i: int, tokens: int = 5) -> Served:
    due = 0.1 * i
    chunks = [due + 0.05 + 0.001 * i + 0.02 * k for k in range(tokens)]
    return Served(due, due, chunks, chunks[-1] + 0.001, 10, tokens)


def failed(due: float, error: str) -> Served:
    return Served(due, due, [], due + 0.2, error=error)


def make_record(requests: list[Served], **changes: Any) -> dict[str, Any]:
    objectives: Objectives = {"ttft_s": 0.0605, "tpot_s": None, "e2e_s": None}
    duration = max((one.end_s for one in requests), default=0.0)
    wrong = [one.error for one in requests if one.error is not None]
    record = {
        "schema": "pagelab.bench.serve",
        "version": 1,
        "created": "2026-11-27T08:00:00+00:00",
        "command": "pagelab bench serve --rate 10",
        "environment": {"cpu": {"name": "a CPU"}},
        "server": {"url": "http://127.0.0.1:8000", "model": "toy"},
        "settings": {
            "workload": "w", "title": "a workload", "rate": "10", "concurrency": None, "warmup": 2,
            "seed": 0, "chat": False, "send_ids": True, "ignore_eos": True, "temperature": 0.0,
            "objectives": objectives,
        },
        "duration_s": duration,
        "num_requests": len(requests),
        "num_failed": len(wrong),
        "errors": sorted(set(wrong)),
        "prompt_tokens": sum(one.prompt_tokens for one in requests),
        "output_tokens": sum(one.output_tokens for one in requests),
        "most_late_s": 0.001,
        "figures": figures(requests, duration, objectives),
        "requests": [dataclasses.asdict(one) for one in requests],
    } | changes  # fmt: skip
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


MIXED = [*(served(i) for i in range(20)), failed(0.35, "status 429: full"), failed(0.4, EVIL),
         failed(0.45, "status 429: full")]  # fmt: skip


def test_panels_have_the_figures_of_the_record() -> None:
    record = make_record(MIXED)
    panels = {panel["short"]: panel for panel in latency_panels(record, Page())}
    assert list(panels) == ["TTFT", "ITL", "TPOT", "E2E"]
    ttft = panels["TTFT"]
    assert ttft["count"] == "20"
    assert ttft["within"] == "55 %"  # 50 to 60 ms of 50 to 69 ms
    assert ttft["cells"][1]["text"] == "59.5 ms"
    low, high = (record["figures"]["ttft_p50_s"][end] * 1000 for end in ("low", "high"))
    assert ttft["cells"][1]["range"] == f"{low:.1f}–{high:.1f} ms"
    assert panels["ITL"]["count"] == "80"
    assert errors(record) == [("status 429: full", 2), (EVIL, 1)]


def test_charts_over_time_lose_no_request_and_no_token() -> None:
    page = Page()
    record = make_record(MIXED)
    at_once, tokens, first = (page.data[p["data"]] for p in time_panels(record, page))
    assert at_once["open"][-1] == at_once["waiting"][-1] == 0
    # at 0.46 the three that fail are open too
    place = max(i for i, t in enumerate(at_once["t"]) if t <= 0.46)
    due = [r for r in MIXED if r.due_s <= 0.46 < r.end_s]
    assert at_once["open"][place] == len(due) > 3
    width = tokens["t"][1]
    assert sum(tokens["rate"][:-1]) * width == pytest.approx(100, rel=1e-3)
    assert first["ttft"] == pytest.approx([0.05 + 0.001 * i for i in range(20)])


def test_the_page_escapes_what_a_server_said_and_fetches_nothing() -> None:
    page = render_load_html(make_record(MIXED))
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    without_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r'(src|href)="(?!#)', without_scripts)
    assert "3 of 23 requests failed" in page
    assert "pagelab bench serve --rate 10" in page
    assert "Against the offline engine" not in page


@pytest.mark.parametrize("requests", [[], [failed(0.0, "no")], [served(0)], [served(0, 1)]])
def test_runs_with_little_in_them_are_pages_too(requests: list[Served]) -> None:
    offline = {"output_tokens_per_s": 100.0, "ratio": 0.5}
    page = render_load_html(make_record(requests, offline=offline))
    assert "The server answered" in page
    assert "<b>50 %</b>" in page


def test_a_closed_loop_says_so() -> None:
    record = make_record([served(0)])
    record["settings"] |= {"concurrency": 4, "rate": None}
    assert "closed loop, 4 at a time" in render_load_html(record)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_chart_is_drawn_and_nothing_sticks_out(
    tmp_path: Path, width: int, dark: bool
) -> None:
    file = tmp_path / "load.html"
    offline = {"output_tokens_per_s": 100.0, "ratio": 0.5}
    file.write_text(render_load_html(make_record(MIXED, offline=offline)), encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    try:
        browser.show(width, 900, dark=dark)
        browser.open(f"file://{file}")
        browser.until("document.documentElement?.dataset.charts === '8/8'")
        assert browser.run("document.documentElement.dataset.errors") == "[]"
        assert browser.errors == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        charts = "[...document.querySelectorAll('.chart svg')]"
        widths = browser.run(f"{charts}.map((svg) => svg.getBoundingClientRect().width)")
        assert len(widths) == 8
        assert all(150 < one <= width for one in widths)
        background = browser.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 22, 26)" if dark else "rgb(252, 252, 251)")
    finally:
        browser.close()

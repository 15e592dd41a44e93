"""The HTML report in headless Chromium: charts drawn, no errors, a block map that can be moved."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pagelab.report.html import render_html
from pagelab.results import Results, WorkloadRun
from tests.support.synthetic_results import make_long_results, make_results
from tests.unit.test_report_html import PARTIAL, evil_results

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Runs after the charts are drawn; what it writes into data-out comes back to the test.
PROBE = """<script>PageLab.ready.then(() => {
  const out = {};
  BODY
  document.documentElement.dataset.out = JSON.stringify(out);
});</script></body>"""
Dump = Callable[..., str]


def with_probe(page: str, script: str) -> str:
    before, _, after = page.rpartition("</body>")  # the last one: scripts have it in strings
    return before + PROBE.replace("BODY", script) + after


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    """Open a page and return its DOM after its scripts have run."""

    def run(page: str, *, link: str = "", width: int = 1280, script: str = "") -> str:
        assert CHROMIUM is not None
        if script:
            page = with_probe(page, script)
        file = tmp_path / "report.html"
        file.write_text(page, encoding="utf-8")
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000",
            "--virtual-time-budget=20000", "--dump-dom", f"file://{file}{link}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def attribute(dom: str, name: str) -> str:
    match = re.search(rf'\s{name}="([^"]*)"', dom)
    assert match is not None, f"the page has no {name}"
    return html.unescape(match[1])


def assert_drawn(dom: str) -> None:
    assert json.loads(attribute(dom, "data-errors")) == []
    drawn, _, wanted = attribute(dom, "data-charts").partition("/")
    assert drawn == wanted


def state(dom: str, pane: str) -> dict[str, int]:
    """What a pane of the block map shows."""
    match = re.search(rf'<div class="pane" data-pane="{pane}"([^>]*)>', dom)
    assert match is not None
    return {name: int(value) for name, value in re.findall(r'data-(\w+)="(\d+)"', match[1])}


def workload(results: Results, label: str, name: str) -> WorkloadRun:
    [run] = [r for r in results["runs"] if r["label"] == label]
    [found] = [w for w in run["workloads"] if w["name"] == name]
    return found


def test_all_charts_are_drawn_without_errors_or_fetches(dump: Dump) -> None:
    script = """
      out.fetched = performance.getEntriesByType("resource").length;
      out.empty = [...document.querySelectorAll(".chart")]
        .filter((e) => !["area", "rect", "line"].some((m) => e.querySelector(`.mark-${m} path`)))
        .map((e) => e.id);
      out.background = getComputedStyle(document.body).backgroundColor;
      document.querySelector("details.data").parentElement.open = true;
      document.querySelector("details.data").open = true;
    """
    dom = dump(render_html(make_results(repeats=2, failed=True)), link="#theme=dark", script=script)
    assert_drawn(dom)
    out = json.loads(attribute(dom, "data-out"))
    assert out["fetched"] == 0
    assert out["empty"] == []
    assert attribute(dom, "data-theme") == "dark"
    assert out["background"] == "rgb(20, 22, 26)"


def test_a_link_to_a_step_shows_the_ledger_of_that_step(dump: Dump) -> None:
    results = make_results()
    page = render_html(results)
    contiguous = workload(results, "pagelab contiguous-max", "mixed")["steps"]
    paged = workload(results, "pagelab paged", "mixed")["steps"]
    script = """
      const slider = document.getElementById("step");
      const panes = () => [...document.querySelectorAll(".pane")].map((e) => ({ ...e.dataset }));
      out[slider.value] = panes();
      for (const step of [300, 0, 60, 109, 458]) {
        slider.value = step;
        slider.dispatchEvent(new Event("input"));
        out[step] = panes();
      }
    """
    dom = dump(page, link="#step=120", script=script)
    assert_drawn(dom)
    shown = json.loads(attribute(dom, "data-out"))
    assert set(shown) == {"120", "300", "0", "60", "109", "458"}
    for step in map(int, shown):
        now = contiguous["t"][step]
        other = max((i for i, t in enumerate(paged["t"]) if t <= now), default=0)
        for pane, steps, at in zip(
            shown[str(step)], (contiguous, paged), (step, other), strict=True
        ):
            held = steps["live"][at] + steps["reserved"][at] + steps["internal"][at]
            assert int(pane["step"]) == at
            assert int(pane["running"]) == steps["running"][at]
            assert int(pane["held"]) == held
            assert int(pane["written"]) == steps["live"][at]


def test_slider_keys_and_play_change_the_map(dump: Dump) -> None:
    script = """
      const slider = document.getElementById("step");
      const pane = document.querySelector('[data-pane="main"]');
      const canvas = pane.querySelector("canvas");
      const pixels = () => canvas.toDataURL();
      out.before = { ...pane.dataset };
      const first = pixels();
      slider.value = 0;
      slider.dispatchEvent(new Event("input"));
      slider.dispatchEvent(new Event("change"));
      out.after = { ...pane.dataset };
      out.repainted = pixels() !== first;
      out.hash = location.hash;
      const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
      press("ArrowRight");
      press("ArrowRight");
      out.info = pane.querySelector(".info").textContent;
      const box = canvas.getBoundingClientRect();
      const at = { clientX: box.left + 2, clientY: box.bottom - 3, pointerType: "mouse" };
      canvas.dispatchEvent(new PointerEvent("pointermove", at));
      out.far = pane.querySelector(".info").textContent;
      const chart = document.querySelector(".strip .chart").getBoundingClientRect();
      document.querySelector(".strip .chart").dispatchEvent(new PointerEvent("pointermove",
        { clientX: chart.left + 200, clientY: chart.top + 20 }));
      out.tip = document.getElementById("tip").textContent;
      document.getElementById("scale").click();
      out.scaled = location.hash;
      document.getElementById("theme").click();
      out.theme = document.documentElement.dataset.theme;
      document.getElementById("play").click();
      out.playing = document.getElementById("play").textContent;
    """
    dom = dump(render_html(make_results()), script=script)
    assert_drawn(dom)
    out = json.loads(attribute(dom, "data-out"))
    assert out["before"]["step"] != "0"
    assert out["after"]["step"] == "0"
    assert out["after"]["written"] != out["before"]["written"]
    assert out["repainted"]
    assert out["hash"] == "#step=0"
    assert out["info"].startswith(
        "Block 1 (slots 16 to 31); number 2 of the 64 blocks of request 1"
    )
    assert "in no allocation" in out["far"]
    assert "live" in out["tip"]
    assert "time=own" in out["scaled"]
    assert out["theme"] == "dark"
    assert out["playing"] == "Pause"


@pytest.mark.parametrize("width", [390, 1600])
def test_the_page_never_scrolls_sideways(dump: Dump, width: int) -> None:
    # Headless Chromium has a least window width of its own, so a frame sets the width.
    script = """
      const root = document.documentElement;
      parent.document.body.dataset.width = root.clientWidth;
      parent.document.body.dataset.overflow = root.scrollWidth - root.clientWidth;
    """
    page = render_html(make_results(repeats=3, failed=True, interrupted=True))
    page = with_probe(page, script)
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}">'
    dom = dump(f"<!doctype html><body>{frame}</iframe></body>", width=1700)
    assert attribute(dom, "data-overflow") == "0"
    assert int(attribute(dom, "data-width")) >= width - 20


def test_text_of_a_run_cannot_run_as_a_script(dump: Dump) -> None:
    dom = dump(render_html(evil_results()), script="out.hacked = String(window.hacked);")
    assert_drawn(dom)
    assert json.loads(attribute(dom, "data-out"))["hacked"] == "undefined"


def test_a_10000_step_run_is_drawn(dump: Dump) -> None:
    dom = dump(render_html(make_long_results()), link="#step=9000")
    assert_drawn(dom)
    assert state(dom, "main")["step"] == 9000


@pytest.mark.parametrize("take_away", PARTIAL, ids=lambda f: f.__name__)
def test_partial_results_are_shown_without_errors(
    dump: Dump, take_away: Callable[[Results], None]
) -> None:
    results = make_results()
    take_away(results)
    assert_drawn(dump(render_html(results)))

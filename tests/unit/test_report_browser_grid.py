"""The report of a grid in headless Chromium: drawn wide and narrow, light and dark, with keys."""

from __future__ import annotations

import html
import json
from collections.abc import Callable

import pytest

from pagelab.report.html import render_html
from pagelab.results import Results
from tests.support.synthetic_sweeps import (
    Sweep,
    make_all_methods_results,
    make_grid_results,
    make_long_grid_results,
)
from tests.unit.test_report_browser import (  # noqa: F401 (dump is a fixture)
    CHROMIUM,
    Dump,
    assert_drawn,
    attribute,
    dump,
    with_probe,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Charts that drew nothing, and text of charts that reaches beyond its chart by more than a bit.
CHECK = """
  const marks = ["area", "rect", "line", "symbol"].map((mark) => `.mark-${mark} path`).join();
  out.empty = [...document.querySelectorAll(".chart")]
    .filter((chart) => !chart.querySelector(marks)).map((chart) => chart.id);
  out.background = getComputedStyle(document.body).backgroundColor;
  out.width = document.documentElement.clientWidth;
  out.overflow = document.documentElement.scrollWidth - out.width;
  out.outside = [...document.querySelectorAll(".chart")].flatMap((chart) => {
    const right = chart.getBoundingClientRect().right + 8;
    return [...chart.querySelectorAll("text")]
      .filter((text) => text.textContent && text.getBoundingClientRect().right > right)
      .map((text) => `${chart.id}: ${text.textContent}`);
  });
"""


@pytest.mark.parametrize(
    ("results", "width", "theme"),
    [
        (make_grid_results, 1280, "light"),
        (make_grid_results, 390, "dark"),
        (make_all_methods_results, 1280, "dark"),
        (make_all_methods_results, 390, "light"),
    ],
)
def test_grids_and_nine_methods_are_drawn_and_never_scroll_sideways(
    dump: Dump,  # noqa: F811
    results: Callable[[], Results],
    width: int,
    theme: str,
) -> None:
    # Headless Chromium has a least window width of its own, so a frame sets the width.
    toggle = 'document.getElementById("theme").click();' if theme == "dark" else ""
    tell = "".join(
        f"parent.document.body.dataset.{name} = {value};"
        for name, value in {
            "out": "JSON.stringify(out)",
            "charts": "document.documentElement.dataset.charts",
            "errors": "document.documentElement.dataset.errors",
        }.items()
    )
    page = html.escape(with_probe(render_html(results()), toggle + CHECK + tell))
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}">'
    dom = dump(f"<!doctype html><body>{frame}</iframe></body>", width=1500)
    assert_drawn(dom)
    out = json.loads(attribute(dom, "data-out"))
    assert out["width"] >= width - 20
    assert out["overflow"] == 0
    assert out["empty"] == []
    assert out["outside"] == []
    assert out["background"] == {"light": "rgb(252, 252, 251)", "dark": "rgb(20, 22, 26)"}[theme]


def test_a_sweep_gives_its_figures_to_pointer_and_keys(dump: Dump) -> None:  # noqa: F811
    script = """
      const tip = document.getElementById("tip");
      const chart = document.querySelector("#sweeps .chart");
      const box = chart.getBoundingClientRect();
      const move = (x) => {
        const at = { clientX: box.left + x, clientY: box.top + 40 };
        chart.dispatchEvent(new PointerEvent("pointermove", at));
        return tip.hidden ? "" : tip.innerText.replaceAll("\\n", " ");
      };
      const press = (key, on = chart) => {
        on.dispatchEvent(new KeyboardEvent("keydown", { key }));
        return tip.hidden ? "" : tip.textContent;
      };
      out.left = move(60);
      out.right = move(box.width - 12);
      chart.dispatchEvent(new PointerEvent("pointerleave"));
      out.gone = tip.hidden;
      out.keys = ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Escape"]
        .map((key) => press(key));
      const strip = document.querySelector(".strip .chart");
      out.strip = press("ArrowRight", strip);
      out.tabbable = [...document.querySelectorAll(".chart[tabindex='0']")].length;
      const data = document.querySelector("#latency details");
      data.open = true;
      const lazy = data.querySelector("details.data");
      lazy.open = true;
      lazy.dispatchEvent(new Event("toggle"));
      out.rows = lazy.querySelectorAll("tbody tr").length;
    """
    results = make_grid_results(
        Sweep(kv_memories=(64 << 20, 32 << 20, 128 << 20), allocators=("contiguous-max", "paged"))
    )
    dom = dump(render_html(results), script=script)
    assert_drawn(dom)
    out = json.loads(attribute(dom, "data-out"))
    assert out["left"].startswith("KV budget 32 MiB")
    assert out["right"].startswith("KV budget 128 MiB")
    speed = {s["label"]: s["output_tokens_per_s"]["median"] for s in results["summary"]}
    for label, text in (("64 MiB", out["keys"][1]), ("128 MiB", out["keys"][2])):
        assert text.startswith(f"KV budget {label}")
        assert f"pagelab paged{speed[f'pagelab paged, {label}']:.6g}" in text
    assert out["gone"]
    assert out["keys"][3] == out["keys"][2]  # the last one stays
    assert out["keys"][4] == out["keys"][1]
    assert out["keys"][5] == ""
    assert "live" in out["strip"]
    assert out["tabbable"] > 5
    assert out["rows"] > 5


def test_the_map_of_a_grid_opens_with_the_base_cell_and_its_slider_works(
    dump: Dump,  # noqa: F811
) -> None:
    script = """
      const pane = document.querySelector('[data-pane="main"]');
      const slider = document.getElementById("step");
      const chosen = (name) => document.querySelector(`[data-pane="${name}"] select`)
        .selectedOptions[0].textContent;
      out.main = chosen("main");
      out.beside = chosen("beside");
      out.before = pane.dataset.step;
      slider.value = 3;
      slider.dispatchEvent(new Event("input"));
      out.after = pane.dataset.step;
    """
    dom = dump(render_html(make_grid_results()), script=script)
    assert_drawn(dom)
    out = json.loads(attribute(dom, "data-out"))
    assert out["main"] == "pagelab contiguous-max, 64 MiB, block 16, buddy on chat"
    assert out["beside"] == "pagelab paged, 64 MiB, block 16, watermark 1 % on chat"
    assert (out["before"] != "3", out["after"]) == (True, "3")


def test_a_long_run_of_five_allocators_is_drawn_soon(dump: Dump) -> None:  # noqa: F811
    script = "out.ms = performance.now();"  # virtual time: what the page waits for, not the machine
    dom = dump(render_html(make_long_grid_results()), link="#step=9000", script=script)
    assert_drawn(dom)
    assert json.loads(attribute(dom, "data-out"))["ms"] < 5_000

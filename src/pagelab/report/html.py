"""The report as one self-contained HTML file: no network, opens from a disk.

The page's Content-Security-Policy forbids every request, so that is not only a promise. Text from
a run (prompts, labels, reasons) is untrusted: jinja2 escapes it, and JSON is embedded so that no
`</script>` can occur in it.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pagelab.report import panels
from pagelab.report.asked import asked, flatten, workload_facts
from pagelab.report.blockmap import block_maps, first_view
from pagelab.report.charts import CONFIG
from pagelab.report.figures import capacity, cell, seconds
from pagelab.report.headline import headline, headline_workload, key_figures
from pagelab.report.latency_panels import latency_panels
from pagelab.report.page import Page
from pagelab.report.pool_panels import pool_panels
from pagelab.report.rows import methods, not_ok, shown
from pagelab.report.sweep_panels import batch_panels, placement_panels, sweep_panels
from pagelab.report.words import GLOSSARY, STATES
from pagelab.results import Results, write_text_safely

MOST_REQUESTS = 200  # of a workload in its table
MOST_FINDINGS = 40  # before the rest is folded away


def write_html(results: Results, path: Path) -> None:
    """Render a report into a file.

    Raises:
        ReportError: it cannot be written.
    """
    write_text_safely(path, render_html(results))


def render_html(results: Results) -> str:
    """The report of an experiment as one HTML page."""
    page = Page()
    found = methods(results)
    drawn = shown(results)
    maps, left_out = block_maps(results)
    pools = pool_panels(results, page)
    simulated = [method for method in found if method.simulated]
    context: dict[str, Any] = {
        "title": _title(results),
        "results": results,
        "created": date(results["created"]),
        "headline": headline(results),
        "headline_workload": headline_workload(results),
        "keys": key_figures(results),
        "not_ok": not_ok(results),
        "simulated": simulated,
        "all_simulated": len(simulated) == len(found),
        "asked": asked(results["experiment"], _devices(results)),
        "workloads": [workload_facts(w) for w in results["experiment"]["workloads"]],
        "most_requests": MOST_REQUESTS,
        "most_findings": MOST_FINDINGS,
        "environment": flatten(results["environment"]),
        "methods": drawn,
        "grid": len(found) > len(drawn),
        "base": cell(drawn[0].settings) if drawn else "",
        "startups": [(m, *startup_cells(m.startup)) for m in found if m.startup],
        "states": STATES,
        "method_panels": panels.method_panels(results, page),
        "pool_panels": pools,
        "queue_panels": panels.queue_panels(results, page, pools),
        "latency_panels": latency_panels(results, page),
        "sweep_panels": sweep_panels(results, page),
        "placement_panels": placement_panels(results, page),
        "batch_panels": batch_panels(results, page),
        "memory_panels": panels.memory_panels(results, page),
        "preemptions": panels.preemption_rows(results),
        "maps": maps,
        "maps_left_out": left_out,
        "without_blocks": [m for m in drawn if m.kv and m.kv["num_blocks"] is None],
        "glossary": GLOSSARY,
        "capacity": capacity,
        "css": asset("page.css"),
        "scripts": [vega_bundle(), asset("page.js"), asset("blockmap.js")],
    }
    context["data"] = embed_json(
        {
            "config": CONFIG,
            "charts": page.charts,
            "data": page.data,
            "maps": maps,
            "view": first_view(maps, found, context["headline_workload"]),
        }
    )
    return str(template("page.html.j2").render(context))


def embed_json(value: Any) -> Markup:
    """JSON that is safe inside a `<script type="application/json">`, whatever text is in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028 either
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def vega_bundle() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script (about 0.9 MB; takes a second to make)."""
    import vl_convert

    return _script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def startup_cells(startup: Any) -> list[str]:
    """Import, load, warm-up and their sum."""
    parts = [startup["import_s"], startup["load_s"], startup["warmup_s"]]
    return [seconds(part) for part in (*parts, sum(parts))]


def template(name: str) -> Any:
    """One of the pages in `assets`."""
    environment = Environment(
        loader=PackageLoader("pagelab.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def asset(name: str) -> Markup:
    """One of our own scripts or style sheets."""
    text = (files("pagelab.report") / "assets" / name).read_text(encoding="utf-8")
    return _script(text) if name.endswith(".js") else Markup(text)  # our own files


def _script(text: str) -> Markup:
    # Inside strings and regular expressions, where alone these can occur, a backslash changes
    # nothing; it keeps the HTML parser from seeing an end or a comment.
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _devices(results: Results) -> list[str]:
    """Where the methods ran; a method that does not say counts as on the CPU."""
    found = (run["kv"] for run in results["runs"])
    return sorted({kv.get("device", "cpu") for kv in found if kv is not None})


def _title(results: Results) -> str:
    """What ran, in a few words."""
    found = [method for method in methods(results) if method.first["workloads"]]
    kinds = len({method.name for method in found})
    experiment = results["experiment"]
    budgets = len(experiment["kv_memories"])
    memory = "one KV budget" if budgets < 2 else f"{budgets} KV budgets"
    plural = "s" if kinds != 1 else ""
    title = f"{experiment['model']['name']}, {memory}, {kinds} method{plural}"
    return title if len(found) == kinds else f"{title} in {len(found)} cells"


def date(created: str) -> str:
    """When it ran, for people."""
    try:
        return f"{datetime.fromisoformat(created):%-d %B %Y, %H:%M}"
    except ValueError:
        return created

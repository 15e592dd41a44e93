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

from pagelab.config import format_bytes
from pagelab.report import panels
from pagelab.report.blockmap import block_maps, first_view
from pagelab.report.charts import CONFIG
from pagelab.report.figures import capacity, methods, not_ok, seconds
from pagelab.report.headline import headline, headline_workload, key_figures
from pagelab.report.words import GLOSSARY, STATES
from pagelab.results import ExperimentInfo, Results, write_text_safely


def write_html(results: Results, path: Path) -> None:
    """Render a report into a file.

    Raises:
        ReportError: it cannot be written.
    """
    write_text_safely(path, render_html(results))


def render_html(results: Results) -> str:
    """The report of an experiment as one HTML page."""
    page = panels.Page()
    found = methods(results)
    maps, left_out = block_maps(results)
    pools = panels.pool_panels(results, page)
    ran = sum(bool(m.first["workloads"]) for m in found)
    context: dict[str, Any] = {
        "title": f"{results['experiment']['model']['name']}, one KV budget, "
        f"{ran} method{'s' if ran != 1 else ''}",
        "results": results,
        "created": _date(results["created"]),
        "headline": headline(results),
        "headline_workload": headline_workload(results),
        "keys": key_figures(results),
        "not_ok": not_ok(results),
        "asked": asked(results["experiment"]),
        "environment": flatten(results["environment"]),
        "methods": found,
        "startups": [(m, *startup_cells(m.startup)) for m in found if m.startup],
        "states": STATES,
        "method_panels": panels.method_panels(results, page),
        "pool_panels": pools,
        "queue_panels": panels.queue_panels(results, page, pools),
        "latency_panels": panels.latency_panels(results, page),
        "memory_panels": panels.memory_panels(results, page),
        "preemptions": panels.preemption_rows(results),
        "maps": maps,
        "maps_left_out": left_out,
        "without_blocks": [m for m in found if m.kv and m.kv["num_blocks"] is None],
        "glossary": GLOSSARY,
        "capacity": capacity,
        "css": _asset("page.css"),
        "scripts": [vega_bundle(), _asset("page.js"), _asset("blockmap.js")],
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
    return str(_template().render(context))


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


def asked(experiment: ExperimentInfo) -> list[tuple[str, str]]:
    """What was asked, as names and values."""
    model = experiment["model"]
    kv, per_token = experiment["kv_memory_bytes"], model["kv_bytes_per_token"]
    slots = kv // per_token if per_token else 0
    repeats = experiment["repeats"]
    return [
        ("Model", f"{model['name']} ({model['num_parameters'] / 1e6:,.0f} M parameters)"),
        ("Type", f"{experiment['dtype']}, on {experiment['threads']} threads"),
        ("KV budget", f"{format_bytes(kv)}: {slots:,} slots of {format_bytes(per_token)}"),
        ("Block size", f"{experiment['block_size']} slots"),
        ("Maximum length", f"{experiment['max_model_len']:,} tokens a request"),
        ("Token budget", f"{experiment['max_num_batched_tokens']:,} tokens a step"),
        ("Watermark", f"{experiment['watermark']:.0%} of the blocks kept free at admission"),
        ("Sampling", experiment["sampling"]),
        ("Repeats", f"{repeats}, seed {experiment['seed']}"),
    ]


def startup_cells(startup: Any) -> list[str]:
    """Import, load, warm-up and their sum."""
    parts = [startup["import_s"], startup["load_s"], startup["warmup_s"]]
    return [seconds(part) for part in (*parts, sum(parts))]


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat += flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                flat += flatten({str(i): item}, f"{name}.")
        elif isinstance(value, list):
            flat.append((name, ", ".join(map(str, value)) or "none"))
        elif name.endswith("bytes") and isinstance(value, int):
            flat.append((name.removesuffix("_bytes"), format_bytes(value)))
        else:
            flat.append((name, "–" if value is None else str(value)))
    return flat


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("pagelab.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _asset(name: str) -> Markup:
    text = (files("pagelab.report") / "assets" / name).read_text(encoding="utf-8")
    return _script(text) if name.endswith(".js") else Markup(text)  # our own files


def _script(text: str) -> Markup:
    # Inside strings and regular expressions, where alone these can occur, a backslash changes
    # nothing; it keeps the HTML parser from seeing an end or a comment.
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _date(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%-d %B %Y, %H:%M}"
    except ValueError:
        return created

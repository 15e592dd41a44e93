"""A load run of `pagelab bench serve` as one self-contained HTML file, as `html` does a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagelab import __version__
from pagelab.report.asked import flatten
from pagelab.report.charts import CONFIG
from pagelab.report.figures import percent, rate, seconds
from pagelab.report.html import asset, date, embed_json, template, vega_bundle
from pagelab.report.load_panels import (
    Record,
    completed,
    errors,
    figure,
    latency_panels,
    offline_panel,
    time_panels,
)
from pagelab.report.page import Page
from pagelab.report.words import GLOSSARY
from pagelab.results import write_text_safely

_WORDS = ("output tokens a second", "TTFT", "ITL", "TPOT", "E2E", "objective", "goodput")
_LOCAL_WORDS = (
    ("open loop", "Requests are sent when they are due, whatever has become of those before."),
    ("closed loop", "So many requests at a time: the next begins when one ends."),
    (
        "95 % interval",
        "The middle 95 % of the figure over resamples of the requests. It says how much the figure "
        "hangs on these requests, not what the machine did otherwise that day.",
    ),
    ("p50, p90, p95, p99", "That share of the values is at or below this one."),
)


def write_load_html(record: Record, path: Path) -> None:
    """Render a load run into a file.

    Raises:
        ReportError: it cannot be written.
    """
    write_text_safely(path, render_load_html(record))


def render_load_html(record: Record) -> str:
    """The page of a record of `pagelab bench serve`."""
    page = Page()
    failed = errors(record)
    context: dict[str, Any] = {
        "title": f"{record['server']['model']} under load",
        "record": record,
        "created": date(record["created"]),
        "version": __version__,
        "headline": _headline(record),
        "keys": _keys(record) if completed(record) else [],
        "errors": failed,
        "num_failed": record["num_failed"],
        "asked": _asked(record),
        "environment": flatten(record["environment"]),
        "latencies": latency_panels(record, page),
        "times": time_panels(record, page),
        "offline": offline_panel(record, page),
        "glossary": [*(pair for pair in GLOSSARY if pair[0] in _WORDS), *_LOCAL_WORDS],
        "css": asset("page.css"),
        "scripts": [vega_bundle(), asset("page.js")],
    }
    context["data"] = embed_json({"config": CONFIG, "charts": page.charts, "data": page.data})
    return str(template("load.html.j2").render(context))


def _headline(record: Record) -> str:
    done, asked = len(completed(record)), record["num_requests"]
    answered = f"all {asked:,}" if done == asked else f"{done:,} of {asked:,}"
    text = f"The server answered {answered} requests in {seconds(record['duration_s'])}"
    if not done:
        return f"{text}."
    found = record["figures"]
    text += (
        f": {rate(found['output_tokens_per_s']['value'])} output tokens a second. Half of the "
        f"first tokens came within {seconds(found['ttft_p50_s']['value'])}, 95\u00a0% within "
        f"{seconds(found['ttft_p95_s']['value'])}."
    )
    return text


def _keys(record: Record) -> list[dict[str, Any]]:
    """What stands large at the top."""

    def key(label: str, name: str, words: Callable[[float], str], *others: tuple[str, str]) -> Any:
        found = figure(record, name, words)
        rows = [("95 % interval", found["range"])] if found["range"] else []
        return {"value": found["text"], "name": label, "others": [*rows, *others]}

    def of(name: str, words: Callable[[float], str]) -> str:
        found = figure(record, name, words)
        return f"{found['text']} ({found['range']})" if found["range"] else found["text"]

    keys = [
        key(
            "output tokens a second",
            "output_tokens_per_s",
            rate,
            ("with prompts", of("total_tokens_per_s", rate)),
            ("requests a second", of("requests_per_s", rate)),
        ),
        key("TTFT, p50", "ttft_p50_s", seconds, ("p95", of("ttft_p95_s", seconds)),
            ("p99", of("ttft_p99_s", seconds))),
        key("ITL, p50", "itl_p50_s", seconds, ("p95", of("itl_p95_s", seconds)),
            ("p99", of("itl_p99_s", seconds))),
    ]  # fmt: skip
    if "goodput_per_s" in record["figures"]:
        good = record["figures"]["goodput_per_s"]["value"] * record["duration_s"]
        share = percent(round(good) / max(1, record["num_requests"]))
        keys.append(
            key("goodput, requests a second", "goodput_per_s", rate,
                ("of all requests", share), ("objectives", _objectives(record)))
        )  # fmt: skip
    return keys


def _objectives(record: Record) -> str:
    limits = record["settings"]["objectives"].items()
    found = [f"{k.removesuffix('_s').upper()} {seconds(v)}" for k, v in limits if v is not None]
    return ", ".join(found) or "none"


def _asked(record: Record) -> list[tuple[str, str]]:
    """What was sent, and how."""
    asked, server = record["settings"], record["server"]
    if asked["concurrency"] is not None:
        arrivals = f"closed loop, {asked['concurrency']} at a time"
    else:
        arrivals = f"open loop, {asked['rate'] or 'at the times of the workload'}"
    if asked["chat"]:
        sent = "chats, as texts"
    else:
        sent = "completions, as token ids" if asked["send_ids"] else "completions, as texts"
    lengths = "every token asked for (ignore_eos)" if asked["ignore_eos"] else "up to the model"
    facts = [
        ("Server", server["url"]),
        ("Model", server["model"]),
        ("Workload", asked["title"]),
        ("Arrivals", arrivals),
        ("Requests", f"{record['num_requests']:,}, after {asked['warmup']} to warm up"),
        ("Tokens in", f"{record['prompt_tokens']:,}"),
        ("Tokens out", f"{record['output_tokens']:,}"),
        ("Sent as", sent),
        ("Lengths", lengths),
        ("Temperature", f"{asked['temperature']:g}"),
        ("Seed", str(asked["seed"])),
        ("Objectives", _objectives(record)),
    ]
    if asked["concurrency"] is None:
        facts.append(("Sent late", f"by {seconds(record['most_late_s'])} at most"))
    return facts

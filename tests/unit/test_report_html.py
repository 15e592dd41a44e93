"""The HTML report as text: well-formed, self-contained, safe with any text, bounded in size."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pagelab.errors import ReportError
from pagelab.report.asked import flatten
from pagelab.report.html import embed_json, render_html, write_html
from pagelab.results import Results
from tests.support.synthetic_results import make_long_results, make_results

VOID = {"meta", "input", "br", "hr", "img", "link", "source"}
FETCHING = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "ping"}
EVIL = """</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2">'&{{7*7}}"""


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.json = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.json = self.json or data  # the first script holds the data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        """The page's text, with white space folded."""
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(make_results(repeats=2, failed=True)))


def test_tags_are_balanced_and_ids_unique(page: Page) -> None:
    assert page.tags.count("script") == 4
    assert len(set(page.ids)) == len(page.ids)


def test_sections_come_in_the_order_of_the_design(page: Page) -> None:
    wanted = "asked methods pool map queue latency memory equality preemptions analysis words"
    assert [i for i in page.ids if i in wanted.split()] == wanted.split()


def test_nothing_points_outside_the_file(page: Page) -> None:
    targets = [(tag, value) for tag, name, value in page.attributes if name in FETCHING]
    assert targets
    assert all(value.startswith("#") for _, value in targets)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    html = render_html(make_results())
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "@import" not in styles
    assert "url(" not in styles
    [policy] = [v for t, n, v in page.attributes if t == "meta" and n == "content" and "src" in v]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_links_inside_the_page_have_targets(page: Page) -> None:
    links = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links <= set(page.ids)


def test_every_chart_has_a_place_and_every_column_is_used_and_as_long(page: Page) -> None:
    data = json.loads(page.json)
    assert {chart["id"] for chart in data["charts"]} <= set(page.ids)
    used = {name for chart in data["charts"] for name in chart["uses"]}
    assert used == set(data["data"])
    for columns in data["data"].values():
        [length] = {len(column) for column in columns.values()}
        assert 0 < length <= 1_001
    tables = {value for _, name, value in page.attributes if name == "data-table"}
    assert tables <= set(data["data"])


def test_figures_failures_and_findings_are_in_the_text(page: Page) -> None:
    for piece in (
        "pagelab paged wrote",
        "worker ended: signal 9",
        "vllm is not installed",
        "≠ 19 of 20",
        "mixed-20 at output token 9 (288 → 253)",
        "▲ paging better",
        "hf-static has no blocks (2 rows of 1024 slots)",
        "Figures are medians of 2 repeats",
    ):
        assert piece in page.words


def test_an_incomplete_experiment_says_so() -> None:
    words = Page(render_html(make_results(interrupted=True))).words
    assert "Not complete. Interrupted by Ctrl-C during pagelab paged on mixed." in words
    assert "so paging cannot be compared" not in words  # it can, on the other workload
    assert "On the prompts workload" in words


def evil_results() -> Results:
    results = make_results(failed=True, interrupted=True)
    experiment = results["experiment"]
    experiment["command"] = experiment["model"]["name"] = results["note"] = EVIL
    results["created"] = results["environment"][EVIL] = EVIL
    names = {w["name"]: f"{w['name']} {EVIL}" for w in experiment["workloads"]}
    for workload in experiment["workloads"]:
        workload["name"], workload["title"] = names[workload["name"]], EVIL
        for request in workload["requests"]:
            request["prompt"] = EVIL
            request["id"] += EVIL
    for run in results["runs"]:
        run["label"] += EVIL
        run["reason"] = EVIL
        for snapshot in run["snapshots"]:
            snapshot["label"] = EVIL
        for done in run["workloads"]:
            done["name"] = names[done["name"]]
            for result in done["requests"]:
                result["id"] += EVIL
            for preemption in done["preemptions"]:
                preemption["request"] = EVIL
    for summary in results["summary"]:
        summary["label"] += EVIL
        summary["workload"] = names[summary["workload"]]
    for finding in results["analysis"]:
        finding["text"], finding["figures"] = EVIL, {EVIL: 1.0}
    for entry in results["equality"]:
        entry["reference"] = entry["label"] = entry["workload"] = EVIL
    return results


def test_text_of_a_run_cannot_become_markup() -> None:
    page = Page(render_html(evil_results()))
    assert page.tags.count("script") == 4
    assert "img" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert EVIL in page.words
    assert EVIL in json.loads(page.json)["maps"][0]["requests"][0]["id"]


def test_embedded_json_has_no_markup_and_reads_back() -> None:
    value = {"<!--": ["</script>", "&amp;", "\u2028", "]]>"]}
    text = str(embed_json(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_a_10000_step_run_stays_under_5_mb() -> None:
    assert len(render_html(make_long_results()).encode()) < 5_000_000


def test_many_repeats_stay_under_5_mb() -> None:
    assert len(render_html(make_results(repeats=20)).encode()) < 5_000_000


def without_runs(results: Results) -> None:
    results["runs"], results["summary"] = [], []
    results["equality"], results["analysis"] = [], []
    results["complete"], results["note"] = False, None


def without_any_ok_run(results: Results) -> None:
    results["summary"], results["equality"] = [], []
    for run in results["runs"]:
        run["status"] = "failed"
        run["kv"] = run["startup"] = run["memory"] = run["peak_rss_bytes"] = None
        run["snapshots"], run["workloads"] = [], []


def without_workloads(results: Results) -> None:
    results["experiment"]["workloads"] = []
    without_runs(results)


def without_steps(results: Results) -> None:
    for run in results["runs"]:
        for workload in run["workloads"]:
            for column in workload["steps"].values():
                column.clear()  # type: ignore[attr-defined]
            workload["block_events"] = []


def without_ledger_columns(results: Results) -> None:
    for run in results["runs"]:
        for workload in run["workloads"]:
            steps: dict[str, Any] = workload["steps"]  # type: ignore[assignment]
            steps["external"], steps["cached"] = [], []
            steps["live"] = steps["live"][:3]
            steps["waiting"] = []


def without_finished_requests(results: Results) -> None:
    for run in results["runs"]:
        for workload in run["workloads"]:
            for request in workload["requests"]:
                request["finish_reason"] = "error"
                request["token_times_s"], request["output_token_ids"] = [], []


PARTIAL = [
    without_runs,
    without_any_ok_run,
    without_workloads,
    without_steps,
    without_ledger_columns,
    without_finished_requests,
]


@pytest.mark.parametrize("take_away", PARTIAL, ids=lambda f: f.__name__)
def test_partial_results_still_render(take_away: Any) -> None:
    results = make_results()
    take_away(results)
    page = Page(render_html(results))
    assert "KV pool over time" in page.words


def test_environment_is_flattened_for_people() -> None:
    nested = {
        "ram_bytes": 17179869184,
        "cpu": {"flags": ["a", "b"], "no": None},
        "gpus": [{"n": 1}],
    }
    assert flatten(nested) == [
        ("ram", "16.0 GiB"),
        ("cpu.flags", "a, b"),
        ("cpu.no", "–"),
        ("gpus.0.n", "1"),
    ]


def test_a_report_that_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"cannot write .*report\.html"):
        write_html(make_results(), tmp_path / "file" / "report.html")


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    write_html(make_results(), tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")

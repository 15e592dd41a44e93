"""The experiment over fake methods: order, partial results, Ctrl-C, settings."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from pagelab.errors import ConfigError, ReportError
from pagelab.lab.events import (
    Event,
    ExperimentFinished,
    ExperimentStarted,
    PhaseStarted,
    RunFinished,
    RunStarted,
)
from pagelab.lab.experiment import Plan, prepare, run_experiment
from pagelab.lab.model_facts import ModelFacts
from pagelab.lab.progress import CompareProgress
from pagelab.lab.settings import ExperimentSettings, default_kv_memory
from pagelab.results import Results, load_results

ROOT = Path(__file__).resolve().parents[2]
FAKES = "tests.unit.test_lab_fakes:"
FACTS = ModelFacts(
    info={
        "name": "fake",
        "source": "nowhere",
        "architecture": "llama",
        "num_parameters": 1000,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 2,
        "vocab_size": 100,
        "kv_bytes_per_token": 16,
    },
    max_position=4096,
    encode=None,
    decode=None,
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def settings(tmp_path: Path, *fakes: str, **options: Any) -> ExperimentSettings:
    return ExperimentSettings(
        methods=tuple(FAKES + fake for fake in fakes),
        out=tmp_path,
        **{"workloads": ("prompts",), **options},
    )


def experiment(
    asked: ExperimentSettings, events: list[Event] | None = None, **options: Any
) -> Results:
    sink = events if events is not None else []
    return run_experiment(asked, sink.append, plan=prepare(asked, FACTS), **options)


def test_every_method_runs_and_the_results_can_be_read_again(tmp_path: Path) -> None:
    results = experiment(settings(tmp_path, "Honest", "Different"))
    assert results["complete"]
    assert results["note"] is None
    assert [run["status"] for run in results["runs"]] == ["ok", "ok"]
    assert load_results(tmp_path / "results.json") == results
    (entry,) = results["equality"]
    assert (entry["equal"], entry["total"]) == (3, 4)
    assert entry["differences"][0]["request"] == "prompt-1"
    assert entry["differences"][0]["position"] == 2
    assert len(results["summary"]) == 2
    assert results["experiment"]["workloads"][0]["requests"][0]["max_tokens"] == 50
    assert results["environment"]["cpu"]["cores"] >= 1


def test_repeats_alternate_between_methods(tmp_path: Path) -> None:
    events: list[Event] = []
    results = experiment(settings(tmp_path, "Honest", "Different", repeats=2), events)
    started = [(e.variant.label[-6:], e.repeat) for e in events if isinstance(e, RunStarted)]
    assert started == [("Honest", 0), ("ferent", 0), ("Honest", 1), ("ferent", 1)]
    assert results["summary"][0]["repeats"] == 2
    assert len({run["pid"] for run in results["runs"]}) == 4
    kinds = [type(event) for event in events]
    assert kinds[0] is ExperimentStarted
    assert kinds[-1] is ExperimentFinished
    assert kinds.count(PhaseStarted) == 1


def test_a_method_that_fails_is_a_row_and_the_rest_go_on(tmp_path: Path) -> None:
    results = experiment(settings(tmp_path, "Exits", "Unavailable", "Honest"))
    assert [run["status"] for run in results["runs"]] == ["failed", "unavailable", "ok"]
    assert results["complete"]
    assert "flux capacitor" in json.dumps(results["analysis"])
    assert (tmp_path / "logs" / "tests.unit.test-lab-fakes-Exits-1.log").is_file()


def test_results_are_saved_after_every_run(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def look(event: Event) -> None:
        if isinstance(event, RunFinished):
            saved = load_results(tmp_path / "results.json")
            seen.append((len(saved["runs"]), saved["complete"]))

    asked = settings(tmp_path, "Honest", "Noisy")
    run_experiment(asked, look, plan=prepare(asked, FACTS))
    assert seen == [(1, False), (2, False)]


def test_the_phases_are_parted_by_a_pause(tmp_path: Path) -> None:
    asked = settings(tmp_path, "Honest", "Different")
    plan = prepare(asked, FACTS)
    paged = dataclasses.replace(plan.variants[1], phase="paged")
    plan = dataclasses.replace(plan, variants=(plan.variants[0], paged))
    order: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            order.append(event.phase)

    run_experiment(asked, note, plan=plan, between_phases=lambda: order.append("pause"))
    assert order == ["traditional", "pause", "paged"]


def test_ctrl_c_at_the_pause_keeps_the_first_phase(tmp_path: Path) -> None:
    asked = settings(tmp_path, "Honest", "Different")
    plan = prepare(asked, FACTS)
    paged = dataclasses.replace(plan.variants[1], phase="paged")
    plan = dataclasses.replace(plan, variants=(plan.variants[0], paged))

    def interrupt() -> None:
        raise KeyboardInterrupt

    results = run_experiment(asked, lambda event: None, plan=plan, between_phases=interrupt)
    assert not results["complete"]
    assert [run["status"] for run in results["runs"]] == ["ok"]
    assert "interrupted" in str(results["note"])


SECOND_WORKLOAD = """
import dataclasses
import pagelab.workloads as workloads
workloads._BUILDERS["second"] = lambda seed: dataclasses.replace(
    workloads.seed_prompts(), name="second"
)
import pagelab.lab.settings as lab_settings
lab_settings.WORKLOADS = tuple(workloads._BUILDERS)
"""

CTRL_C = """
import sys
from pathlib import Path
from tests.unit.test_lab_experiment import FACTS, settings
from pagelab.lab.events import WorkloadFinished
from pagelab.lab.experiment import prepare, run_experiment

asked = settings(Path(sys.argv[1]), "Honest", "Hangs", "Noisy", workloads=("prompts", "second"))

def tell(event):
    if isinstance(event, WorkloadFinished):
        print(event.label, event.run["name"], flush=True)

results = run_experiment(asked, tell, plan=prepare(asked, FACTS))
sys.exit(130 if not results["complete"] else 0)
"""


def test_ctrl_c_ends_the_method_and_keeps_what_was_measured(tmp_path: Path) -> None:
    code = SECOND_WORKLOAD + CTRL_C
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            seen = [parent.stdout.readline().split()[-1:] for _ in range(3)]
            assert seen == [["prompts"], ["second"], ["prompts"]]
            time.sleep(0.3)  # the second method now hangs in its second workload
            children = psutil.Process(parent.pid).children()
            os.kill(parent.pid, signal.SIGINT)
            assert parent.wait(20) == 130
        finally:
            parent.kill()
    assert len(children) == 1
    assert not psutil.pid_exists(children[0].pid)
    results = load_results(tmp_path / "results.json")
    assert not results["complete"]
    assert "interrupted by Ctrl-C in tests.unit.test_lab_fakes:Hangs" in str(results["note"])
    assert [run["status"] for run in results["runs"]] == ["ok", "interrupted"]
    assert [w["name"] for w in results["runs"][1]["workloads"]] == ["prompts"]
    assert results["runs"][1]["snapshots"]
    assert len(results["summary"]) == 3


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write"):
        experiment(settings(tmp_path / "file", "Honest"))


# Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workloads": ("mxied",)}, "--workload takes prompts, mixed, large"),
        ({"workloads": ()}, "--workload is empty"),
        ({"workloads": ("mixed", "mixed")}, "twice"),
        ({"methods": ("hf",)}, "--methods takes hf-generate"),
        ({"methods": ("hf-static", "hf-static")}, "twice"),
        ({"allocators": ("buddy",)}, "--allocators takes contiguous-max, paged"),
        ({"allocators": (), "methods": ("pagelab",)}, "nothing to compare"),
        ({"dtype": "int3"}, "--dtype takes float32"),
        ({"repeats": 0}, "--repeats"),
        ({"block_size": 0}, "--block-size"),
        ({"kv_memory": 0}, "--kv-memory"),
        ({"max_model_len": -1}, "--max-model-len"),
        ({"threads": 0}, "--threads"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens"),
        ({"watermark": 1.0}, "--watermark"),
        ({"watermark": float("nan")}, "--watermark"),
        ({"silence_timeout_s": 0}, "timeout"),
    ],
)
def test_a_setting_that_cannot_work_names_its_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExperimentSettings(**options)


def plan(**options: Any) -> Plan:
    return prepare(ExperimentSettings(**options), FACTS)


def test_the_length_is_the_models_own_where_that_is_less() -> None:
    assert plan().max_model_len == 2048
    short = dataclasses.replace(FACTS, max_position=1024)
    assert prepare(ExperimentSettings(), short).max_model_len == 1024
    with pytest.raises(ConfigError, match="--max-model-len 5000 is more than the model's own 4096"):
        plan(max_model_len=5000)


def test_a_request_longer_than_the_length_or_the_budget_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match="more than --max-model-len 100"):
        plan(max_model_len=100)
    with pytest.raises(ConfigError, match=r"holds 62 tokens, and prompt-2 .* needs 183"):
        plan(kv_memory=1000)


def test_the_default_budget_holds_two_requests_of_the_maximum_length() -> None:
    smollm2, gpt2 = default_kv_memory(2048, 46_080), default_kv_memory(1024, 73_728)
    assert smollm2 == 192 << 20
    assert smollm2 // 46_080 // 2048 == gpt2 // 73_728 // 1024 == 2
    assert default_kv_memory(512, 512) // 512 == 512 * 17 // 8
    assert plan().kv_memory == default_kv_memory(2048, 16)


def test_all_methods_are_told_the_same() -> None:
    whole = plan(threads=1)
    jobs = [whole.job(variant) for variant in whole.variants]
    assert [(job.method, job.allocator) for job in jobs] == [
        ("hf-generate", None),
        ("hf-static", None),
        ("pagelab", "contiguous-max"),
        ("pagelab", "paged"),
    ]
    same = {dataclasses.replace(job, method="", allocator=None) for job in jobs}
    assert len(same) == 1


def test_the_command_line_repeats_the_experiment() -> None:
    assert ExperimentSettings().command_line() == "pagelab compare"
    asked = ExperimentSettings(
        model="my model", workloads=("mixed", "large"), kv_memory=1 << 20, dtype="bfloat16"
    )
    assert asked.command_line() == (
        "pagelab compare --model 'my model' --workload mixed,large --kv-memory 1048576 "
        "--dtype bfloat16"
    )
    assert ExperimentSettings(command="pagelab compare -x").command_line() == "pagelab compare -x"


# What is shown


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_phases_snapshots_and_rates(tmp_path: Path, terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
    asked = settings(tmp_path, "Honest", "Unavailable")
    with CompareProgress(console) as progress:
        run_experiment(asked, progress, plan=prepare(asked, FACTS))
    shown = text.getvalue()
    for words in (
        "Phase 1: the traditional method",
        "model loaded",
        "prompts: request 3 done",
        "KV allocated",
        "200 tokens in",
        "tok/s",
        "peak RSS",
        "unavailable: needs a flux capacitor",
    ):
        assert words in shown
    assert ("\x1b[" in shown) == terminal

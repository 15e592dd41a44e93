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
from pagelab.lab.preparation import experiment_info
from pagelab.lab.progress import CompareProgress
from pagelab.lab.settings import (
    ExperimentSettings,
    default_kv_memory,
    format_objectives,
    parse_objectives,
)
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
from pagelab.workloads import named
named.BUILDERS["second"] = lambda seed: dataclasses.replace(named.seed_prompts(), name="second")
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
        ({"workloads": ()}, "--workload is empty"),
        ({"workloads": ("mixed", "mixed")}, "--workload names mixed twice"),
        ({"rates": ("fast",)}, "no rate 'fast': --rate takes burst"),
        ({"rates": ("4", "4")}, "--rate names 4 twice"),
        ({"num_requests": 0}, "--requests must be at least 1"),
        ({"too_long": "cut"}, "--too-long takes drop, clip or error"),
        ({"asked_tokens": 0}, "--asked-tokens must be at least 1"),
        ({"methods": ("hf",)}, "--methods takes hf-generate, hf-static, hf-continuous-batching"),
        ({"methods": ("hf-static", "hf-static")}, "--methods names a method twice"),
        ({"methods": ()}, "--methods is empty"),
        ({"allocators": ("paged", "paged")}, "--allocators names paged twice"),
        ({"allocators": (), "methods": ("pagelab",)}, "--allocators is empty"),
        ({"axes": ()}, "--axes is empty"),
        ({"axes": ("bytes",)}, "--axes takes budget, batch, not 'bytes'"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"batch": 2, "axes": ("budget",)}, "--batch .* add batch to --axes"),
        ({"placements": ("worst-fit",)}, "--placement takes buddy, first-fit, not 'worst-fit'"),
        ({"placements": ()}, "--placement is empty"),
        ({"device": "tpu"}, "no device 'tpu': --device takes auto, cpu, cuda"),
        ({"dtype": "int3"}, "--dtype takes float32"),
        ({"repeats": 0}, "--repeats"),
        ({"block_sizes": (16, 0)}, "--block-size must be from 1 to 256, not 0"),
        ({"block_sizes": (300,)}, "--block-size must be from 1 to 256, not 300"),
        ({"block_sizes": ()}, "--block-size is empty"),
        ({"block_sizes": (8, 8)}, "--block-size names 8 twice"),
        ({"kv_memories": (1 << 20, 0)}, "--kv-memory must be at least 1, not 0"),
        ({"kv_memories": ()}, "--kv-memory is empty"),
        ({"temperature": -1.0}, "--temperature must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"max_model_len": -1}, "--max-model-len"),
        ({"threads": 0}, "--threads"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens"),
        ({"watermarks": (0.01, 1.5)}, "--watermark must be from 0 to below 1, not 1.5"),
        ({"watermarks": (float("nan"),)}, "--watermark"),
        ({"watermarks": ()}, "--watermark is empty"),
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
        plan(kv_memories=(1 << 20, 1000))


def test_the_default_budget_holds_two_requests_of_the_maximum_length() -> None:
    smollm2, gpt2 = default_kv_memory(2048, 46_080), default_kv_memory(1024, 73_728)
    assert smollm2 == 192 << 20
    assert smollm2 // 46_080 // 2048 == gpt2 // 73_728 // 1024 == 2
    assert default_kv_memory(512, 512) // 512 == 512 * 17 // 8
    assert plan().grid.kv_memories == (default_kv_memory(2048, 16),)


def test_all_methods_are_told_the_same() -> None:
    whole = plan(threads=1)
    jobs = [whole.job(variant) for variant in whole.variants]
    assert [(job.method, job.allocator) for job in jobs] == [
        ("hf-generate", None),
        ("hf-static", None),
        ("pagelab", "contiguous-max"),
        ("pagelab", "paged"),
        ("pagelab", "paged"),
    ]
    assert jobs[-1].max_num_seqs == whole.batch == 2  # what contiguous-max holds at once
    same = {dataclasses.replace(job, method="", allocator=None, max_num_seqs=None) for job in jobs}
    assert len(same) == 1
    assert plan(device="cuda").job(whole.variants[0]).device == "cuda"


def test_the_command_line_repeats_the_experiment() -> None:
    assert ExperimentSettings().command_line() == "pagelab compare"
    asked = ExperimentSettings(
        model="my model",
        workloads=("mixed", "large"),
        kv_memories=(1 << 20, 1 << 21),
        device="cuda:1",
        dtype="bfloat16",
        skip_bad=True,
        objectives=parse_objectives("e2e=9"),
    )
    assert asked.command_line() == (
        "pagelab compare --model 'my model' --workload mixed,large --skip-bad "
        "--kv-memory 1048576,2097152 --device cuda:1 --dtype bfloat16 --objective e2e=9"
    )
    assert ExperimentSettings(command="pagelab compare -x").command_line() == "pagelab compare -x"


def test_a_workload_that_does_not_exist_is_said_before_the_model_is_looked_for() -> None:
    asked = ExperimentSettings(model="no/such/model", workloads=("mxied",))
    with pytest.raises(ConfigError, match="no workload 'mxied': --workload takes seed, prompts"):
        prepare(asked)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("ttft=2,tpot=0.2", (2, 0.2, None)),
        ("e2e=30", (None, None, 30)),
        (" tpot = 1e-3 ", (None, 0.001, None)),
        ("none", (None, None, None)),
    ],
)
def test_objectives_are_seconds(text: str, stated: tuple[float | None, ...]) -> None:
    found = parse_objectives(text)
    assert tuple(found.values()) == stated
    assert parse_objectives(format_objectives(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ttft",
        "ttft=",
        "ttft=x",
        "ttft=0",
        "ttft=-1",
        "ttft=nan",
        "ttft=inf",
        "itl=1",
        "ttft=1,ttft=2",
        "ttft=1,,tpot=1",
        "none,ttft=1",
    ],
)
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--objective .* ttft, tpot and e2e"):
        parse_objectives(text)


def test_every_rate_makes_a_workload_of_its_own() -> None:
    whole = plan(workloads=("mixed", "uniform:in=4,out=2,n=3"), rates=("burst", "poisson:4"))
    assert [workload.name for workload in whole.workloads] == [
        "mixed@burst",
        "mixed@poisson:4",
        "uniform-4..4-2..2-n3@burst",
        "uniform-4..4-2..2-n3@poisson:4",
    ]
    burst, poisson = whole.workloads[:2]
    assert {request.arrival_s for request in burst.requests} == {0.0}
    assert len({request.arrival_s for request in poisson.requests}) == 24
    assert [r.token_ids for r in burst.requests] == [r.token_ids for r in poisson.requests]
    info = experiment_info(whole)
    assert [workload["rate"] for workload in info["workloads"]] == ["burst", "poisson:4"] * 2
    assert info["workloads"][1]["requests"][1]["arrival_s"] > 0


def test_a_traces_requests_are_taken_clipped_and_counted(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,30,5\n1,90,20\nx,1,1\n2,10,3\n")
    options: dict[str, Any] = {"workloads": (str(trace),), "max_model_len": 64, "skip_bad": True}
    (workload,) = plan(too_long="clip", asked_tokens=16, **options).workloads
    assert [(len(r.token_ids), r.max_tokens, r.asked_tokens) for r in workload.requests] == [
        (30, 5, 16),
        (44, 20, None),
        (10, 3, 16),
    ]
    info = experiment_info(plan(too_long="drop", **options))["workloads"][0]
    assert info["name"] == "mine"
    assert info["counts"] is not None
    counts = info["counts"]
    assert (counts["read"], counts["dropped"], counts["bad"]) == (3, 1, 1)
    assert "line 4" in str(counts["first_bad"])
    with pytest.raises(ConfigError, match=r"--too-long drop\|clip"):
        plan(**options)
    with pytest.raises(ConfigError, match="--skip-bad"):
        plan(**{**options, "skip_bad": False, "too_long": "drop"})


def test_two_workloads_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text("arrival_s,input_tokens,output_tokens\n0,3,5\n")
    both = (str(tmp_path / "a" / "x.csv"), str(tmp_path / "b" / "x.csv"))
    with pytest.raises(ConfigError, match=r"two workloads are called x: .*--workload"):
        plan(workloads=both)


def test_the_same_batch_is_what_contiguous_max_holds_or_what_is_asked() -> None:
    def batch(**options: Any) -> tuple[int | None, list[str]]:
        whole = plan(methods=("pagelab",), **options)
        return whole.batch, [v.label for v in whole.variants if v.axis == "batch"]

    assert batch() == (2, ["pagelab paged, batch 2"])
    assert batch(batch=1) == (1, ["pagelab contiguous-max, batch 1", "pagelab paged, batch 1"])
    assert batch(axes=("budget",)) == (None, [])
    assert batch(allocators=("paged",)) == (None, [])
    assert batch(allocators=("paged",), batch=7) == (7, ["pagelab paged, batch 7"])
    with pytest.raises(ConfigError, match="--batch 3 is more than contiguous-max holds at once, 2"):
        batch(batch=3)
    with pytest.raises(ConfigError, match="--batch needs the method pagelab"):
        plan(methods=("hf-static",), batch=3)
    with pytest.raises(ConfigError, match="nothing to compare"):
        batch(allocators=("paged",), axes=("batch",))


def test_every_combination_is_told_to_its_method() -> None:
    whole = plan(
        methods=("pagelab",),
        allocators=("contiguous-oracle", "paged"),
        kv_memories=(1 << 20, 1 << 19),
        block_sizes=(8, 32),
        watermarks=(0.0, 0.1),
        placements=("buddy", "first-fit"),
        temperature=0.5,
    )
    jobs = [whole.job(variant) for variant in whole.variants]
    told = [tuple(job.settings().values())[:4] for job in jobs if job.allocator == "paged"]
    assert told == [
        (memory, size, watermark, "buddy")
        for memory in (1 << 20, 1 << 19)
        for size in (8, 32)
        for watermark in (0.0, 0.1)
    ]
    others = [job for job in jobs if job.allocator == "contiguous-oracle"]
    assert {(job.watermark, job.placement) for job in others} == {
        (0.0, "buddy"),
        (0.0, "first-fit"),
    }
    assert {job.temperature for job in jobs} == {0.5}
    info = experiment_info(whole)
    assert (info["kv_memory_bytes"], info["block_size"], info["watermark"]) == (1 << 20, 8, 0.0)
    assert info["sampling"].startswith("temperature 0.5, seed 0")


def test_the_ledger_of_every_step_is_written_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("of an older run\n")
    results = experiment(settings(tmp_path, "Honest", "Unavailable", repeats=2))
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    steps = results["runs"][0]["workloads"][0]["steps"]
    assert len(lines) == 2 * len(steps["t"]) == 2 * 200
    assert lines[3] == {
        "label": results["runs"][0]["label"],
        "workload": "prompts",
        "repeat": 0,
        "step": 3,
        "t": steps["t"][3],
        "running": 1,
        "waiting": 0,
        "live": 4,
        "reserved": 0,
        "internal": 3,
        "cached": 0,
        "free": 993,
        "external": 0,
        "rounding": 0,
        "shared_saved": 0,
    }
    assert [line["repeat"] for line in lines] == [0] * 200 + [1] * 200


def test_sampled_outputs_are_not_compared(tmp_path: Path) -> None:
    results = experiment(settings(tmp_path, "Honest", "Different", temperature=0.7))
    assert results["equality"] == []
    assert "not compared" in json.dumps(results["analysis"])


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

"""`compare` on a tiny real model: every method for real, the same tokens, ledgers that add up."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from rich.console import Console

from pagelab.errors import ModelNotFoundError
from pagelab.lab.check import check_environment, environment_rows, render_check
from pagelab.lab.events import Event
from pagelab.lab.experiment import prepare, run_experiment
from pagelab.lab.model_facts import ModelFacts, model_facts
from pagelab.lab.settings import ExperimentSettings
from pagelab.models.fetch import ModelSource
from pagelab.results import MethodRun, Results, WorkloadRun, load_results
from pagelab.workloads import Workload, WorkloadRequest
from tests.support.tiny_models import tiny_model

LABELS = ["hf-generate", "hf-static", "pagelab contiguous-max", "pagelab paged"]
SAME_BATCH = "pagelab paged, batch 2"
BYTES_PER_TOKEN = 512  # 2 layers, 2 K/V heads of 16, K and V, float32
LENGTH = 128  # a power of two, so that buddy placement rounds nothing up


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, as transformers saves it; no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that greedy choices are not ties
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def small_workload() -> Workload:
    """Lengths that differ, for two rows of 128: the second batch is cut by its padded length."""
    lengths = [(5, 8), (40, 3), (110, 4), (3, 30), (9, 1), (20, 12), (2, 2)]
    requests = tuple(
        WorkloadRequest(
            id=f"r{i}",
            prompt_token_ids=tuple((17 * i + 5 * k) % 256 for k in range(prompt)),
            prompt_tokens=prompt,
            max_tokens=output,
        )
        for i, (prompt, output) in enumerate(lengths)
    )
    return Workload("small", "Seven requests", requests)


def run(model: Path, out: Path, facts: ModelFacts, **options: Any) -> Results:
    fields: dict[str, Any] = {
        "max_model_len": LENGTH,
        "kv_memories": (2 * LENGTH * BYTES_PER_TOKEN + 8192,),
        "workloads": ("prompts",),  # replaced below
    }
    settings = ExperimentSettings(model=str(model), out=out, **fields | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagelab.lab.preparation.load_workload", lambda *_: small_workload())
        patch.setattr("pagelab.lab.preparation.random_ids", lambda workload, vocab, seed: workload)
        plan = prepare(settings, facts)
    plan = dataclasses.replace(plan, threads=1)
    events: list[Event] = []
    return run_experiment(settings, events.append, plan=plan)


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    facts = model_facts(str(model), "float32")
    assert facts.info["kv_bytes_per_token"] == BYTES_PER_TOKEN
    assert facts.encode is None
    out = tmp_path_factory.mktemp("out")
    found = run(model, out, facts)
    assert load_results(out / "results.json") == found
    return found


def only(results: Results, label: str) -> tuple[MethodRun, WorkloadRun]:
    (found,) = [r for r in results["runs"] if r["label"] == label]
    (workload,) = found["workloads"]
    return found, workload


def test_all_four_methods_run_in_their_phases(results: Results) -> None:
    assert results["complete"]
    assert [(r["label"], r["status"], r["reason"]) for r in results["runs"]] == [
        (label, "ok", None) for label in [*LABELS, SAME_BATCH]
    ]
    assert [r["phase"] for r in results["runs"]] == ["traditional"] * 3 + ["paged"] * 2
    assert len({r["pid"] for r in results["runs"]} | {os.getpid()}) == 6


def test_all_methods_give_the_same_tokens(results: Results) -> None:
    assert [(e["label"], e["equal"], e["total"]) for e in results["equality"]] == [
        (label, 7, 7) for label in [*LABELS[1:], SAME_BATCH]
    ]
    assert {e["reference"] for e in results["equality"]} == {"hf-generate"}


@pytest.mark.parametrize("label", [*LABELS, SAME_BATCH])
def test_each_request_gets_exactly_its_tokens_in_order_of_time(
    results: Results, label: str
) -> None:
    _, workload = only(results, label)
    asked = {r.id: r.max_tokens for r in small_workload().requests}
    assert {r["id"]: len(r["output_token_ids"]) for r in workload["requests"]} == asked
    assert workload["output_tokens"] == 60
    assert workload["prompt_tokens"] == 189
    for request in workload["requests"]:
        times = request["token_times_s"]
        assert 0 <= request["first_scheduled_s"] <= times[0]
        assert times == sorted(times)
        assert request["first_token_s"] == times[0]
        assert times[-1] <= request["finish_s"] <= workload["duration_s"]


@pytest.mark.parametrize("label", [*LABELS, SAME_BATCH])
def test_the_ledger_is_the_pool_and_its_summary_adds_up(results: Results, label: str) -> None:
    found, workload = only(results, label)
    assert found["kv"] is not None
    ledger, steps = workload["ledger"], workload["steps"]
    states = ("live", "reserved", "internal", "cached", "free", "external")
    assert sum(ledger[state] for state in states) == pytest.approx(1)  # type: ignore[literal-required]
    assert max(steps["live"]) == ledger["peak_live_slots"]
    assert max(steps["running"]) == ledger["peak_running"] <= 7
    assert sum(steps["new_tokens"]) >= 189 + 60 - 7  # the last token of each is never computed
    assert max(steps["live"]) * BYTES_PER_TOKEN <= found["kv"]["bytes"]


def test_hf_generate_holds_what_is_live_and_runs_alone(results: Results) -> None:
    found, workload = only(results, "hf-generate")
    steps = workload["steps"]
    assert set(steps["running"]) == {1}
    assert set(steps["reserved"] + steps["internal"] + steps["external"]) == {0}
    assert steps["live"][:8] == list(range(5, 13))
    assert steps["live"][8:11] == [40, 41, 42]
    assert steps["waiting"][0] == 6
    assert steps["waiting"][-1] == 0
    assert found["kv"] is not None
    assert found["kv"]["num_blocks"] is None


def test_hf_static_wastes_what_its_rows_do_not_use(results: Results) -> None:
    found, workload = only(results, "hf-static")
    assert found["kv"] is not None
    assert found["kv"]["note"].startswith("2 rows of 128 slots")
    assert found["kv"]["bytes"] == 2 * LENGTH * BYTES_PER_TOKEN
    steps, pool = workload["steps"], found["kv"]["slots"]
    assert pool == 272
    # first batch: (5, 8) and (40, 3); the second row ends after its third token
    assert steps["live"][:4] == [45, 47, 49, 8]
    assert steps["reserved"][:4] == [12 + 42 - 45, 12 + 42 - 47, 12 + 42 - 49, 12 - 8]
    assert steps["internal"][:4] == [256 - 54] * 3 + [256 - 12]
    assert steps["running"][:4] == [2, 2, 2, 1]
    assert steps["external"][:4] == [16] * 4
    # (110, 4) and (3, 30) do not fit into 128 together: 110 + 30; the second batch has one row
    assert steps["running"][8:12] == [1] * 4
    assert steps["live"][8] == 110
    assert steps["external"][-1] == 0  # nobody waits in the last batch
    assert steps["free"][-1] == 16


def test_contiguous_runs_two_and_paging_runs_more(results: Results) -> None:
    _, contiguous = only(results, "pagelab contiguous-max")
    _, paged = only(results, "pagelab paged")
    assert contiguous["ledger"]["peak_running"] == 2
    assert paged["ledger"]["peak_running"] > 2
    assert paged["block_events"]
    assert all(0 <= holder < 7 for _, _, holder in contiguous["block_events"] if holder >= 0)


def test_at_the_same_batch_paging_runs_as_many_as_contiguous_max(results: Results) -> None:
    found, workload = only(results, SAME_BATCH)
    assert (found["axis"], found["settings"]["max_num_seqs"]) == ("batch", 2)
    assert workload["ledger"]["peak_running"] == results["experiment"]["batch"] == 2
    _, contiguous = only(results, "pagelab contiguous-max")
    assert workload["steps"]["running"] == contiguous["steps"]["running"]  # step by step
    assert workload["steps"]["live"] == contiguous["steps"]["live"]
    assert any("same batch of 2" in finding["text"] for finding in results["analysis"])


def test_snapshots_name_every_stage(results: Results) -> None:
    for found in results["runs"]:
        labels = [s["label"] for s in found["snapshots"]]
        assert labels[:3] == ["start", "model loaded", "warmed up"]
        assert labels[-1] == "small: batch complete"
        assert all(s["rss_bytes"] > 1 << 20 for s in found["snapshots"])
        assert found["peak_rss_bytes"] is not None
        assert found["peak_rss_bytes"] > 100 << 20  # torch alone takes more
        assert max(s["kv_live_bytes"] for s in found["snapshots"]) > 0


def test_conclusions_come_from_this_run(results: Results) -> None:
    labels = {entry["label"] for entry in results["summary"]}
    assert labels == {*LABELS, SAME_BATCH}
    for finding in results["analysis"]:
        assert finding["verdict"] in ("better", "worse", "same", "info")
        if "paged_output_tokens_per_s" in finding["figures"]:
            figures = finding["figures"]
            rates = figures["paged_output_tokens_per_s"], figures["other_output_tokens_per_s"]
            assert figures["ratio"] == pytest.approx(rates[0] / rates[1])


def test_a_budget_without_a_row_makes_reserving_methods_unavailable(
    model: Path, tmp_path: Path
) -> None:
    facts = model_facts(str(model), "float32")
    results = run(model, tmp_path, facts, kv_memories=(127 * BYTES_PER_TOKEN,), block_sizes=(8,))
    assert [(r["status"], r["reason"]) for r in results["runs"]] == [
        ("ok", None),
        ("unavailable", ANY),
        ("unavailable", ANY),
        ("ok", None),
    ]
    assert all("--kv-memory" in str(r["reason"]) for r in results["runs"][1:3])
    assert [(e["label"], e["equal"]) for e in results["equality"]] == [("pagelab paged", 7)]


def test_every_allocator_placement_and_watermark_gives_the_same_tokens(
    model: Path, tmp_path: Path
) -> None:
    facts = model_facts(str(model), "float32")
    results = run(
        model,
        tmp_path,
        facts,
        methods=("pagelab",),
        allocators=("contiguous-pow2", "contiguous-oracle", "reserved-paged", "paged"),
        block_sizes=(1,),
        watermarks=(0.05, 0.0),
        placements=("buddy", "first-fit"),
        axes=("budget",),
    )
    assert [r["status"] for r in results["runs"]] == ["ok"] * (2 + 2 + 1 + 2)
    assert all(entry["equal"] == 7 for entry in results["equality"])
    assert len(results["equality"]) == 6
    by_label = {r["label"]: r["workloads"][0] for r in results["runs"]}
    assert max(by_label["pagelab contiguous-oracle, buddy"]["steps"]["rounding"]) > 0
    assert set(by_label["pagelab contiguous-oracle, first-fit"]["steps"]["rounding"]) == {0}
    tail = by_label["pagelab paged, watermark 5 %"]["steps"]
    assert set(tail["internal"]) == {0}  # blocks of one slot have no tail
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == sum(len(w["steps"]["t"]) for w in by_label.values())
    assert {json.loads(line)["label"] for line in lines} == set(by_label)
    assert load_results(tmp_path / "results.json") == results


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_padded_batches_say_the_same_in_other_families(name: str, tmp_path: Path) -> None:
    folder = tiny_model(name)
    facts = model_facts(str(folder), "float32")
    assert facts.encode is not None
    assert facts.encode("hé") == [104, 195, 169]  # no special tokens
    bytes_per_token = facts.info["kv_bytes_per_token"]
    results = run(folder, tmp_path, facts, kv_memories=(3 * LENGTH * bytes_per_token,))
    assert [r["status"] for r in results["runs"]] == ["ok"] * 5
    assert [(e["label"], e["equal"]) for e in results["equality"]] == [
        (label, 7)
        for label in [*LABELS[1:], f"pagelab paged, batch {results['experiment']['batch']}"]
    ]


@pytest.mark.default_model
def test_the_default_experiment_is_planned_without_torch(default_model: ModelSource) -> None:
    code = (
        "import sys, json; from pagelab.lab.experiment import prepare;"
        "from pagelab.lab.settings import ExperimentSettings;"
        "plan = prepare(ExperimentSettings());"
        "print(json.dumps([[len(r.token_ids) for r in w.requests] for w in plan.workloads]));"
        "print(plan.grid.base.kv_memory, plan.max_model_len, plan.batch, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lengths, figures = done.stdout.splitlines()
    prompts, mixed = json.loads(lengths)
    assert prompts == [2, 13, 111, 2]
    assert sum(mixed) == 1001
    assert figures == f"{192 << 20} 2048 2 False"


def test_a_missing_model_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        prepare(ExperimentSettings(model=str(tmp_path / "nothing")))


def test_check_lists_this_machine_and_what_runs() -> None:
    environment = check_environment(probe_torch=False)
    names = [row["name"] for row in environment["runs"]]
    assert names == [
        "pagelab on the CPU",
        "torch on a GPU",
        "hf-generate",
        "hf-static",
        "vllm",
        "default model",
        "compiled extension",
        "attention triton",
    ]
    assert dict(environment_rows(environment))["vllm"] == "not installed"
    text = io.StringIO()
    render_check(environment, Console(file=text, width=200))
    assert "What runs here" in text.getvalue()
    assert environment["cpu"]["model"] in text.getvalue()

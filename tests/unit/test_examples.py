"""The examples do what they say, executed as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.memory.allocators import Demand, make_allocator
from pagelab.results import load_results
from tests.support.engines import greedy, outputs, run, toy_engine
from tests.support.toy_runner import generate

ROOT = Path(__file__).resolve().parents[2]
HEADROOM = "examples/headroom_allocator.py:Headroom"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 200))
def test_headroom_is_ahead_of_the_tokens_and_within_what_was_asked(
    num_tokens: int, left: int, beyond: int
) -> None:
    allocator = make_allocator(str(ROOT / HEADROOM))
    final = num_tokens + left
    demand = Demand(1, num_tokens, final, final + beyond, 1000)
    assert allocator.slots(demand) == num_tokens + min(32, left + beyond)


def test_headroom_runs_in_the_engine_with_the_tokens_of_paging_and_holds_more() -> None:
    peak, said = {}, {}
    prompts = [[7 * i + k for k in range(3 + 2 * i)] for i in range(8)]
    for allocator in ("paged", HEADROOM):
        core, runner = toy_engine(num_blocks=32, allocator=allocator, max_model_len=96)
        requests = [core.add_request(prompt, greedy(40)) for prompt in prompts]
        held: list[int] = []
        core.on_step = lambda record, core=core, held=held: held.append(core.kv.num_table_slots)
        run(core)
        said[allocator] = [outputs(request) for request in requests]
        peak[allocator] = held[0] / len({p.sequence_id for p in runner.batches[0].sequences})
    expected = [[generate(prompt, 40, 0, 97)] for prompt in prompts]
    assert said["paged"] == said[HEADROOM] == expected
    assert peak[HEADROOM] >= peak["paged"] + 32 - 4  # slots a request, after the first step


def test_headroom_is_a_row_of_the_comparison(tmp_path: Path) -> None:
    from tests.support.tiny_models import tiny_model

    command = [sys.executable, "-m", "pagelab", "compare", "--model", str(tiny_model("llama"))]
    command += ["--methods", "pagelab", "--allocators", f"paged,{HEADROOM}"]
    command += ["--workload", "uniform:in=4..40,out=8..30,n=6", "--max-model-len", "128"]
    command += ["--block-size", "4", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    results = load_results(tmp_path / "results.json")
    assert [(r["label"], r["status"]) for r in results["runs"]] == [
        ("pagelab paged", "ok"),
        ("pagelab headroom", "ok"),
    ]
    assert [(e["label"], e["equal"]) for e in results["equality"]] == [("pagelab headroom", 6)]
    assert "Paging" in done.stdout
    assert "pagelab headroom" in done.stdout
    first = {
        run["label"]: run["workloads"][0]["steps"]["reserved"][0]
        + run["workloads"][0]["steps"]["internal"][0]
        for run in results["runs"]
    }
    assert first["pagelab headroom"] > first["pagelab paged"]

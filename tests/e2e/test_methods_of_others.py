"""Methods of others in processes of their own, as the experiment runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pagelab.lab.methods import Variant
from pagelab.lab.process import run_method
from pagelab.results import MethodRun
from tests.support.method_jobs import job, tokens, workload
from tests.support.tiny_models import tiny_model

PLACES = {
    "hf-generate": "pagelab.lab.methods.hf_generate:HfGenerate",
    "hf-continuous-batching": "pagelab.lab.methods.hf_continuous_batching:HfContinuousBatching",
    "vllm": "pagelab.lab.methods.vllm_offline:Vllm",
}
MIXED = workload("mixed", [(5, 8), (40, 3), (110, 4), (3, 30), (9, 1), (20, 12), (2, 2)])


def run(label: str, folder: Path, **options: Any) -> MethodRun:
    method = PLACES[label]
    return run_method(
        job(tiny_model("llama"), MIXED, method=method, **options),
        Variant(method, None, label, "traditional"),
        0,
        log_path=folder / f"{label}.log",
        on_event=lambda event: None,
    )


def test_continuous_batching_in_its_own_process_agrees_with_generate(tmp_path: Path) -> None:
    expected = run("hf-generate", tmp_path)
    found = run("hf-continuous-batching", tmp_path)
    assert [(r["status"], r["reason"]) for r in (expected, found)] == [("ok", None)] * 2
    assert tokens(found["workloads"][0]) == tokens(expected["workloads"][0])
    assert found["kv"] is not None
    assert found["kv"]["bytes"] <= 1 << 20
    assert found["startup"] is not None
    assert min(found["startup"]["import_s"], found["startup"]["load_s"]) > 0
    assert found["startup"]["warmup_s"] > 0
    assert [s["label"] for s in found["snapshots"]][:3] == ["start", "model loaded", "warmed up"]
    assert max(s["kv_live_bytes"] for s in found["snapshots"]) > 0
    assert found["workloads"][0]["ledger"]["peak_running"] > 1


def test_a_method_that_cannot_run_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a package of that name that cannot be imported, installed or not
    (tmp_path / "vllm.py").write_text("raise ModuleNotFoundError(\"No module\", name='vllm')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    without = run("vllm", tmp_path)
    assert without["status"] == "unavailable"
    assert "pip install vllm" in str(without["reason"])
    small = run("hf-continuous-batching", tmp_path, kv_memory=4096)
    assert small["status"] == "unavailable"
    assert "--kv-memory" in str(small["reason"])

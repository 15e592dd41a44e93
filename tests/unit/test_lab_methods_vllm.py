"""The method `vllm`, against a stand-in for the package (`tests.support.fake_vllm`)."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pagelab.lab.methods import vllm_offline
from pagelab.lab.methods.vllm_offline import Vllm
from pagelab.lab.protocol import MethodUnavailableError
from tests.support.fake_vllm import FakeVllm
from tests.support.method_jobs import job, run_all, stages, start, tokens, workload
from tests.support.tiny_models import tiny_gguf, tiny_model

BYTES_PER_TOKEN = 512  # the tiny Llama in float32
MIXED = workload("mixed", [(5, 8), (40, 3), (110, 4), (3, 30), (9, 1), (20, 12), (2, 2)])
TIGHT = workload("tight", [(5, 60), (40, 40), (30, 50), (3, 30), (9, 70), (20, 32), (2, 12)])
ROOMY = {"kv_memory": 200 * 8 * BYTES_PER_TOKEN, "max_num_batched_tokens": 512}
SCARCE = {"kv_memory": 30 * 8 * BYTES_PER_TOKEN, "max_model_len": 128}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in vllm_offline.ENVIRONMENT:  # set when the method starts; unset after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeVllm:
    fake = FakeVllm(BYTES_PER_TOKEN, **options)
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("llama")


def test_without_vllm_the_row_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MethodUnavailableError, match="not installed: pip install vllm"):
        start(Vllm, job(model, MIXED))


def test_a_vllm_that_lacks_a_part_says_which(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "LLM", None, raising=False)
    with pytest.raises(MethodUnavailableError, match=r"vllm\.sampling_params"):
        start(Vllm, job(model, MIXED))


def test_its_capacity_is_what_the_engine_says(fake: FakeVllm, model: Path) -> None:
    _, capacity, _ = start(Vllm, job(model, MIXED, kv_memory=100 * 8 * BYTES_PER_TOKEN + 9))
    assert (capacity["num_blocks"], capacity["block_size"]) == (100, 8)
    assert capacity["slots"] == 800
    assert capacity["bytes"] == 800 * BYTES_PER_TOKEN
    assert "null block" in capacity["note"]
    assert fake.arguments["model"] == str(model)


def test_its_ledger_is_what_the_engine_holds(fake: FakeVllm, model: Path) -> None:
    """With every prompt in one step, the split is exact."""
    _, (run,) = run_all(Vllm, job(model, MIXED, **ROOMY))
    assert fake.engine is not None
    truth = fake.engine.truth[-len(run["steps"]["t"]) :]
    live = [written for written, _ in truth]
    held = [slots for _, slots in truth]
    steps = run["steps"]
    assert steps["live"] == live
    assert [200 * 8 - 8 - free for free in steps["free"]] == held
    assert steps["running"][0] == 6  # the fifth ended at once
    assert sum(steps["new_tokens"]) == MIXED.prompt_tokens + MIXED.output_tokens - 7
    # what is reserved in a request's last block is written before it ends
    assert max(steps["reserved"]) > 0


def test_requests_get_their_tokens_as_they_come(fake: FakeVllm, model: Path) -> None:
    asked = workload("spaced", [(5, 4), (9, 2), (7, 3)], every_s=0.05)
    method, _, told = start(Vllm, job(model, asked, **ROOMY))
    run = method.run(asked)
    for request, result in zip(asked.requests, run["requests"], strict=True):
        prompt = sum(request.token_ids)
        expected = [(prompt + 7 * k) % 251 for k in range(request.max_tokens)]
        assert result["output_token_ids"] == expected
        times = result["token_times_s"]
        assert request.arrival_s <= result["first_scheduled_s"] <= times[0]
        assert times == sorted(set(times))
    assert [stage["label"] for stage in stages(told)][-1] == "spaced: batch complete"
    assert len(stages(told)) == 4


def test_preemptions_are_told_with_what_they_cost(fake: FakeVllm, model: Path) -> None:
    _, (run,) = run_all(Vllm, job(model, TIGHT, **SCARCE))
    assert run["preemptions"]
    by_request = {r["id"]: r for r in run["requests"]}
    for preemption in run["preemptions"]:
        asked = next(r for r in TIGHT.requests if r.id == preemption["request"])
        assert len(asked.token_ids) <= preemption["tokens"] < asked.total_tokens
        assert 0 <= preemption["step"] < len(run["steps"]["t"])
    counted = sum(r["preemptions"] for r in run["requests"])
    assert counted == len(run["preemptions"])
    # the stand-in keeps all but the last block of what is given back
    again = sum(r["recomputed_tokens"] for r in by_request.values())
    given_back = sum(p["tokens"] for p in run["preemptions"])
    assert 0 < again < given_back
    assert run["prefix_hits"] == given_back - again


def test_settings_reach_vllm_and_its_hooks_are_taken_back(fake: FakeVllm, model: Path) -> None:
    asked = workload("few", [(5, 4)])
    method, _, _ = start(Vllm, job(model, asked, seed=7, temperature=0.5, **ROOMY))
    assert isinstance(method, Vllm)
    assert fake.arguments["seed"] == 7
    assert fake.arguments["dtype"] == "float32"
    params = method.sampling(asked.requests[0])
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 0, 1.0)
    assert (params.max_tokens, params.ignore_eos, params.detokenize) == (4, True, False)
    engine = fake.engine
    assert engine is not None
    record, process = engine.logger_manager.record, engine.output_processor.process_outputs
    before = engine.logger_manager.records
    run = method.run(asked)
    assert engine.logger_manager.records == before + len(run["steps"]["t"])
    assert engine.logger_manager.record == record
    assert engine.output_processor.process_outputs == process


def test_a_gguf_is_given_as_a_folder_and_deleted_afterwards(fake: FakeVllm) -> None:
    start(Vllm, job(tiny_gguf("llama"), MIXED, **ROOMY))
    assert {"config.json", "model.safetensors"} <= fake.files
    assert not Path(fake.arguments["model"]).exists()


def test_a_start_that_fails_names_the_settings(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    install(monkeypatch, error=RuntimeError("Engine core initialization failed"))
    with pytest.raises(MethodUnavailableError) as caught:
        start(Vllm, job(model, MIXED))
    message = str(caught.value)
    for part in ("Engine core initialization failed", "--dtype float32", "--block-size 8"):
        assert part in message


def test_an_engine_without_statistics_names_a_version(fake: FakeVllm, model: Path) -> None:
    class Silent:
        def __init__(self, **_: Any) -> None:
            self.llm_engine = object()

    fake.module.LLM = Silent  # type: ignore[attr-defined]
    with pytest.raises(MethodUnavailableError, match=r"install 0\.26"):
        start(Vllm, job(model, MIXED))


@pytest.mark.parametrize(
    ("options", "knob"),
    [({"max_model_len": 100}, "raise --max-model-len"), ({"kv_memory": 10_000}, "--kv-memory")],
)
def test_lengths_that_vllm_would_cut_are_refused(
    fake: FakeVllm, model: Path, options: dict[str, int], knob: str
) -> None:
    with pytest.raises(MethodUnavailableError, match=knob):
        start(Vllm, job(model, MIXED, **options))


def test_a_request_that_vllm_gives_up_is_an_error(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    install(monkeypatch, finish_reason="abort")
    _, (run,) = run_all(Vllm, job(model, MIXED, **ROOMY))
    assert {r["finish_reason"] for r in run["requests"]} == {"error"}
    assert {r["error"] for r in run["requests"]} == {"vllm ended it: abort"}
    assert [len(t) for t in tokens(run)] == [r.max_tokens for r in MIXED.requests]


def test_a_vllm_for_another_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, fake: FakeVllm, model: Path
) -> None:
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(device_type="cuda")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("cpu", "auto"):  # there is no GPU for the others
        with pytest.raises(MethodUnavailableError, match="runs on cuda, and the other methods on"):
            start(Vllm, job(model, device=device))
    with pytest.raises(MethodUnavailableError, match="set CUDA_VISIBLE_DEVICES=1"):
        start(Vllm, job(model, device="cuda:1"))
    method, capacity, _ = start(Vllm, job(model, device="cuda:0", workloads=()))
    assert capacity["device"] == "cuda"
    assert method.on_gpu()

"""Methods on transformers: its paged cache in this process, and sampling in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging as transformers_logging

from pagelab.lab.methods import base, hf_continuous_batching
from pagelab.lab.methods.base import Method
from pagelab.lab.methods.hf_continuous_batching import HfContinuousBatching
from pagelab.lab.methods.hf_generate import HfGenerate
from pagelab.lab.methods.hf_static import HfStatic
from pagelab.lab.methods.native import Native
from pagelab.lab.protocol import MethodUnavailableError
from pagelab.results import WorkloadRun
from pagelab.workloads import Workload, WorkloadRequest
from tests.support.method_jobs import job, run_all, stages, start, tokens, workload
from tests.support.tiny_models import tiny_model

BYTES_PER_TOKEN = {"llama": 512, "gpt2": 1024}  # 2 layers, K and V, float32
MIXED = workload("mixed", [(5, 8), (40, 3), (110, 4), (3, 30), (9, 1), (20, 12), (2, 2)])
TIGHT = workload("tight", [(5, 60), (40, 40), (30, 50), (3, 30), (9, 70), (20, 32), (2, 12)])


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """Methods set threads and random numbers for the whole process, which is theirs elsewhere."""
    threads, level = torch.get_num_threads(), transformers_logging.get_verbosity()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity(level)


def blocks(model: str, count: int) -> int:
    """A budget that makes a cache of `count` blocks of 8."""
    return (count + 2) * 8 * BYTES_PER_TOKEN[model]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_continuous_batching_says_what_generate_says_even_after_preemptions(model: str) -> None:
    folder = tiny_model(model)
    asked = (MIXED, TIGHT)
    _, expected = run_all(HfGenerate, job(folder, *asked))
    options = {"kv_memory": blocks(model, 35), "max_num_batched_tokens": 32}
    _, runs = run_all(HfContinuousBatching, job(folder, *asked, **options))
    assert [tokens(run) for run in runs] == [tokens(run) for run in expected]
    assert runs[1]["preemptions"]
    assert sum(r["preemptions"] for r in runs[1]["requests"]) == len(runs[1]["preemptions"])


def test_its_tensors_stay_within_the_budget_and_its_blocks_are_its_own_count() -> None:
    budget = blocks("llama", 35) + 100
    _, capacity, _ = start(HfContinuousBatching, job(tiny_model("llama"), kv_memory=budget))
    assert (capacity["num_blocks"], capacity["block_size"]) == (35, 8)
    assert capacity["slots"] == 280
    assert capacity["bytes"] == budget - 100
    assert "attention: " in capacity["note"]


def test_the_ledger_follows_its_blocks() -> None:
    asked = workload("two", [(5, 8), (9, 2)])
    options = {"kv_memory": blocks("llama", 10)}
    capacity, (run,) = run_all(HfContinuousBatching, job(tiny_model("llama"), asked, **options))
    steps = run["steps"]
    assert capacity["slots"] == 80
    assert steps["new_tokens"] == [14, 2, 1, 1, 1, 1, 1, 1]
    assert steps["running"] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert steps["live"] == [5 + 9, 6 + 10, 7, 8, 9, 10, 11, 12]
    # the first ends with 12 written of 16 in two blocks, the second with 10 of 16
    assert steps["reserved"] == [3 + 1, 2 + 0, 1, 0, 3, 2, 1, 0]
    assert steps["internal"] == [6, 6, 0, 0, 4, 4, 4, 4]
    assert steps["cached"] == [0, 0, 8, 8, 8, 8, 8, 8]  # the second's complete block
    assert steps["external"] == [0] * 8
    held = [(step, holder) for step, _, holder in run["block_events"]]
    assert sorted(held) == [(0, 0), (0, 1), (0, 1), (2, -2), (2, -1), (4, 0)]


def test_a_prefix_that_is_there_is_found_and_counted() -> None:
    prompt = tuple(range(50))
    requests = tuple(
        WorkloadRequest(
            id=f"s{i}",
            prompt_token_ids=(*prompt, i),
            prompt_tokens=51,
            max_tokens=6,
            arrival_s=0.2 * i,
        )
        for i in range(3)
    )
    asked = Workload("shared", "shared", requests)
    folder = tiny_model("llama")
    _, (run,) = run_all(HfContinuousBatching, job(folder, asked))
    _, (expected,) = run_all(HfGenerate, job(folder, asked))
    assert tokens(run) == tokens(expected)
    assert [r["cached_tokens"] for r in run["requests"]] == [0, 48, 48]
    assert (run["prefix_queries"], run["prefix_hits"]) == (3 * 51, 2 * 48)
    for request in run["requests"]:
        assert request["arrival_s"] <= request["first_scheduled_s"] <= request["first_token_s"]


def test_recomputed_tokens_are_those_that_a_preempted_request_had_written() -> None:
    options = {"kv_memory": blocks("llama", 35), "max_num_batched_tokens": 32}
    _, (run,) = run_all(HfContinuousBatching, job(tiny_model("llama"), TIGHT, **options))
    given_back: dict[str, int] = {}
    for preemption in run["preemptions"]:
        request_id = preemption["request"]
        given_back[request_id] = given_back.get(request_id, 0) + preemption["tokens"]
    recomputed = {r["id"]: r["recomputed_tokens"] for r in run["requests"] if r["preemptions"]}
    assert given_back.keys() == recomputed.keys()
    assert all(0 < recomputed[name] <= given_back[name] for name in given_back)


def test_every_request_is_a_stage_with_the_bytes_that_were_held() -> None:
    asked = workload("two", [(5, 8), (9, 1)])  # the second ends with its first step
    method, _, told = start(HfContinuousBatching, job(tiny_model("llama"), asked))
    method.run(asked)
    reported = stages(told)
    assert [stage["label"] for stage in reported] == [
        "two: request 2 done",
        "two: request 1 done",
        "two: batch complete",
    ]
    assert reported[0]["kv_live_bytes"] == 14 * 512
    assert reported[0]["kv_allocated_bytes"] == 24 * 512


@pytest.mark.parametrize(
    ("options", "knobs"),
    [
        ({"block_size": 2}, "--block-size"),
        ({"kv_memory": blocks("llama", 0)}, "--kv-memory or lower --block-size"),
        ({"kv_memory": blocks("llama", 3)}, "raise --kv-memory"),
        ({"kv_memory": 1 << 62}, "lower --kv-memory"),
    ],
)
def test_settings_that_cannot_work_name_the_option(options: dict[str, int], knobs: str) -> None:
    with pytest.raises(MethodUnavailableError, match=knobs):
        start(HfContinuousBatching, job(tiny_model("llama"), MIXED, **options))


def test_a_transformers_without_continuous_batching_names_the_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = SimpleNamespace(__version__="5.0.0")
    monkeypatch.setattr(hf_continuous_batching, "transformers", old)
    with pytest.raises(MethodUnavailableError, match=r"5\.0\.0.*install 5\.17 to 5\.23"):
        start(HfContinuousBatching, job(tiny_model("llama"), MIXED))


@pytest.mark.parametrize("kind", [HfGenerate, HfStatic, HfContinuousBatching])
def test_sampling_is_seeded_and_temperature_zero_is_greedy(kind: type[Method]) -> None:
    folder = tiny_model("llama")
    asked = workload("few", [(5, 20), (9, 20)])

    def sampled(temperature: float, seed: int) -> list[list[int]]:
        options = {"temperature": temperature, "seed": seed}
        # run twice: what ran before must not matter
        _, (first, again) = run_all(kind, job(folder, asked, asked, **options))
        assert tokens(first) == tokens(again)
        return tokens(first)

    greedy = sampled(0.0, 1)
    assert greedy == sampled(0.0, 2)
    hot = sampled(5.0, 1)
    assert hot != greedy
    assert hot != sampled(5.0, 2)
    assert sampled(1e-4, 1) == greedy  # all the weight on the best token


def test_on_a_gpu_the_workloads_run_first_with_other_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = workload("asked", [(5, 2), (9, 3)])
    seen: list[Workload] = []
    run = HfGenerate.run

    def noted(self: HfGenerate, given: Workload) -> WorkloadRun:
        seen.append(given)
        return run(self, given)

    monkeypatch.setattr(HfGenerate, "run", noted)
    monkeypatch.setattr(base, "_gpu_in_use", lambda: True)
    monkeypatch.setattr(base, "_bytes_of_torch", lambda: 7)
    method, _, told = start(HfGenerate, job(tiny_model("llama"), asked))
    assert [w.name for w in seen] == ["warm-up", "asked", "asked"]
    for first, second, request in zip(
        seen[1].requests, seen[2].requests, asked.requests, strict=True
    ):
        for a, b, c in zip(first.token_ids, second.token_ids, request.token_ids, strict=True):
            assert len({a, b, c}) == 3, "a prefix cache finds nothing of another run"
        assert first.max_tokens == second.max_tokens == request.max_tokens
    # progress is told, so that nobody takes a long warm-up for a method that hangs
    assert '"workload":"warm-up"' in told.getvalue()
    assert '"stage"' not in told.getvalue()
    method.reporter.stage("a stage")
    assert '"device_bytes":7' in told.getvalue()


def test_a_warm_up_leaves_nothing_in_our_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_gpu_in_use", lambda: True)
    monkeypatch.setattr(base, "_bytes_of_torch", lambda: 7)
    asked = workload("asked", [(40, 2), (33, 3)])
    method, _, _ = start(Native, job(tiny_model("llama"), asked, allocator="paged"))
    assert isinstance(method, Native)
    assert method.core.kv.pool.num_cached == 0
    method.core.kv.pool.check_invariants()
    run = method.run(asked)
    assert run["steps"]["cached"][0] == 0
    assert method.core.kv.pool.num_cached > 0, "which it otherwise has"

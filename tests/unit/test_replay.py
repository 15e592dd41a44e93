"""Serving a workload under a virtual clock: when requests are added, what is written down."""

from __future__ import annotations

from typing import Any

import pytest

from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.core import EngineCore
from pagelab.engine.replay import RealClock, VirtualClock, demand_of, replay, sampling_of
from pagelab.errors import ConfigError
from pagelab.results import WorkloadRun
from pagelab.sim.cost_model import UNIT
from pagelab.sim.runner import CostModelRunner
from pagelab.sim.simulator import MAX_OUTPUT_TOKENS, make_core, simulate
from pagelab.workloads import Workload, WorkloadRequest

VOCAB = 1000


def request(name: str, prompt: int, output: int, arrival: float = 0.0, **more: Any) -> Any:
    ids = tuple((ord(name[0]) * 31 + i) % VOCAB for i in range(prompt))
    return WorkloadRequest(
        id=name, prompt_token_ids=ids, max_tokens=output, arrival_s=arrival, **more
    )


def engine(allocator: str = "paged", num_blocks: int = 16) -> tuple[EngineCore, VirtualClock]:
    clock = VirtualClock()
    memory = MemoryConfig(
        num_blocks=num_blocks,
        block_size=4,
        max_model_len=32,
        allocator=allocator,
        watermark=0.0,
        check_invariants=True,
    )
    runner = CostModelRunner(UNIT, clock, VOCAB)
    return make_core(runner, clock, memory, SchedulerConfig(), VOCAB, None), clock


def serve(*requests: Any, allocator: str = "paged", **options: Any) -> WorkloadRun:
    core, clock = engine(allocator)
    workload = Workload("test", "a test", requests)
    return replay(core, workload, clock, bytes_per_token=2, **options)


def test_a_request_is_added_at_the_end_of_the_step_in_which_it_arrives() -> None:
    run = serve(request("a", 4, 5), request("b", 4, 2, 0.5), request("c", 4, 2, 2.0))
    first = [r["first_scheduled_s"] for r in run["requests"]]
    assert first == [0.0, 1.0, 2.0]  # c arrives exactly at a step's end, and is in time for it
    assert [r["first_token_s"] for r in run["requests"]] == [1.0, 2.0, 3.0]
    assert run["steps"]["running"] == [1, 2, 2, 1, 0]


def test_while_nothing_runs_the_clock_jumps_to_the_next_arrival() -> None:
    run = serve(request("a", 4, 1), request("b", 4, 1, 50.25), request("c", 4, 1, 50.5))
    assert run["steps"]["t"] == [1.0, 51.25, 52.25]
    assert run["requests"][2]["first_scheduled_s"] == 51.25
    assert run["duration_s"] == 52.25


def test_a_record_does_not_depend_on_when_the_clock_began() -> None:
    work = (request("a", 7, 3), request("b", 5, 4, 1.5))
    core, clock = engine()
    clock.advance(1000.0)
    late = replay(core, Workload("test", "a test", work), clock, bytes_per_token=2)
    assert late["steps"] == serve(*work)["steps"]


def test_a_request_ends_after_its_own_tokens_whatever_its_client_asked() -> None:
    asked = request("a", 4, 3, asked_tokens=20)
    run = serve(asked, allocator="reserved-paged")
    assert len(run["requests"][0]["output_token_ids"]) == 3
    # 24 slots are reserved for what was asked: 4 written at first, 6 in the end
    assert run["steps"]["live"] == [4, 5, 0]
    assert run["steps"]["reserved"] == [2, 1, 0]
    assert run["steps"]["internal"] == [18, 18, 0]
    oracle = serve(asked, allocator="contiguous-oracle")
    assert oracle["steps"]["live"][0] + oracle["steps"]["reserved"][0] == 6
    assert sampling_of(asked, 0.7, 3).max_tokens == 20
    assert demand_of(asked, 32) == (4, 7, 7, 24, 32)


def test_a_request_that_cannot_be_served_is_an_error_and_the_rest_goes_on() -> None:
    run = serve(request("a", 30, 10), request("b", 4, 2))
    bad, good = run["requests"]
    assert bad["finish_reason"] == "error"
    assert "max_model_len" in bad["error"]
    assert good["finish_reason"] == "length"
    assert run["output_tokens"] == 2


def test_preemptions_are_recorded_at_the_step_that_made_them() -> None:
    core, clock = engine(num_blocks=6)
    work = Workload("test", "a test", (request("a", 8, 12), request("b", 8, 12)))
    run = replay(core, work, clock, bytes_per_token=1)
    assert run["num_preemptions"] == len(run["preemptions"]) > 0
    first = run["preemptions"][0]
    assert first["request"] == "b"
    assert run["steps"]["running"][first["step"] - 1] == 2
    assert run["steps"]["running"][first["step"]] == 1
    assert run["recomputed_tokens"] == sum(r["recomputed_tokens"] for r in run["requests"]) > 0


def test_stages_and_progress_are_told() -> None:
    stages: list[tuple[str, int, int]] = []
    progress: list[tuple[str, int, int]] = []

    def on_stage(label: str, *, kv_allocated_bytes: int = 0, kv_live_bytes: int = 0) -> None:
        stages.append((label, kv_allocated_bytes, kv_live_bytes))

    serve(
        request("a", 4, 2),
        request("b", 6, 3),
        on_stage=on_stage,
        on_progress=lambda *news: progress.append(news),
    )
    assert stages == [
        ("test: request 1 done", 2 * (4 + 8), 2 * (4 + 6)),
        ("test: request 2 done", 2 * 8, 2 * 7),
        ("test: batch complete", 0, 0),
    ]
    assert progress == [("test", 2, 5), ("test", 4, 5), ("test", 5, 5)]


def test_the_engines_hook_is_free_again_afterwards_even_after_an_error() -> None:
    core, clock = engine()

    def broken(*_: object) -> None:
        raise RuntimeError("the watcher broke")

    work = Workload("test", "a test", (request("a", 4, 2),))
    with pytest.raises(RuntimeError, match="watcher broke"):
        replay(core, work, clock, bytes_per_token=1, on_progress=broken)
    assert core.on_step is None


def test_a_virtual_clock_never_goes_back() -> None:
    clock = VirtualClock()
    clock.advance(3.0)
    clock.wait_until(1.0)
    assert clock() == 3.0
    clock.wait_until(4.5)
    assert clock() == 4.5


def test_a_real_clock_waits() -> None:
    clock = RealClock()
    until = clock() + 0.02
    clock.wait_until(until)
    assert until <= clock() < until + 5.0
    clock.wait_until(until - 1.0)


def test_what_is_too_large_to_write_down_is_refused() -> None:
    work = Workload("huge", "a test", (request("a", 4, MAX_OUTPUT_TOKENS + 1),))
    with pytest.raises(ConfigError, match="--requests"):
        simulate(work, MemoryConfig(num_blocks=4), cost=UNIT, vocab_size=VOCAB)

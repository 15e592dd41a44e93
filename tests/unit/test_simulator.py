"""The simulator: the engine's own record in virtual time, decision by decision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pagelab.cli import main
from pagelab.config import MemoryConfig, SchedulerConfig
from pagelab.engine.replay import VirtualClock, replay
from pagelab.errors import ConfigError
from pagelab.lab import calibrate as calibration
from pagelab.lab.calibrate import (
    Load,
    Measured,
    calibration_path,
    fit,
    non_negative_least_squares,
)
from pagelab.lab.simulated import find_cost_model
from pagelab.memory.allocators import ALLOCATORS
from pagelab.models.shape_source import load_shape
from pagelab.sim.cost_model import KNOTS, UNIT, CostModel, StepFeatures
from pagelab.sim.reproduce import BLOCK_SIZE, FIGURES, fig2, saved_share
from pagelab.sim.runner import CostModelRunner
from pagelab.sim.simulator import make_core, repeat, simulate
from pagelab.sim.stream import simulate_stream
from pagelab.workloads import RequestShape, ShapeOptions, load_workload, open_shapes, random_ids
from tests.support.tiny_models import tiny_model

LOAD = random_ids(
    load_workload("uniform:in=4..60,out=4..40,n=24", 3, ShapeOptions(rate="poisson:0.3")), 500
)
SCHEDULING = SchedulerConfig(max_num_batched_tokens=48)


def memory(allocator: str, **changes: Any) -> MemoryConfig:
    fields: dict[str, Any] = {
        "num_blocks": 32,
        "block_size": 8,
        "max_model_len": 100,
        "allocator": allocator,
        "watermark": 0.0,
        "check_invariants": True,
    }
    return MemoryConfig(**(fields | changes))


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_repeated_run_makes_the_same_decisions_step_by_step(allocator: str) -> None:
    first = simulate(LOAD, memory(allocator), SCHEDULING, cost=UNIT, vocab_size=500)
    again = repeat(LOAD, first, memory(allocator), SCHEDULING, vocab_size=500)
    assert again["steps"] == first["steps"]
    assert again["block_events"] == first["block_events"]
    assert again["preemptions"] == first["preemptions"]
    if allocator == "paged":
        assert first["preemptions"], "the load must fill the pool"


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_stream_gives_the_means_of_the_record_of_every_step(allocator: str) -> None:
    shapes = [RequestShape(len(r.token_ids), r.max_tokens, r.arrival_s) for r in LOAD.requests]
    config = memory(allocator, prefix_caching=False)
    full = simulate(LOAD, config, SCHEDULING, cost=UNIT, vocab_size=500)
    means = simulate_stream(shapes, config, SCHEDULING, cost=UNIT)
    assert means.requests == len(LOAD.requests)
    assert means.duration_s == pytest.approx(full["duration_s"])
    assert means.preemptions == full["num_preemptions"]
    assert means.recomputed_tokens == full["recomputed_tokens"]
    assert means.mean_running == pytest.approx(full["ledger"]["mean_running"])
    for state in ("live", "reserved", "internal", "free", "external", "rounding"):
        expected = full["ledger"][state]
        assert getattr(means.ledger, state) == pytest.approx(expected, abs=1e-6), state
    ttft = [r["first_token_s"] - r["arrival_s"] for r in full["requests"]]
    assert means.ttft.mean == pytest.approx(sum(ttft) / len(ttft), rel=0.01)


def test_time_is_what_the_cost_model_says() -> None:
    clock = VirtualClock()
    cost = CostModel(name="priced", constant=0.5, per_kv_token=0.001)
    runner = CostModelRunner(cost, clock, 500)
    core = make_core(runner, clock, memory("paged"), SCHEDULING, 500, None)
    workload = random_ids(load_workload("uniform:in=5..5,out=3..3,n=1"), 500)
    run = replay(core, workload, clock, bytes_per_token=1)
    # K/V read: 5 for the prompt, then 6 and 7
    assert run["steps"]["t"] == pytest.approx([0.505, 1.011, 1.518])


def test_calibration_finds_the_prices_that_made_the_times() -> None:
    truth = CostModel(
        name="truth",
        constant=0.02,
        knots=(16.0,),
        slopes=(0.001,),
        per_sample=0.0003,
        per_kv_token=2e-6,
        per_pair=1e-7,
    )
    steps = [
        StepFeatures(tokens, sequences, sequences, tokens + context, pairs)
        for tokens in (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 300, 500)
        for sequences in (1, min(tokens, 7))
        for context in (10, 400, 3000)
        for pairs in (0, 5000)
    ]
    found = fit(Measured(steps, [truth.seconds(s) for s in steps]))
    for step in (StepFeatures(20, 20, 20, 900, 0), StepFeatures(200, 3, 1, 700, 9000)):
        assert found.seconds(step) == pytest.approx(truth.seconds(step), rel=0.03)
    assert found.provenance["held_out_mean_relative_error"] < 0.03
    assert found.knots == tuple(float(k) for k in KNOTS)


def test_least_squares_never_gives_a_negative_price() -> None:
    import numpy as np

    design = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    x = non_negative_least_squares(design, np.array([3.0, 2.0, 1.0]))  # a falling line
    assert x.min() >= 0
    assert x[1] == 0
    assert x[0] == pytest.approx(2.0)


def test_a_cost_model_survives_its_file_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    model = CostModel(name="x", constant=1.0, knots=(0.0, 8.0), slopes=(0.1, 0.2))
    model.save(path)
    assert CostModel.load(path) == model
    path.write_text(json.dumps(json.loads(path.read_text()) | {"constant": -1}))
    with pytest.raises(ConfigError, match="not negative"):
        CostModel.load(path)
    with pytest.raises(ConfigError, match="--cost-model"):
        CostModel.load(tmp_path / "none.json")


def test_the_papers_memory_figures_are_reproduced_within_the_bounds() -> None:
    found = fig2()
    claimed = [item for item in found.comparisons if item.within is not None]
    assert len(claimed) == 15
    assert [item for item in claimed if not item.within] == []


def test_the_share_that_samples_save_is_the_formula_of_the_design() -> None:
    lengths = [RequestShape(BLOCK_SIZE * 2, 32)]
    # shared 32 slots of 32 + 16 - 0.5 + 7.5 a sample
    assert saved_share(lengths, 2) == pytest.approx(0.5 * 32 / 55)
    assert set(FIGURES) == {"fig2", "fig13", "fig15"}


class TestCommand:
    def run(self, *words: str) -> Any:
        return CliRunner().invoke(main, ["simulate", "--cost-model", "unit", *words])

    def test_prints_a_row_for_every_combination(self) -> None:
        result = self.run(
            "--model",
            "gpt2",
            "--workload",
            "mixed",
            "--block-size",
            "8,16",
            "--json",
            "--allocators",
            ",".join(ALLOCATORS),
        )
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        assert len(rows) == 10
        assert all(row["simulated"] and row["requests"] == 24 for row in rows)

    def test_a_roofline_is_faster_on_a_faster_card(self) -> None:
        def rate(card: str) -> float:
            words: tuple[str, ...] = (
                "--model",
                "llama-3.1-8b",
                "--workload",
                "mixed",
                "--json",
                "--dtype",
            )
            words += ("bfloat16", "--allocators", "paged", "--kv-memory", "4GiB")
            result = CliRunner().invoke(
                main, ["simulate", "--cost-model", f"roofline:{card}", *words]
            )
            assert result.exit_code == 0, result.output
            return float(json.loads(result.stdout)[0]["output_tokens_per_s"])

        assert rate("h100") > 2 * rate("l4")

    def test_an_unknown_cost_model_is_one_line(self) -> None:
        result = CliRunner().invoke(main, ["simulate", "--cost-model", "nothing.json"])
        assert result.exit_code == 1
        assert "nothing.json" in result.output

    def test_prefixes_of_a_trace_are_found(self, tmp_path: Path) -> None:
        path = tmp_path / "shared.jsonl"
        lines = [
            {"arrival_s": i, "input_tokens": 1024, "output_tokens": 4, "hash_ids": [0, i % 2]}
            for i in range(6)
        ]
        path.write_text("\n".join(json.dumps(line) for line in lines))
        words: tuple[str, ...] = (
            "--model",
            "gpt2",
            "--workload",
            str(path),
            "--allocators",
            "paged",
            "--json",
        )
        words += ("--max-model-len", "1024", "--too-long", "clip", "--kv-memory", "256MiB")
        found = json.loads(self.run(*words).stdout)[0]
        without = json.loads(self.run(*words, "--no-prefix-cache").stdout)[0]
        assert found["cached_tokens"] > 2000
        assert without["cached_tokens"] == 0

    def test_a_small_run_is_written_like_a_measured_one(self, tmp_path: Path) -> None:
        folder = tiny_model("llama")
        out = tmp_path / "out"
        result = self.run(
            "--model",
            str(folder),
            "--workload",
            "uniform:n=6,in=4..9,out=3..6",
            "--max-model-len",
            "64",
            "--kv-memory",
            "64KiB",
            "--out",
            str(out),
        )
        assert result.exit_code == 0, result.output
        assert (out / "report.html").stat().st_size > 100_000
        data = json.loads((out / "results.json").read_text())
        assert data["experiment"]["cost_model"] == "unit"
        assert all(run["simulated"] for run in data["runs"])
        assert (out / "ledger.jsonl").read_text().count("\n") > 5


def test_streams_are_read_lazily() -> None:
    stream = open_shapes("uniform:in=4..9,out=2..4,n=50")
    means = simulate_stream(stream, memory("paged", prefix_caching=False), SCHEDULING, cost=UNIT)
    assert means.requests == 50


def test_a_calibration_is_found_again_under_every_way_to_name_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGELAB_CACHE", str(tmp_path))
    for model in (None, "smollm2", str(tiny_model("llama"))):
        shape = load_shape(model)
        with pytest.raises(ConfigError, match="pagelab calibrate"):
            find_cost_model(None, shape, "float32")
        path = calibration_path(shape.name, "float32")
        CostModel(name="kept", constant=1.0).save(path)
        assert find_cost_model(None, load_shape(model), "float32").name == "kept"
        path.unlink()


def test_calibrate_keeps_its_prices_where_simulate_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGELAB_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "LOADS", (Load(1, 8, 12), Load(3, 8, 12)))
    folder = str(tiny_model("llama"))
    calibrated = CliRunner().invoke(main, ["calibrate", "--model", folder, "--threads", "1"])
    assert calibrated.exit_code == 0, calibrated.output
    words = ["--model", folder, "--workload", "uniform:n=4,in=4..9,out=3..6"]
    words += ["--max-model-len", "64", "--allocators", "paged"]
    result = CliRunner().invoke(main, ["simulate", *words])
    assert result.exit_code == 0, result.output
    assert "calibrated" in result.output
    out = tmp_path / "out"
    result = CliRunner().invoke(
        main, ["simulate", *words, "--out", str(out), "--max-num-seqs", "2", "--no-prefix-cache"]
    )
    assert result.exit_code == 0, result.output
    [run] = json.loads((out / "results.json").read_text())["runs"]
    assert max(run["workloads"][0]["steps"]["running"]) <= 2
    assert run["workloads"][0]["prefix_queries"] == 0

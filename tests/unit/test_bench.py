"""Benchmarks of a tiny model: what is counted, recorded, profiled and refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from pagelab.bench.latency import bench_latency
from pagelab.bench.profile import Operation, StepProfile, part_of
from pagelab.bench.record import save_csv, save_json
from pagelab.bench.run import OnTokens, WorkloadRunner, run_workload
from pagelab.bench.settings import BenchSettings, EngineChoice
from pagelab.bench.tables import print_record, seconds
from pagelab.bench.throughput import bench_throughput
from pagelab.bench.workloads import WorkloadChoice, build_workload
from pagelab.cli import main
from pagelab.errors import ConfigError, RequestTooLongError, StepError
from tests.support.engines import toy_engine
from tests.support.tiny_models import tiny_model

SMALL = WorkloadChoice(num_requests=3, input_len=9, output_len=6)


@contextlib.contextmanager
def quiet(name: str, total: int) -> Iterator[OnTokens]:
    yield lambda done: None


def settings(**fields: Any) -> BenchSettings:
    engine = EngineChoice(
        model=str(tiny_model("llama")),
        device="cpu",
        dtype="float32",
        kv_memory="4MiB",
        **fields.pop("engine", {}),
    )
    defaults: dict[str, Any] = {"workload": SMALL, "limits": False, "repeats": 2}
    return BenchSettings(engine=engine, **(defaults | fields))


def toy_workload(requests: int = 3, tokens_in: int = 5, tokens_out: int = 4) -> Any:
    choice = WorkloadChoice(num_requests=requests, input_len=tokens_in, output_len=tokens_out)
    return build_workload(choice, vocab_size=50, max_model_len=32, seed=0)


def test_throughput_counts_every_token_of_every_repeat() -> None:
    stages: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def stage(name: str, total: int) -> Iterator[OnTokens]:
        stages.append((name, total))
        yield lambda done: None

    record = bench_throughput(settings(), stage, "pagelab bench throughput …")
    assert stages == [
        ("loading", 0),
        ("warm-up 1 of 1", 18),
        ("repeat 1 of 2", 18),
        ("repeat 2 of 2", 18),
    ]
    assert record["command"] == "pagelab bench throughput …"
    assert record["workload"]["lengths"] == [[9, 6]] * 3
    assert len(record["startup"]["warmup_s"]) == 1
    assert record["memory"]["peak_rss_bytes"] > 1 << 20
    for repeat in record["repeats"]:
        assert repeat["output_tokens"] == 18
        assert repeat["total_tokens_per_s"] == pytest.approx(45 / repeat["duration_s"])
        assert repeat["cached_tokens"] == 0  # although the same prompts came before
        assert repeat["preemptions"] == 0
        assert repeat["times_reference"] is None
    times = sorted(repeat["duration_s"] for repeat in record["repeats"])
    assert record["summary"]["duration_s"]["median"] == pytest.approx(sum(times) / 2)
    assert record["engine"]["prefix_caching"] is False
    json.dumps(record)


def test_prefix_caching_is_seen_when_it_is_asked_for() -> None:
    workload = WorkloadChoice(num_requests=2, input_len=40, output_len=2)
    asked = settings(engine={"prefix_caching": True}, workload=workload, repeats=1)
    record = bench_throughput(asked, quiet)
    assert record["repeats"][0]["cached_tokens"] == 64  # two blocks of each prompt


def test_the_reference_stands_beside_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagelab.bench.ceilings._SECONDS", 0.0)
    monkeypatch.setattr("pagelab.bench.ceilings._CPU_BYTES", 1 << 20)
    monkeypatch.setattr("pagelab.bench.ceilings._CPU_SIZE", 64)
    record = bench_throughput(settings(limits=True, repeats=1), quiet)
    (repeat,) = record["repeats"]
    total = record["reference"]["total_s"]
    assert repeat["times_reference"] == pytest.approx(repeat["duration_s"] / total)
    over_time = WorkloadChoice(num_requests=2, input_len=9, output_len=3, rate="1000")
    record = bench_latency(settings(limits=True, repeats=1, workload=over_time), quiet)
    assert record["ceilings"] is not None
    assert record["reference"] is None  # arrivals decide how long it takes


def test_one_request_after_another_never_shares_a_step() -> None:
    core, runner = toy_engine(num_blocks=64)
    run = run_workload(core, toy_workload(), concurrency=1)
    assert all(len(batch.sequences) == 1 for batch in runner.batches)
    assert run.steps == 12
    ends = [request["finish_s"] for request in run.requests]
    arrivals = [request["arrival_s"] for request in run.requests]
    assert all(arrival >= end for end, arrival in zip(ends, arrivals[1:], strict=False))


def test_all_at_once_share_steps_and_arrive_at_zero() -> None:
    core, runner = toy_engine(num_blocks=64)
    run = run_workload(core, toy_workload())
    assert run.steps == 4
    assert [len(batch.sequences) for batch in runner.batches] == [3, 3, 3, 3]
    assert {request["arrival_s"] for request in run.requests} == {0.0}
    latencies = run.latencies()
    assert latencies["ttft"]["p50"] <= latencies["e2e"]["p50"]
    assert set(latencies["itl"]) == {"mean", "p50", "p90", "p95", "p99"}


def test_preemptions_are_counted() -> None:
    core, _ = toy_engine(num_blocks=4, block_size=4, budget=32)
    run = run_workload(core, toy_workload(2, 5, 6))
    assert run.preemptions > 0
    assert run.recomputed_tokens > 0
    assert run.output_tokens == 12


def test_what_never_fits_is_refused_and_the_engine_goes_on() -> None:
    core, _ = toy_engine(num_blocks=2)
    with pytest.raises(RequestTooLongError, match="raise --kv-memory"):
        run_workload(core, toy_workload(2, 5, 4))
    assert not core.has_unfinished_requests
    assert run_workload(core, toy_workload(2, 4, 2)).output_tokens == 4


def test_a_failed_request_is_an_error() -> None:
    core, runner = toy_engine(num_blocks=64)

    def broken(batch: object) -> None:
        raise RuntimeError("no such kernel")

    runner.submit = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(StepError, match="no such kernel"):
        run_workload(core, toy_workload())


def test_latency_is_of_one_request_at_a_time_by_default() -> None:
    record = bench_latency(settings(repeats=1), quiet)
    assert record["settings"]["concurrency"] == 1
    assert record["repeats"][0]["steps"] == 18
    out = io.StringIO()
    print_record(record, Console(file=out, width=100))
    assert "first token (TTFT)" in out.getvalue()


@pytest.mark.parametrize("attention", ["cpu", "auto"])
def test_a_profile_is_a_trace_and_sums_by_part(tmp_path: Path, attention: str) -> None:
    path = tmp_path / "trace.json"
    record = bench_throughput(
        settings(repeats=1, profile=path, engine={"attention": attention}), quiet
    )
    trace = json.loads(path.read_text())
    if attention == "cpu":  # the extension is no part of torch's trace: it counts its own time
        assert any("linear" in event.get("name", "") for event in trace["traceEvents"])
    profile = record["profile"]
    assert (profile["steps"], profile["of"]) == (3, "operations")
    parts = {part["name"]: part for part in profile["parts"]}
    assert {"linear", "attention", "norm", "idle"} <= parts.keys()
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0, abs=0.01)
    out = io.StringIO()
    print_record(record, Console(file=out, width=100))
    assert "longest operations of a step" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("paged_attention_kernel", "attention"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "linear"),
        ("mkldnn::_linear_pointwise", "linear"),
        ("aten::mm", "linear"),
        ("aten::rms_norm", "norm"),
        ("_fused_add_rms_norm_kernel", "norm"),
        ("reduce_kernel<ArgMaxOps>", "sampling"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("aten::mul", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(name: str, part: str) -> None:
    assert part_of(name) == part


def test_what_no_operation_accounts_for_is_idle() -> None:
    operations = (Operation("aten::mm", 0.3, 6), Operation("aten::mul", 0.2, 4))
    profile = StepProfile(
        steps=2, first=0, seconds=1.0, of="operations", operations=operations, trace="t.json"
    )
    assert profile.parts == [
        Operation("linear", 0.3, 6),
        Operation("other", 0.2, 4),
        Operation("idle", 0.5, 0),
    ]


def test_json_and_csv_are_written(tmp_path: Path) -> None:
    record = bench_throughput(settings(), quiet, "the command")
    save_json(record, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["summary"] == record["summary"]
    save_csv(record, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["repeat"] for row in rows] == ["1", "2"]
    assert float(rows[0]["duration_s"]) == record["repeats"][0]["duration_s"]
    assert float(rows[0]["itl_p99_s"]) == record["repeats"][0]["latency_s"]["itl"]["p99"]


def test_a_runner_that_is_left_early_leaves_an_idle_engine() -> None:
    core, _ = toy_engine(num_blocks=64)
    runner = WorkloadRunner(core, toy_workload())
    runner.step()
    runner.cancel()
    assert runner.finished
    assert run_workload(core, toy_workload()).output_tokens == 12


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1,234 s"),
        (12.34, "12.3 s"),
        (0.944, "944 ms"),
        (9.44e-4, "944 us"),
        (0, "0.00 us"),
    ],
)
def test_times_have_three_digits(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": -1}, "--warmup must be at least 0"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"concurrency": 0}, "--concurrency must be at least 1"),
        ({"temperature": float("nan")}, "--temperature"),
    ],
)
def test_settings_that_cannot_work_name_their_option(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**fields)


def test_the_command_prints_tables_and_writes_files(tmp_path: Path) -> None:
    words = ["bench", "throughput", "--model", str(tiny_model("gpt2")), "--random-weights"]
    words += ["--device", "cpu", "--kv-memory", "4MiB", "--no-limits", "--repeats", "1"]
    words += ["--json", str(tmp_path / "new" / "a.json"), "--csv", str(tmp_path / "a.csv")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "output tokens/s" in done.output
    assert "prompts4" in done.output
    record = json.loads((tmp_path / "new" / "a.json").read_text())
    assert record["engine"]["random_weights"] is True
    assert (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["throughput", "--kv-memory", "lots"], "--kv-memory: not a size"),
        (["throughput", "--workload", "best"], "no workload 'best'"),
        (["throughput", "--max-model-len", "9999"], "lower --max-model-len"),
        (["throughput", "--model", "opt-13b", "--random-weights"], "PageLab has llama"),
        (["throughput", "--json", "/dev/null/x"], "no folder for /dev/null/x"),
        (["latency", "--rate", "4", "--concurrency", "3"], "leave --concurrency out"),
    ],
)
def test_what_cannot_work_is_one_clear_line(words: list[str], message: str) -> None:
    if "--model" not in words:
        words = [*words, "--model", str(tiny_model("llama"))]
    done = CliRunner().invoke(main, ["bench", *words])
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1

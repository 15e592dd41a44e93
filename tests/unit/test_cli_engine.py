"""Options of an engine on the command line: what reaches `LLM`, and what is shown of it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from pagelab.attention.select import BACKENDS, why_no_triton_on
from pagelab.bench.settings import EngineChoice
from pagelab.cli import main
from pagelab.cli.options import ENGINE_NAMES
from pagelab.engine.llm import LLM
from pagelab.lab.check import attention_backend, environment_rows, render_check
from pagelab.memory.budget import MemoryBudget
from pagelab.telemetry import describe_environment
from tests.support.tiny_models import tiny_model


def pagelab(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def generated(*arguments: str) -> Result:
    model = ("--model", str(tiny_model("llama")), "--device", "cpu", "--max-tokens", "3")
    return pagelab("generate", "abc", *model, *arguments)


def test_every_option_is_a_keyword_of_the_engine_and_a_field_of_a_benchmark() -> None:
    keywords = set(inspect.signature(LLM.__init__).parameters)
    assert set(ENGINE_NAMES) <= keywords
    assert set(ENGINE_NAMES) <= set(EngineChoice.__dataclass_fields__)
    for command in ("generate", "serve", "bench throughput", "bench latency"):
        text = pagelab(*command.split(), "--help").output
        for name in ENGINE_NAMES:
            assert f"--{name.replace('_', '-')}" in text
        assert "--no-cuda-graphs" in text
        assert all(backend in text for backend in BACKENDS)


def test_a_server_without_its_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = pagelab("serve")
    assert done.exit_code == 1
    assert "pip install 'pagelab[server]'" in done.output


def test_what_is_given_reaches_the_engine_and_the_rest_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {}

    def note(self: LLM, model: str | None, **options: Any) -> None:
        found.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "__init__", note)
    generated()
    assert found == {
        "device": "cpu",
        "dtype": "auto",
        "block_size": 16,
        "cuda_graphs": True,
        "batch_invariant": False,
        "attention": "auto",
        "kv_cache_dtype": "auto",
        "allocator": "paged",
    }
    generated(
        "--gpu-memory-utilization=85%",
        "--max-num-batched-tokens=4096",
        "--max-num-seqs=8",
        "--max-steps-in-flight=3",
        "--no-cuda-graphs",
        "--attention=triton",
        "--kv-memory=1GiB",
    )
    assert found["gpu_memory_utilization"] == pytest.approx(0.85)
    assert (found["max_num_batched_tokens"], found["max_num_seqs"]) == (4096, 8)
    assert (found["max_steps_in_flight"], found["cuda_graphs"]) == (3, False)
    assert (found["attention"], found["kv_memory"]) == ("triton", 1 << 30)


def test_both_ways_to_size_kv_are_an_error_that_names_them() -> None:
    result = generated("--kv-memory=4MiB", "--gpu-memory-utilization=0.5")
    assert result.exit_code == 1
    assert "--kv-memory and --gpu-memory-utilization both" in result.output
    assert "on a CPU give --kv-memory" in generated("--gpu-memory-utilization=0.5").output
    assert (
        "--gpu-memory-utilization: not a share" in generated("--gpu-memory-utilization=much").output
    )


@pytest.mark.parametrize("option", ["-v", "--explain-memory"])
def test_the_memory_is_explained_beside_the_text(option: str) -> None:
    plain, explained = generated("--kv-memory=4MiB"), generated("--kv-memory=4MiB", option)
    assert explained.exit_code == plain.exit_code == 0
    assert explained.stdout == plain.stdout
    for row in ("total", "in use before", "weights", "activations", "graphs", "K/V", "left free"):
        assert row in explained.stderr
    assert "512 blocks, 8,192 tokens," in explained.stderr
    assert "left free" not in plain.stderr


def test_a_benchmark_s_record_and_report_have_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    result = pagelab(
        *("bench", "throughput", "--model", str(tiny_model("llama")), "--device", "cpu"),
        *("--num-requests", "1", "--input-len", "4", "--output-len", "2", "--no-limits"),
        *("--kv-memory", "4MiB", "--warmup", "0", "--repeats", "1", "--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    budget = MemoryBudget(**record["memory_budget"])
    assert budget.num_blocks == record["engine"]["num_blocks"] == 512
    assert record["engine"]["cuda_graphs"] is True
    assert "in use before" in result.stdout
    assert f"{budget.weight_bytes:,}" in result.stdout


def on_a_card(capability: list[int] | None) -> dict[str, Any]:
    card = {
        "index": 0,
        "name": "Card",
        "memory_total_bytes": 80 << 30,
        "memory_free_bytes": 79 << 30,
        "compute_capability": capability,
    }
    torch = {"version": "2.13.0", "build": "cu130", "cuda": "13.0", "cuda_available": True}
    return describe_environment() | {"gpus": [card], "torch": torch}


def test_check_says_which_attention_is_taken_and_why_not_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new, old = on_a_card([9, 0]), on_a_card([7, 5])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert attention_backend(new)[1:] == (True, "--attention auto takes triton")
    runs, why = attention_backend(old)[1:]
    assert not runs
    assert why == (
        "--attention auto takes cpu: this GPU has compute capability 7.5, and it needs 8.0"
    )
    without = old | {"gpus": []}
    assert attention_backend(without).why.endswith("no NVIDIA driver or GPU found")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "triton is not installed" in attention_backend(new).why
    assert "not installed" in str(why_no_triton_on((9, 0)))


def test_check_shows_the_compute_capability_of_each_card() -> None:
    rows = dict(environment_rows(on_a_card([8, 9])))
    assert rows["GPU 0"] == "Card: 79.0 GiB free of 80.0 GiB, compute capability 8.9"
    assert "capability" not in dict(environment_rows(on_a_card(None)))["GPU 0"]
    environment = on_a_card([8, 9])
    environment["runs"] = [attention_backend(environment)._asdict()]
    console = Console(record=True, width=120)
    render_check(environment, console)
    assert "attention triton" in console.export_text()

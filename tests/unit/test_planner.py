"""`pagelab plan`: what fits, against the engine itself, vLLM's figures and brute force."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pagelab.cli.plan import plan as plan_command
from pagelab.config import parse_bytes
from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.models.kv_geometry import page_layout
from pagelab.models.shape_source import built_in_shape, load_shape
from pagelab.sim.planner import MemoryPlan, PlanSettings, graph_sizes, plan_memory
from pagelab.sim.planner_cards import CARDS, find_card, parse_bandwidth
from pagelab.sim.planner_explain import explain_memory
from tests.support.tiny_models import tiny_gguf, tiny_model

GIB = 1 << 30


def planned(model: str = "gpt2", **settings: Any) -> MemoryPlan:
    return plan_memory(built_in_shape(model), PlanSettings(**{"kv_memory": GIB} | settings))


# What vLLM printed, and what the engine makes


def test_gpt2_in_18_10_gib_is_what_vllm_printed_as_far_as_rounding_allows() -> None:
    def gpt2(kv_memory: str) -> MemoryPlan:
        return planned(kv_memory=parse_bytes(kv_memory), max_model_len=512)

    found = gpt2("18.10GiB")
    assert (found.num_pages, found.tokens) == (32_950, 527_200)
    assert f"{found.full_requests:,.2f}" == "1,029.69"
    assert gpt2("18.095GiB").tokens <= 527_328 <= gpt2("18.105GiB").tokens
    exact = gpt2("18.1044GiB")
    assert (exact.tokens, f"{exact.full_requests:.2f}x") == (527_328, "1029.94x")


ENGINE_CONFIGS = [
    ("llama", "float32", 16, "256KiB"),
    ("llama", "bfloat16", 1, "100000"),
    ("llama3", "float16", 7, "123457"),
    ("llama-bias", "float32", 64, "1MiB"),
    ("mistral", "bfloat16", 16, "333KiB"),
    ("qwen2", "float16", 3, "77777"),
    ("qwen2", "float32", 128, "2MiB"),
    ("qwen3", "bfloat16", 32, "999999"),
    ("gpt2", "float32", 16, "512KiB"),
    ("gpt2", "bfloat16", 5, "65537"),
]


@pytest.mark.parametrize(("name", "dtype", "block_size", "kv_memory"), ENGINE_CONFIGS)
def test_the_planned_pool_is_the_engine_s(
    name: str, dtype: str, block_size: int, kv_memory: str
) -> None:
    model = str(tiny_model(name))
    sizes: dict[str, Any] = {"dtype": dtype, "block_size": block_size}
    llm = LLM(model, kv_memory=kv_memory, device="cpu", **sizes)
    found = plan_memory(load_shape(model), PlanSettings(kv_memory=parse_bytes(kv_memory), **sizes))
    assert found.num_pages == llm.core.kv.config.num_blocks == llm.core.kv.pool.num_blocks
    assert found.max_model_len == llm.core.kv.config.max_model_len
    assert found.shape.parameters.total == llm.spec.num_parameters


def test_a_gguf_s_pool_is_the_engine_s() -> None:
    model = str(tiny_gguf("llama"))
    llm = LLM(model, kv_memory="300KiB", device="cpu", dtype="float32")
    settings = PlanSettings(kv_memory=parse_bytes("300KiB"), dtype="float32")
    assert plan_memory(load_shape(model), settings).num_pages == llm.core.kv.pool.num_blocks


# Budgets


def test_kv_takes_what_the_card_s_share_leaves() -> None:
    found = planned("llama-3.1-8b", kv_memory=None, gpu_memory=24 * GIB, max_model_len=8192)
    assert found.weight_bytes == 2 * 8_030_261_248
    assert found.total_bytes == int(24 * GIB * 0.9)
    assert found.num_pages == found.kv_bytes // (16 * 131_072)


def test_given_estimates_replace_ours() -> None:
    found = planned(kv_memory=None, gpu_memory=GIB, activation_memory=5, graph_memory=0)
    assert (found.activation_bytes, found.graph_bytes) == (5, 0)
    assert found.kv_bytes == int(GIB * 0.9) - 248_879_616 - 5


def test_k_v_dtypes_change_k_v_only_and_follow_the_weights_by_default() -> None:
    bfloat16 = planned()
    fp8 = planned(kv_dtype="fp8")
    assert fp8.weight_bytes == bfloat16.weight_bytes
    assert fp8.layout.page_bytes * 2 == bfloat16.layout.page_bytes
    assert planned(dtype="float32").layout.page_bytes == 2 * bfloat16.layout.page_bytes
    assert planned(dtype="int8").layout == bfloat16.layout  # weights of a byte: K/V of two


@pytest.mark.parametrize("model", ["gpt2", "llama-3.1-8b", "gemma-3-27b"])
def test_devices_hold_their_shares_and_copies_of_what_cannot_be_split(model: str) -> None:
    one = planned(model, kv_memory=60 * GIB)
    two = planned(model, kv_memory=60 * GIB, tp=2)
    copied = one.shape.parameters
    extra = 2 * (copied.positions + copied.replicated)  # bytes that both have
    assert abs(2 * two.weight_bytes - (one.weight_bytes + extra)) <= 4 * 8192
    assert two.layout.bytes_per_token * 2 == one.layout.bytes_per_token


def test_more_devices_than_heads_hold_copies_of_them() -> None:
    eight, sixteen = (planned("llama-3.1-70b", tp=tp) for tp in (8, 16))
    assert eight.layout.bytes_per_token == sixteen.layout.bytes_per_token == 2 * 80 * 128 * 2
    assert sixteen.weight_bytes > eight.weight_bytes / 2


def test_windows_bound_what_a_request_takes() -> None:
    found = planned("mistral-7b", kv_memory=8 * GIB)
    assert found.pages_per_full_request == 4096 // 16 + 1
    full = planned("mistral-7b-v0.3", kv_memory=8 * GIB)
    assert full.pages_per_full_request == 32768 // 16
    assert found.num_pages == full.num_pages  # a page is a page


def test_groups_share_one_pool_of_equal_pages() -> None:
    found = planned("gemma-3-27b", kv_memory=10 * GIB, max_model_len=8192)
    assert found.layout.pages_per_block == (5, 26)
    assert found.layout.page_bytes == 2 * 2 * 16 * 128 * 2 * 16  # K and V of two layers' block
    assert found.pages_per_full_request == 512 * 5 + 65 * 26
    assert found.tokens == found.num_pages * 8192 // found.pages_per_full_request


@given(length=st.integers(1, 32768), block=st.integers(1, 64))
def test_a_request_of_several_groups_takes_the_bytes_of_its_parts(length: int, block: int) -> None:
    groups = built_in_shape("gemma-3-270m").groups
    layout = page_layout(groups, "bfloat16", block)
    expected = sum(
        group.blocks(length, block) * block * group.bytes_per_token("bfloat16") for group in groups
    )
    assert layout.pages(length) * layout.page_bytes == expected


@pytest.mark.parametrize(("seqs", "count"), [(1, 1), (3, 2), (4, 3), (8, 4), (256, 35)])
def test_graphs_are_counted_by_batch_size(seqs: int, count: int) -> None:
    sizes = {1, 2, 4, *range(8, seqs + 1, 8)}
    assert graph_sizes(seqs) == sum(size <= seqs for size in sizes) == count


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_memory": None}, "--gpu-memory"),
        ({"tp": 0}, "--tp must be at least 1"),
        ({"tp": 5}, "--tp 5 does not divide the 32 attention heads"),
        ({"block_size": 0}, "--block-size"),
        ({"dtype": "float8"}, "--dtype 'float8'"),
        ({"kv_dtype": "int4"}, "--kv-dtype 'int4'"),
        ({"max_model_len": 131_073}, "--max-model-len 131073"),
        ({"max_model_len": 0}, "--max-model-len 0"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
    ],
)
def test_wrong_settings_are_refused_by_their_option(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        planned("llama-3.1-8b", **settings)


def test_k_v_heads_that_do_not_divide_are_refused() -> None:
    shape = built_in_shape("llama-3.1-8b")
    odd = dataclasses.replace(shape.dimensions, num_heads=36, intermediate_size=36, num_kv_heads=6)
    with pytest.raises(ConfigError, match=r"--tp 4 neither divides the 6 K/V heads"):
        plan_memory(dataclasses.replace(shape, dimensions=odd), PlanSettings(kv_memory=GIB, tp=4))


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    with pytest.raises(InsufficientMemoryError, match=r"weights \(15\.0 GiB\).*--tp"):
        planned("llama-3.1-8b", kv_memory=None, gpu_memory=16 * GIB)
    with pytest.raises(InsufficientMemoryError, match="--kv-memory"):
        planned("llama-3.1-8b", kv_memory=1000)


def test_the_arithmetic_that_is_shown_gives_the_plan() -> None:
    for model in ("gpt2", "gemma-3-270m"):
        found = planned(model, kv_memory=None, gpu_memory=24 * GIB)
        lines = {line.label: line for line in explain_memory(found)}
        for label in ("weights", "K/V", found.unit, "full-length requests"):
            line = lines[label]
            plain = line.expression.replace(",", "").replace("×", "*").replace(" B", "")
            value = eval(plain.replace("floor", "int"))
            shown = float(line.value.partition(" B")[0].replace(",", ""))
            assert value == pytest.approx(shown, abs=1)


# Cards


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "rtx4090"])
def test_cards_are_found_however_they_are_written(name: str) -> None:
    assert find_card(name) == CARDS["rtx-4090"]


def test_an_unknown_card_lists_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--gpu 'h1000'.*h100.*--gpu-memory"):
        find_card("h1000")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("3.35TB/s", 3.35e12), ("936 GB/s", 936e9), ("1GiB/s", 1 << 30), ("2tib/s", 2 << 40)],
)
def test_bandwidths_are_decimal_unless_they_say_otherwise(text: str, rate: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["fast", "0GB/s", "-1TB/s", "", "3.35 T B"])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--bandwidth"):
        parse_bandwidth(text)


# The command


def run(*arguments: str) -> str:
    result = CliRunner().invoke(plan_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_shows_what_fits_and_the_arithmetic_on_demand() -> None:
    options = ("--model", "gpt2", "--kv-memory", "18.10GiB", "--max-model-len", "512")
    text = run(*options)
    for part in ("237.4 MiB", "18.1 GiB", "36,864", "32,950", "527,200", "1,029.69"):
        assert part in text
    assert "floor(" not in text
    assert "blocks = floor(19,434,727,014 / (16 × 36,864)) = 32,950" in run(*options, "--explain")


def test_json_holds_the_figures_of_the_table() -> None:
    data = json.loads(run("--gpu", "h100", "--model", "gemma-3-27b", "--tp", "2", "--json"))
    assert data["unit"] == "pages"
    assert [group["window"] for group in data["model"]["kv_groups"]] == [None, 1024]
    assert data["total_bytes"] == int(CARDS["h100"].memory_bytes * 0.9)
    assert data["bandwidth"] == 3.35e12
    assert data["workload"] is None
    assert any("vision" in note for note in data["notes"])


def test_a_workload_is_planned_by_formula_and_by_simulation(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{i},{20 + i % 60},{10 + i % 40}" for i in range(300)] + ["300,4000,1"]
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    options = ["--model", "gpt2", "--kv-memory", "36MiB", "--max-model-len", "256"]
    options += ["--workload", str(trace), "--bandwidth", "100GB/s"]
    data = json.loads(run(*options, "--json"))
    work = data["workload"]
    assert (work["num_requests"], work["num_dropped"]) == (300, 1)
    for name, found in work["allocators"].items():
        assert found["decode_limit_tokens_per_s"] > 0
        loss = found["difference"]  # ends are counted out of a step; contiguous ones lose holes
        assert -0.02 < loss < (0.6 if name.startswith("contiguous-") else 0.2), name
    text = run(*options, "--no-simulation")
    assert "1 too long and dropped" in text
    assert "a limit, not a promise" in text


def test_windows_are_not_simulated_and_the_reason_is_given() -> None:
    data = json.loads(
        run("--model", "mistral-7b", "--kv-memory", "8GiB", "--workload", "mixed", "--json")
    )
    paged = data["workload"]["allocators"]["paged"]
    assert paged["mean_running_formula"] > 1
    assert paged["mean_running_simulated"] is None
    assert "windows" in paged["why_no_simulation"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--kv-memory", "lots"), "--kv-memory"),
        (("--gpu-memory", "-1GiB"), "--gpu-memory"),
        (("--gpu", "abacus"), "--gpu"),
        (("--kv-memory", "1GiB", "--bandwidth", "fast"), "--bandwidth"),
        (("--kv-memory", "1GiB", "--workload", "nonsense"), "--workload"),
        (("--kv-memory", "1GiB", "--workload", "mixed", "--placement", "best"), "--placement"),
        (("--kv-memory", "1GiB", "--workload", "mixed", "--watermark", "2"), "watermark"),
        (("--kv-memory", "1GiB", "--workload", "mixed", "--max-model-len", "1"), "--max-model-len"),
        ((), "--gpu-memory"),
    ],
)
def test_wrong_options_are_errors_that_name_them(options: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(plan_command, ["--model", "gpt2", *options])
    assert isinstance(result.exception, ConfigError)
    assert named in str(result.exception)

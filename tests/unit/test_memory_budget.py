"""The memory budget: the sum, its errors, and that its figures are what the runner allocates."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pagelab.config import SchedulerConfig
from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError, InsufficientMemoryError
from pagelab.execution import buckets
from pagelab.execution.footprint import (
    GRAPH_BYTES_A_LAYER,
    StepLimits,
    gpu_footprint,
    plain_footprint,
)
from pagelab.execution.kv_cache import KVCache
from pagelab.execution.memory_plan import CPU_KV_MEMORY, measure_device, plan_memory
from pagelab.memory.budget import DeviceMemory, MemoryBudget
from pagelab.memory.budget_table import budget_rows, budget_table
from pagelab.models.decoder import Decoder
from pagelab.models.random_weights import RandomWeights
from pagelab.models.registry import load_spec
from pagelab.models.shape_source import resolve_shape
from pagelab.models.spec import ModelSpec
from tests.support.tiny_models import TINY, tiny_model, tiny_source

GIB = 1 << 30
H100 = DeviceMemory(device="cuda:0", total_bytes=79 * GIB, free_bytes=78 * GIB, num_sms=132)
CPU = DeviceMemory(device="cpu", total_bytes=16 * GIB, free_bytes=9 * GIB)


def spec_of(name: str) -> ModelSpec:
    return load_spec(resolve_shape(name))


def planned(name: str = "qwen3-0.6b", memory: DeviceMemory = H100, **changed: Any) -> MemoryBudget:
    options: dict[str, Any] = {
        "max_model_len": 4096,
        "block_size": 16,
        "kv_memory": None,
        "utilization": None,
        "fused": True,
        "graphs": True,
    }
    steps = {key: changed.pop(key) for key in ("tokens", "seqs") if key in changed}
    scheduling = SchedulerConfig(
        max_num_batched_tokens=steps.get("tokens", 8192), max_num_seqs=steps.get("seqs", 256)
    )
    dtype = changed.pop("dtype", "bfloat16")
    return plan_memory(spec_of(name), dtype, memory, scheduling, **(options | changed))


@pytest.mark.parametrize("name", ["gpt2", "qwen3-0.6b", "llama-3.1-8b"])
@pytest.mark.parametrize("utilization", [None, 0.5, 1.0])
def test_the_rows_add_up_to_the_card_and_a_block_more_would_not_fit(
    name: str, utilization: float | None
) -> None:
    budget = planned(name, max_model_len=1024, utilization=utilization)
    parts = (
        budget.used_before_bytes,
        budget.weight_bytes,
        budget.activation_bytes,
        budget.graph_bytes,
        budget.kv_bytes,
        budget.left_bytes,
    )
    assert sum(parts) == budget.total_bytes
    assert sum(budget.activations.values()) == budget.activation_bytes
    usable = int(78 * GIB * (0.9 if utilization is None else utilization))
    needed = budget.weight_bytes + budget.activation_bytes + budget.graph_bytes
    assert 0 <= usable - needed - budget.kv_bytes < budget.block_bytes
    assert budget.tokens == 16 * budget.num_blocks
    assert budget.full_requests == budget.num_blocks / 64


def test_what_others_hold_is_not_ours_to_use() -> None:
    alone = planned()
    half = planned(memory=dataclasses.replace(H100, free_bytes=40 * GIB))
    assert half.used_before_bytes == 39 * GIB
    assert alone.kv_bytes - half.kv_bytes == pytest.approx(0.9 * 38 * GIB, rel=1e-3)


def test_weights_are_parameters_and_an_untied_head_counts() -> None:
    assert planned("qwen3-0.6b").weight_bytes == 2 * 596_049_920
    assert planned("llama-3.1-8b", dtype="float32").weight_bytes == 4 * 8_030_261_248
    untied = dataclasses.replace(spec_of("qwen3-0.6b"), tied_embeddings=False)
    limits = StepLimits(
        max_num_batched_tokens=512, max_num_seqs=8, max_model_len=512, block_size=16
    )
    more = gpu_footprint(untied, "bfloat16", limits, num_sms=132).weights
    assert more - planned().weight_bytes == 2 * 151_936 * 1024


def test_larger_steps_take_from_kv_what_they_add_to_activations() -> None:
    small, large = planned(tokens=512, seqs=16), planned(tokens=16384, seqs=256)
    for part in ("residual", "logits", "sampling", "largest layer", "state, inputs"):
        assert small.activations[part] < large.activations[part]
    more = large.activation_bytes + large.graph_bytes
    more -= small.activation_bytes + small.graph_bytes
    assert abs(small.kv_bytes - large.kv_bytes - more) < small.block_bytes


def test_graphs_are_counted_by_decode_bucket_and_layer() -> None:
    assert planned(graphs=False).graph_bytes == 0
    few, many = planned(seqs=8, tokens=8192), planned(seqs=256, tokens=8192)
    assert buckets.decode_buckets(8) == 4
    assert buckets.decode_buckets(256) == 15
    assert many.graph_bytes - few.graph_bytes == 11 * 28 * GRAPH_BYTES_A_LAYER


def test_kv_memory_as_given_is_the_pool() -> None:
    budget = planned(kv_memory=8 * GIB)
    assert budget.num_blocks == 8 * GIB // budget.block_bytes
    assert budget.utilization is None
    assert budget.left_bytes > 60 * GIB


def test_kv_memory_and_utilization_exclude_each_other_and_a_cpu_has_none() -> None:
    with pytest.raises(ConfigError, match="--kv-memory and --gpu-memory-utilization both"):
        planned(kv_memory=GIB, utilization=0.9)
    with pytest.raises(ConfigError, match="on a CPU give --kv-memory"):
        planned(memory=CPU, utilization=0.9, fused=False)
    for wrong in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="--gpu-memory-utilization must be above 0"):
            planned(utilization=wrong)


def test_on_a_cpu_it_is_a_gibibyte_whatever_is_free() -> None:
    budget = planned(memory=CPU, fused=False, tokens=512)
    assert budget.num_blocks == CPU_KV_MEMORY // budget.block_bytes
    assert budget.graph_bytes == 0
    none_free = dataclasses.replace(CPU, free_bytes=0)
    assert planned(memory=none_free, fused=False).num_blocks == budget.num_blocks


def test_less_than_one_request_names_figures_and_options() -> None:
    card = dataclasses.replace(H100, total_bytes=24 * GIB, free_bytes=23 * GIB)
    with pytest.raises(InsufficientMemoryError) as caught:
        planned("llama-3.1-8b", card, max_model_len=131_072)
    text = str(caught.value)
    assert "one request of max_model_len = 131,072 tokens needs 16.0 GiB = 17,179,869,184" in text
    assert "24,696,061,952 bytes free" in text
    assert "weights (15.0 GiB = 16,060,522,496 bytes)" in text
    assert "--max-num-batched-tokens" not in text  # that alone would not do
    assert "--dtype" not in text
    fitting = int(text.split("--max-model-len to ")[1].split(",")[0])
    assert planned("llama-3.1-8b", card, max_model_len=fitting).full_requests >= 1
    with pytest.raises(InsufficientMemoryError):
        planned("llama-3.1-8b", card, max_model_len=fitting + 1024)  # tables of blocks shrink too


def test_where_smaller_steps_would_do_that_is_said() -> None:
    card = dataclasses.replace(H100, free_bytes=3 * GIB)
    with pytest.raises(InsufficientMemoryError, match="lower --max-num-batched-tokens or"):
        planned(memory=card, tokens=65536, max_model_len=4096, utilization=1.0)
    assert planned(memory=card, tokens=256, max_model_len=4096, utilization=1.0).num_blocks > 0


def test_weights_that_do_not_fit_say_by_how_much_and_offer_a_smaller_dtype() -> None:
    card = dataclasses.replace(H100, total_bytes=24 * GIB, free_bytes=23 * GIB)
    with pytest.raises(InsufficientMemoryError, match=r"need .* more than that: .*bfloat16"):
        planned("llama-3.1-8b", card, dtype="float32")
    with pytest.raises(InsufficientMemoryError, match=r"raise --gpu-memory-utilization"):
        planned("llama-3.1-8b", card, utilization=0.7)


def test_a_pool_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(InsufficientMemoryError, match=r"lower --kv-memory to .* at most") as caught:
        planned(kv_memory=78 * GIB)
    most = str(caught.value).split("--kv-memory to ")[1]
    exact = int(most.split("= ")[1].split(" bytes")[0].replace(",", ""))
    assert planned(kv_memory=exact).left_bytes < 0  # of the allowance for graphs only
    with pytest.raises(InsufficientMemoryError):
        planned(kv_memory=exact + planned().block_bytes)
    with pytest.raises(InsufficientMemoryError, match="holds no block"):
        planned(kv_memory=1000)


@given(
    free=st.integers(0, 30 * GIB),
    utilization=st.floats(0.01, 1.0),
    tokens=st.integers(1, 20_000),
    seqs=st.integers(1, 1500),
    length=st.integers(1, 40_960),
)
def test_a_budget_never_goes_beyond_what_may_be_used(
    free: int, utilization: float, tokens: int, seqs: int, length: int
) -> None:
    card = dataclasses.replace(H100, free_bytes=free)
    try:
        budget = planned(
            memory=card, utilization=utilization, tokens=tokens, seqs=seqs, max_model_len=length
        )
    except InsufficientMemoryError as error:
        assert "--max-" in str(error)  # noqa: PT017
        return
    assert budget.free_bytes - budget.left_bytes <= int(free * utilization)
    assert budget.full_requests >= 1


def test_a_budget_is_plain_data() -> None:
    budget = planned()
    data = json.loads(json.dumps(budget.to_json()))
    assert MemoryBudget(**data) == budget


def test_the_table_has_every_row_in_bytes_and_percent() -> None:
    budget = planned(max_model_len=4096)
    names = [name for name, _, _ in budget_rows(budget) if not name.startswith(" ")]
    assert names == [
        "total",
        "in use before",
        "weights",
        "activations",
        "graphs",
        "K/V",
        "left free",
    ]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(budget_table(budget))
    text = console.export_text()
    assert f"{budget.kv_bytes:,}" in text
    assert f"{budget.kv_bytes / budget.total_bytes:.1%}" in text
    assert f"{budget.num_blocks:,} blocks, {budget.tokens:,} tokens" in text
    assert f"{budget.full_requests:,.2f} requests of 4,096" in text


def test_an_engine_has_its_budget_and_its_pool_is_that() -> None:
    llm = LLM(str(tiny_model("llama")), device="cpu", dtype="float32", kv_memory="4MiB")
    assert llm.memory_budget.kv_bytes <= 4 << 20
    assert llm.core.kv.config.num_blocks == llm.memory_budget.num_blocks
    assert llm.core.scheduler.config.max_num_batched_tokens == 512
    assert llm.memory_budget.weight_bytes == 4 * llm.spec.num_parameters
    with pytest.raises(ConfigError, match="both say"):
        LLM(str(tiny_model("llama")), kv_memory="4MiB", gpu_memory_utilization=0.5)


def test_a_gpu_s_memory_is_measured_after_unused_blocks_are_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Properties:
        multi_processor_count = 108

    def free(index: int) -> tuple[int, int]:
        calls.append(f"ask {index}")
        return 30 * GIB, 40 * GIB

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    found = measure_device(torch.device("cuda:1"))
    assert calls == ["empty", "ask 1"]
    assert found == DeviceMemory(
        device="cuda:1", total_bytes=40 * GIB, free_bytes=30 * GIB, num_sms=108
    )

    def broken(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(ConfigError, match="cuda:1 cannot be used: CUDA error"):
        measure_device(torch.device("cuda:1"))
    assert measure_device(torch.device("cpu")).total_bytes > 0


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_no_step_is_larger_than_the_largest(tokens: int, seqs: int) -> None:
    room, rows = buckets.largest_step(tokens, seqs)
    for count in {1, seqs // 2 or 1, seqs}:
        assert count <= buckets.decode_bucket(count) <= buckets.decode_bucket(seqs) <= rows
        assert buckets.ragged_seqs(count) <= rows <= room
    bucket = buckets.token_bucket(tokens)
    assert tokens <= (bucket if tokens <= buckets.MAX_GRAPH_TOKENS else tokens) <= room


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize(("tokens", "seqs"), [(64, 4), (3000, 40), (512, 256)])
def test_static_buffers_are_what_the_runner_allocates(name: str, tokens: int, seqs: int) -> None:
    gpu_runner = pytest.importorskip("pagelab.execution.gpu_runner")
    spec = load_spec(tiny_source(name))
    device = torch.device("cpu")
    with torch.inference_mode():
        decoder = Decoder(
            spec,
            RandomWeights(spec, torch.bfloat16, device),
            torch.bfloat16,
            device,
            pack=False,
        )
        runner = gpu_runner.GpuRunner(
            decoder,
            KVCache(spec.kv_layout("bfloat16", 16), 4, device, scratch_block=True),
            SchedulerConfig(max_num_batched_tokens=tokens, max_num_seqs=seqs),
            max_model_len=500,
        )
    limits = StepLimits(
        max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=500, block_size=16
    )
    parts = gpu_footprint(spec, "bfloat16", limits, num_sms=4).activations
    estimated = ("largest layer", "libraries", "scratch block")
    counted = sum(size for part, size in parts.items() if part not in estimated)
    inner = runner.decoder
    weights = (inner.layers, inner.head, inner.embeddings, inner.final_norm, runner.cache)
    others = (*weights, runner._mailbox.words)  # which lies in the host's memory
    allocated = _storage_bytes(runner, {id(each) for each in others})
    assert allocated <= counted <= 1.02 * allocated + 8192


def _storage_bytes(root: object, skipped: set[int]) -> int:
    """Bytes of all tensors that an object reaches, each storage once."""
    storages: dict[int, int] = {}
    seen = set(skipped)
    waiting = [root]
    while waiting:
        at = waiting.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        if isinstance(at, torch.Tensor):
            storages[at.untyped_storage().data_ptr()] = at.untyped_storage().nbytes()
        elif isinstance(at, dict):
            waiting += at.values()
        elif isinstance(at, list | tuple):
            waiting += at
        elif type(at).__module__.startswith("pagelab."):
            names = [*getattr(at, "__dict__", ()), *getattr(type(at), "__slots__", ())]
            waiting += [getattr(at, name) for name in names]
    return sum(storages.values())


def test_a_cpu_s_estimate_grows_with_the_step() -> None:
    spec = spec_of("gpt2")

    def peak(tokens: int) -> int:
        limits = StepLimits(
            max_num_batched_tokens=tokens, max_num_seqs=256, max_model_len=512, block_size=16
        )
        return plain_footprint(spec, "float32", limits).activation_bytes

    assert peak(64) < peak(512) < peak(4096)

"""The reference time: design.md's eighth idea, against the table that was measured with it."""

from __future__ import annotations

import pytest
import torch

from pagelab.bench.ceilings import measure_ceilings
from pagelab.bench.limits import Ceilings, reference_time
from pagelab.bench.workloads import WorkloadChoice, build_workload, nano_lengths
from pagelab.models.registry import load_spec
from pagelab.models.shape_source import resolve_shape
from pagelab.models.spec import ModelSpec

H100 = Ceilings(bytes_per_s=2.99e12, flops_per_s=770e12)
ZEN4 = Ceilings(bytes_per_s=52e9, flops_per_s=415e9)  # two cores, bfloat16


def spec_of(name: str) -> ModelSpec:
    return load_spec(resolve_shape(name))


def lengths_of(name: str) -> list[tuple[int, int]]:
    workload = build_workload(
        WorkloadChoice(name=name), vocab_size=1000, max_model_len=4096, seed=0
    )
    return [(len(r.token_ids), r.max_tokens) for r in workload.requests]


@pytest.mark.parametrize(
    ("model", "lengths", "tokens_per_s"),
    [
        ("gpt2", lengths_of("prompts4"), 45_700),
        ("gpt2", lengths_of("batch64"), 217_000),
        ("gpt2", nano_lengths(1024), 102_000),
        ("qwen3-0.6b", lengths_of("batch64"), 59_700),
        ("qwen3-0.6b", nano_lengths(), 25_400),
        ("llama-3.1-8b", lengths_of("batch64"), 10_100),
        ("llama-3.1-8b", nano_lengths(), 10_130),
    ],
)
def test_the_published_limits_of_an_h100(
    model: str, lengths: list[tuple[int, int]], tokens_per_s: float
) -> None:
    reference = reference_time(spec_of(model), "bfloat16", lengths, H100)
    output = sum(tokens for _, tokens in lengths)
    assert output / reference.total_s == pytest.approx(tokens_per_s, rel=0.03)
    assert reference.decode_s == reference.weights_s + reference.kv_s


def test_many_requests_on_a_cpu_are_bound_by_arithmetic() -> None:
    lengths = lengths_of("w2")
    reference = reference_time(spec_of("smollm2-135m"), "bfloat16", lengths, ZEN4)
    assert reference.decode_s == reference.decode_arithmetic_s
    flops = reference.total_s * ZEN4.flops_per_s
    assert flops == pytest.approx(1.45e12, rel=0.05)  # anchors: W2 costs 1.45 TFLOP
    assert 2489 / reference.total_s == pytest.approx(710, rel=0.05)


def test_one_request_reads_the_weights_for_each_token() -> None:
    reference = reference_time(spec_of("smollm2-135m"), "bfloat16", [(1, 100)], ZEN4)
    assert 100 / reference.weights_s == pytest.approx(192, rel=0.02)  # anchors: one request


def test_fewer_at_once_read_the_weights_more_often() -> None:
    spec, lengths = spec_of("gpt2"), [(10, 20)] * 6
    times = [
        reference_time(spec, "bfloat16", lengths, H100, concurrency=n).weights_s for n in (1, 2, 6)
    ]
    assert times[0] == pytest.approx(2 * times[1])
    assert times[0] == pytest.approx(6 * times[2])
    all_at_once = reference_time(spec, "bfloat16", lengths, H100).weights_s
    assert all_at_once == pytest.approx(times[2])


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagelab.bench.ceilings._SECONDS", 0.0)
    monkeypatch.setattr("pagelab.bench.ceilings._CPU_BYTES", 1 << 20)
    monkeypatch.setattr("pagelab.bench.ceilings._CPU_SIZE", 64)
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert ceilings.bytes_per_s > 1e6
    assert ceilings.flops_per_s > 1e6
    assert ceilings.how == "better of copy and sum of 1.0 MiB; product of 64 x 64 in float32"

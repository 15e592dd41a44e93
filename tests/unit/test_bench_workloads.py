"""The workloads of benchmarks are exactly those that others' figures were measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagelab.bench.workloads import NAMED, WorkloadChoice, build_workload, nano_lengths
from pagelab.errors import ConfigError
from pagelab.workloads import Workload


def build(
    name: str | None = None,
    *,
    vocab: int = 50_257,
    longest: int = 4096,
    seed: int = 0,
    **fields: object,
) -> Workload:
    choice = WorkloadChoice(name=name, **fields)  # type: ignore[arg-type]
    return build_workload(choice, vocab_size=vocab, max_model_len=longest, seed=seed)


@pytest.mark.parametrize(
    ("name", "requests", "tokens_in", "tokens_out"),
    [
        ("prompts4", 4, 147, 200),
        ("batch64", 64, 8_192, 16_384),
        ("w2", 32, 3_695, 2_489),
    ],
)
def test_named_workloads_have_the_published_totals(
    name: str, requests: int, tokens_in: int, tokens_out: int
) -> None:
    workload = build(name)
    assert len(workload.requests) == requests
    assert (workload.prompt_tokens, workload.output_tokens) == (tokens_in, tokens_out)


def test_nano_vllm_lengths_give_its_published_output() -> None:
    assert sum(output for _, output in nano_lengths()) == 133_966
    assert build("nano256").output_tokens == 133_966


def test_nano_vllm_lengths_cut_to_gpt2() -> None:
    lengths = nano_lengths(1024)
    assert sum(output for _, output in lengths) == 85_234
    assert max(prompt for prompt, _ in lengths) == 924
    assert max(prompt + output for prompt, output in lengths) == 1024
    assert build("nano256", longest=1024).output_tokens == 85_234


@pytest.mark.parametrize("name", [*NAMED, "sharegpt-like", "prompts"])
def test_ids_are_seeded_and_within_the_vocabulary(name: str) -> None:
    workload = build(name, vocab=100, longest=512)
    assert workload == build(name, vocab=100, longest=512)
    assert all(0 <= token < 100 for r in workload.requests for token in r.token_ids)


def test_prompts_share_no_prefix() -> None:
    beginnings = [r.token_ids[:16] for r in build("batch64").requests]
    assert len(set(beginnings)) == 64
    assert build("batch64", seed=1).requests[0].token_ids[:16] not in beginnings


def test_lengths_of_ones_own() -> None:
    workload = build(num_requests=3, input_len=5, output_len=7)
    assert [(len(r.token_ids), r.max_tokens) for r in workload.requests] == [(5, 7)] * 3


def test_a_generator_takes_a_number_and_is_cut_to_the_length() -> None:
    workload = build("uniform:in=50..60,out=40..50", longest=64, num_requests=9)
    assert len(workload.requests) == 9
    assert max(r.total_tokens for r in workload.requests) == 64
    assert "9 too long and cut" in workload.title


def test_arrivals_are_all_at_the_start_unless_a_rate_is_given(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": t, "input_length": 4, "output_length": 2} for t in (0, 9000)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [r.arrival_s for r in build(str(trace)).requests] == [0, 0]
    assert [r.arrival_s for r in build(str(trace), rate="trace").requests] == [0, 9]
    times = [r.arrival_s for r in build("batch64", rate="poisson:4").requests]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(63 / 4, rel=0.5)
    assert build("batch64", rate="poisson:4").title.endswith("4 requests/s (poisson)")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "best"}, "--workload takes prompts4, batch64, nano256, w2, "),
        ({"input_len": 4}, "--input-len and --output-len go together"),
        ({"name": "w2", "input_len": 4, "output_len": 4}, "--workload has lengths of its own"),
        ({"name": "w2", "num_requests": 4}, "--num-requests: w2 has a number of its own"),
        ({"num_requests": 4}, "--num-requests needs --input-len"),
        ({"num_requests": 0, "input_len": 4, "output_len": 4}, "--num-requests must be at least 1"),
        ({"input_len": 4000, "output_len": 97}, "4,097 tokens, more than the longest possible"),
        ({"name": "w2", "rate": "trace"}, "w2 has no arrivals of its own"),
    ],
)
def test_what_cannot_be_asked_names_its_option(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**fields)  # type: ignore[arg-type]


def test_nano_lengths_need_room_for_an_output() -> None:
    with pytest.raises(ConfigError, match="raise --max-model-len"):
        build("nano256", longest=100)

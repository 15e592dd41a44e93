"""Workloads: the same everywhere, with the lengths that they promise."""

from __future__ import annotations

import json
import math

import pytest

from pagelab.errors import ConfigError
from pagelab.workloads import (
    WORKLOADS,
    Workload,
    WorkloadRequest,
    large,
    load_workload,
    mixed,
    random_ids,
    seed_prompts,
    tokenize,
)


def words(text: str) -> list[int]:
    """A tokenizer with one token a word."""
    return [sum(map(ord, word)) % 1000 for word in text.split()]


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def test_the_four_prompts_are_those_of_the_first_experiment() -> None:
    prompts = [request.prompt_text for request in seed_prompts().requests]
    assert prompts == [
        "Hello!",
        "How are you doing today? I hope everything is going well.",
        "Tell me a story about artificial intelligence and machine learning. " * 10,
        "Thanks!",
    ]
    assert [request.max_tokens for request in seed_prompts().requests] == [50] * 4


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_name_and_a_seed_give_the_same_workload_again(name: str) -> None:
    assert load_workload(name, 3) == load_workload(name, 3)


def test_seeds_give_different_workloads() -> None:
    assert mixed(0) != mixed(1)
    assert large(0) != large(1)


def test_mixed_keeps_its_first_request_across_python_versions() -> None:
    first = mixed(0).requests[0]
    assert (first.prompt_tokens, first.max_tokens) == (65, 12)
    assert first.prompt_text is not None
    assert first.prompt_text.startswith("What should we do with the heavy mirror?")


@pytest.mark.parametrize("seed", range(20))
def test_mixed_has_the_promised_lengths(seed: int) -> None:
    workload = tokenize(mixed(seed), words)
    inputs = [len(request.token_ids) for request in workload.requests]
    outputs = [request.max_tokens for request in workload.requests]
    assert len(inputs) == 24
    assert 4 <= min(inputs) <= 5
    assert 130 < max(inputs) <= 160
    assert 10 <= min(outputs) <= 11
    assert 38 < max(outputs) <= 44
    assert 980 <= workload.prompt_tokens <= 1040
    assert 520 <= workload.output_tokens <= 590
    middle = sorted(inputs)[12]
    assert abs(math.log(middle / 25.3)) < 0.25  # the geometric mean of 4 and 160


@pytest.mark.parametrize("seed", range(5))
def test_large_has_the_promised_lengths(seed: int) -> None:
    workload = tokenize(large(seed), words)
    assert len(workload.requests) == 32
    assert all(16 <= len(request.token_ids) <= 512 for request in workload.requests)
    assert all(16 <= request.max_tokens <= 256 for request in workload.requests)


@pytest.mark.parametrize("encode", [words, bytes_of])
def test_tokenize_reaches_every_target_length_exactly(encode: object) -> None:
    workload = mixed(5)
    targets = [request.prompt_tokens for request in workload.requests]
    tokenized = tokenize(workload, encode)  # type: ignore[arg-type]
    assert [len(request.token_ids) for request in tokenized.requests] == targets
    assert [request.prompt_tokens for request in tokenized.requests] == targets


def test_tokenize_keeps_a_text_without_a_target_whole() -> None:
    tokenized = tokenize(seed_prompts(), words)
    assert [len(request.token_ids) for request in tokenized.requests] == [1, 11, 100, 1]
    assert tokenized.requests[1].prompt_text == seed_prompts().requests[1].prompt_text


def test_tokenize_shows_the_text_that_was_kept() -> None:
    request = WorkloadRequest(id="a", prompt_text="one two three four", prompt_tokens=2)
    tokenized = tokenize(
        Workload("w", "", (request,)), lambda text: list(range(9)), lambda ids: f"{len(ids)} kept"
    )
    assert tokenized.requests[0].token_ids == (0, 1)
    assert tokenized.requests[0].prompt_text == "2 kept"


def test_a_text_that_is_too_short_begins_again() -> None:
    request = WorkloadRequest(id="a", prompt_text="x", prompt_tokens=5)
    tokenized = tokenize(Workload("w", "", (request,)), lambda text: [7, 8])
    assert tokenized.requests[0].token_ids == (7, 8, 7, 8, 7)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt-0 has no tokens"):
        tokenize(seed_prompts(), lambda text: [])


def test_random_ids_are_seeded_and_below_the_vocabulary() -> None:
    workload = random_ids(mixed(0), 100, 1)
    assert workload == random_ids(mixed(0), 100, 1)
    assert workload != random_ids(mixed(0), 100, 2)
    assert all(0 <= token < 100 for r in workload.requests for token in r.token_ids)
    assert [len(r.token_ids) for r in workload.requests] == [
        r.prompt_tokens for r in mixed(0).requests
    ]
    assert [len(r.token_ids) for r in random_ids(seed_prompts(), 100).requests] == [1, 14, 133, 1]


def test_an_unknown_name_lists_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'mxied'.*prompts, mixed, large"):
        load_workload("mxied")


def test_a_workload_survives_json() -> None:
    workload = random_ids(mixed(0), 50)
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload
    assert Workload.from_json(json.loads(json.dumps(mixed(0).to_json()))) == mixed(0)

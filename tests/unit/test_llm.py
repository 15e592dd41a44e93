"""`LLM` as people use it: odd arguments, requests that fail beside others, streams, Ctrl-C."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch

from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError, PageLabError, RequestError
from pagelab.native.packed import PackedLinear
from pagelab.types import FinishReason, SamplingParams
from tests.support.engines import greedy
from tests.support.tiny_models import VOCAB, tiny_gguf, tiny_model

PROMPT = list(range(40))
EVERY_TOKEN = SamplingParams(
    max_tokens=4, min_tokens=1, temperature=0, stop_token_ids=list(range(VOCAB))
)


def engine(name: str = "llama", **options: Any) -> LLM:
    options = {"kv_memory": "4MiB", "device": "cpu", "dtype": "float32"} | options
    return LLM(str(tiny_model(name)), **options)


def test_texts_and_ids_give_the_same_and_come_in_order() -> None:
    llm = engine()
    texts = llm.generate(["abc", "de"], greedy(6))
    ids = llm.generate([llm.tokenizer.encode("abc"), llm.tokenizer.encode("de")], greedy(6))
    assert [t.token_ids for t in texts] == [i.token_ids for i in ids]
    assert [t.prompt for t in texts] == ["abc", "de"]
    assert texts[0].text == llm.tokenizer.decode(texts[0].token_ids)
    assert texts[0].finish_reason is FinishReason.LENGTH
    assert texts[0].metrics.first_token_time is not None


def test_a_gguf_gives_the_same_tokens_as_its_folder() -> None:
    folder = engine().generate([PROMPT], greedy(20))
    gguf = LLM(str(tiny_gguf("llama")), kv_memory="4MiB", device="cpu", dtype="float32")
    assert gguf.generate([PROMPT], greedy(20))[0].token_ids == folder[0].token_ids


@pytest.mark.parametrize("prompt", [np.array([1, 2, 3]), torch.tensor([1, 2, 3]), (1, 2, 3)])
def test_ids_may_be_any_integers(prompt: Any) -> None:
    llm = engine()
    assert (
        llm.generate(prompt, greedy(3))[0].token_ids
        == llm.generate([1, 2, 3], greedy(3))[0].token_ids
    )


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ("", None),
        ([""], None),
        ([[]], None),
        ([None], None),
        ([1.5], None),
        (5, None),
        (b"abc", None),
        ([b"abc"], None),
        ([[VOCAB]], None),
        (["a", "b"], [SamplingParams()]),
        ("a", {"max_tokens": 3}),
        ("a", [None]),
        ("a", SamplingParams(stop_token_ids=[VOCAB])),
        ("a", SamplingParams(max_tokens=10_000)),
    ],
)
def test_what_cannot_be_served_is_a_request_error_and_starts_nothing(
    prompts: Any, params: Any
) -> None:
    llm = engine()
    with pytest.raises(RequestError):
        llm.generate(prompts, params)
    assert not llm.core.has_unfinished_requests
    assert not llm._texts


def test_one_bad_prompt_in_a_list_starts_none_of_them() -> None:
    llm = engine()
    with pytest.raises(RequestError):
        llm.generate(["a", "b", ""], greedy(3))
    assert not llm.core.has_unfinished_requests
    assert not llm._texts


def test_nothing_asked_is_nothing_answered() -> None:
    assert engine().generate([]) == []


@pytest.mark.parametrize("messages", [[], {"role": "user", "content": "x"}, "hi", 3])
def test_chat_without_messages_is_a_request_error(messages: Any) -> None:
    with pytest.raises(PageLabError):
        engine().chat(messages, greedy(2))


@pytest.mark.parametrize("options", [{"max_model_len": 0}, {"block_size": 0}, {"kv_memory": "1"}])
def test_settings_that_cannot_work_are_config_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        engine(**options)


def test_a_failing_request_does_not_touch_shared_blocks_or_the_prefix_cache() -> None:
    llm = engine(check_invariants=True)
    want = llm.generate([PROMPT], greedy(8))[0].token_ids
    good, bad = llm.generate([PROMPT, PROMPT], [greedy(8), EVERY_TOKEN])
    assert bad.finish_reason is FinishReason.ERROR
    assert "every token is suppressed" in (bad.outputs[0].error or "")
    assert good.token_ids == want
    again = llm.generate([PROMPT], greedy(8))[0]
    assert again.token_ids == want
    assert again.metrics.num_cached_tokens == 32


@pytest.mark.parametrize("attention", ["auto", "cpu"])
def test_a_request_that_overflows_fails_alone_and_leaves_nothing_behind(attention: str) -> None:
    """NaNs are planted in one embedding row: whoever uses that token overflows."""
    llm = engine(
        "llama3",  # its head is not the embedding
        check_invariants=True,
        max_num_batched_tokens=16,
        block_size=8,
        attention=attention,
    )
    runner = llm.core.runner
    want = llm.generate([PROMPT], greedy(8))[0].token_ids
    embedding = runner.decoder.embedding  # type: ignore[attr-defined]
    with torch.inference_mode():
        if isinstance(embedding, PackedLinear):
            panels = (ctypes.c_float * (embedding.nbytes // 4)).from_address(embedding.fields.data)
            panels[200 // 32 * 32 * embedding.fields.kp + 200 % 32] = math.nan
        else:
            embedding[200] = torch.nan
    poisoned = [*PROMPT[:20], 200, *PROMPT[20:]]
    for prompts in ([poisoned, PROMPT], [PROMPT[::-1], poisoned, PROMPT]):
        outputs = llm.generate(prompts, greedy(8))
        assert "not finite" in (outputs[-2].outputs[0].error or "")
        assert outputs[-1].token_ids == want
    assert all(bool(layer.isfinite().all()) for layer in runner.cache.layers)  # type: ignore[attr-defined]


def test_streams_add_up_and_may_interleave() -> None:
    llm = engine()
    whole = [output.text for output in llm.generate(["ab", "xyz"], greedy(12))]
    first, second = llm.stream("ab", greedy(12)), llm.stream("xyz", greedy(12))
    parts = [next(first), next(second)]
    llm.generate("other", greedy(30))  # makes the streams' last steps
    assert [parts[0] + "".join(first), parts[1] + "".join(second)] == whole
    assert llm.last_output is not None
    assert llm.last_output.text == whole[1]


def test_a_stream_that_is_closed_early_frees_its_blocks() -> None:
    llm = engine()
    stream = llm.stream("ab", greedy(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.core.kv.pool.num_held == 0
    assert not llm.core.has_unfinished_requests


def test_stop_strings_end_the_text_before_them() -> None:
    llm = engine()
    text = llm.generate("hello", greedy(20))[0].text
    stop = text[5:8]
    output = llm.generate(
        "hello", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop=[stop])
    )[0]
    assert output.text == text[: text.index(stop)]
    assert output.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("where", ["_note_scheduled", "_after_step"])
def test_ctrl_c_anywhere_in_a_step_leaves_an_engine_that_goes_on(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(check_invariants=True)
    want = llm.generate([PROMPT], greedy(8))[0].token_ids

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.core, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, PROMPT[::-1]], greedy(8))
    assert not llm.core.has_unfinished_requests
    assert llm.core.kv.pool.num_held == 0
    assert llm.generate([PROMPT], greedy(8))[0].token_ids == want

"""Every option of the API through the `openai` client, on a tiny real model, beside `LLM`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from pagelab.engine.async_llm import AsyncLLM
from pagelab.engine.llm import LLM
from pagelab.server.settings import ServerSettings
from pagelab.types import GuidedDecoding, SamplingParams
from tests.support.tiny_models import tiny_model
from tests.support.toy_server import RunningServer, serving

ENGINE: Any = {"kv_memory": "4MiB", "device": "cpu", "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    llm = AsyncLLM(str(tiny_model("llama")), **ENGINE)
    with serving(llm, ServerSettings(served_name="tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(tiny_model("llama")), **ENGINE)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0.8, "seed": 3, "top_p": 0.9}, {"top_k": 20, "min_p": 0.01}),
        ({"temperature": 1.3, "seed": -5, "n": 3}, {}),
        ({"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5}, {}),
        ({"temperature": 0}, {"repetition_penalty": 1.7}),
        ({"temperature": 0, "logit_bias": {"65": 100, "66": -100}}, {}),
        ({"temperature": 0}, {"min_tokens": 5, "stop_token_ids": [10, 20]}),
        ({"temperature": 0}, {"guided_regex": "[ab]{4,9}c"}),
        ({"temperature": 0}, {"guided_choice": ["yes", "no", "perhaps"]}),
        ({"temperature": 0}, {"guided_grammar": 'start: "a" ("b" | "c")+ "d"'}),
    ],
)
def test_every_option_gives_what_the_engine_gives(
    client: openai.OpenAI, llm: LLM, options: dict[str, Any], extra: dict[str, Any]
) -> None:
    done = client.completions.create(
        model="tiny", prompt="Hello, ", max_tokens=20, **options, extra_body=extra
    )
    fields = options | extra
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    for name in ("regex", "choice", "grammar"):
        if f"guided_{name}" in fields:
            fields["guided"] = GuidedDecoding(**{name: fields.pop(f"guided_{name}")})
    expected = llm.generate("Hello, ", SamplingParams(max_tokens=20, **fields))[0]
    assert [choice.text for choice in done.choices] == [o.text for o in expected.outputs]
    assert [choice.finish_reason for choice in done.choices] == [
        str(o.finish_reason) for o in expected.outputs
    ]


def test_log_probabilities_of_an_answer_and_of_an_echoed_prompt(
    client: openai.OpenAI, llm: LLM
) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=2)
    expected = llm.generate("Hello", params)[0]
    assert expected.prompt_logprobs is not None
    assert expected.outputs[0].logprobs is not None
    options: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "temperature": 0}
    done = client.completions.create(**options, logprobs=2, echo=True)
    found = done.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.tokens is not None
    assert found.tokens[:5] == list("Hello")
    assert found.text_offset is not None
    assert found.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert found.token_logprobs[0] is None
    values = [entry.chosen for entry in (*expected.prompt_logprobs, *expected.outputs[0].logprobs)
              if entry is not None]  # fmt: skip
    assert found.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
    text = ""
    streamed: list[float | None] = []
    for chunk in client.completions.create(**options, logprobs=2, echo=True, stream=True):
        text += chunk.choices[0].text
        part = chunk.choices[0].logprobs
        streamed += [] if part is None or part.token_logprobs is None else part.token_logprobs
    assert text == done.choices[0].text
    assert streamed[1:] == pytest.approx(values, abs=1e-4)


def test_no_tokens_and_echo_give_the_log_probabilities_of_the_prompt_alone(
    client: openai.OpenAI, llm: LLM
) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    prompt = llm.generate("Hello", params)[0].prompt_logprobs
    assert prompt is not None
    values = [entry.chosen for entry in prompt if entry is not None]
    options: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 0, "echo": True, "n": 2}
    done = client.completions.create(**options, logprobs=1, stop=["x"])
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 0)
    for choice in done.choices:
        assert (choice.text, choice.finish_reason) == ("Hello", "length")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == list("Hello")
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
    texts, reasons, tokens = {0: "", 1: ""}, {}, 0
    for chunk in client.completions.create(
        **options, logprobs=1, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            tokens += len((choice.logprobs and choice.logprobs.tokens) or ())
        last = chunk.usage
    assert texts == {0: "Hello", 1: "Hello"}
    assert reasons == {0: "length", 1: "length"}
    assert tokens == 10
    assert last is not None
    assert last.completion_tokens == 0
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="tiny", prompt="Hello", max_tokens=0)


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    found = done.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert done.usage is not None
    assert len(found.content) == done.usage.completion_tokens
    data = b""
    for entry in found.content:
        assert entry.bytes is not None
        data += bytes(entry.bytes)
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)
    assert data.decode(errors="replace") == done.choices[0].message.content


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]


def test_structured_output(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "An animal, as JSON."}]
    parsed = client.chat.completions.parse(
        model="tiny", messages=messages, response_format=Animal, temperature=0, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    for stream in (False, True):
        done: Any = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, stream=stream, max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {
                "name": "animal",
                "schema": Animal.model_json_schema() | {"additionalProperties": False}}},
        )  # fmt: skip
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in done)
        else:
            text = done.choices[0].message.content
        assert json.loads(text)["kind"] in ("cat", "dog")


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_regex": "["},
        {"guided_grammar": "nonsense ::= ::="},
        {"guided_json": {"type": "nothing"}},
        {"guided_json": "no json"},
        {"guided_regex": "a", "guided_choice": ["b"]},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        {"guided_regex": "a", "stop": ["b"]},
        {"response_format": {"type": "json_schema"}},
    ],
)
def test_a_form_that_is_wrong_is_a_bad_request(
    server: RunningServer, client: openai.OpenAI, extra: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", extra_body=extra)
    assert server.llm.num_requests == 0

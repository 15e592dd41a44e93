"""The server through the clients that people use: `openai`, LangChain, curl, schemathesis."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.toy_process import VOCAB, toy_tokenizer
from tests.support.toy_runner import generate
from tests.support.toy_server import RunningServer, running

MESSAGES: Any = [{"role": "user", "content": "hello"}]
CHAT_PROMPT = "<s>user: hello</s><s>assistant: "


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(prompt: str, count: int, seed: int = 0) -> str:
    tokenizer = toy_tokenizer()
    return tokenizer.decode(generate(tokenizer.encode(prompt), count, seed, VOCAB))


IGNORE_EOS = {"ignore_eos": True}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="toy", prompt="abc", max_tokens=12, temperature=0, extra_body=IGNORE_EOS
    )
    assert done.choices[0].text == expected("abc", 12)
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 12)
    assert done.usage.total_tokens == 15


def test_several_prompts_texts_or_ids_times_n(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="toy", prompt=["ab", "cd"], max_tokens=6, n=2, seed=5, extra_body=IGNORE_EOS
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in done.choices] == [
        expected(prompt, 6, seed) for prompt in ("ab", "cd") for seed in (5, 6)
    ]
    ids = client.completions.create(
        model="toy", prompt=[[97, 98], [99, 100]], max_tokens=6, n=2, seed=5, extra_body=IGNORE_EOS
    )
    assert [c.text for c in ids.choices] == [c.text for c in done.choices]


def test_a_streamed_completion_of_several_prompts_adds_up(client: openai.OpenAI) -> None:
    texts = ["", "", "", ""]
    ends: dict[int, str] = {}
    usage = None
    for chunk in client.completions.create(
        model="toy",
        prompt=["ab", "cd"],
        n=2,
        seed=5,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=IGNORE_EOS,
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [expected(prompt, 9, seed) for prompt in ("ab", "cd") for seed in (5, 6)]
    assert ends == dict.fromkeys(range(4), "length")
    assert usage is not None
    assert usage.completion_tokens == 36


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI) -> None:
    options: Any = {"model": "toy", "prompt": "abc", "max_tokens": 4, "temperature": 0}
    done = client.completions.create(**options, echo=True, extra_body=IGNORE_EOS)
    assert done.choices[0].text == "abc" + expected("abc", 4)
    chunks = client.completions.create(**options, echo=True, stream=True, extra_body=IGNORE_EOS)
    text = "".join(c.choices[0].text for c in chunks)
    assert text == "abc" + expected("abc", 4)


def test_a_chat(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hel"},
                                               {"type": "text", "text": "lo"}]}],
        max_completion_tokens=7,
        temperature=0,
        extra_body=IGNORE_EOS,
    )  # fmt: skip
    assert done.choices[0].message.content == expected(CHAT_PROMPT, 7)
    assert done.choices[0].message.role == "assistant"


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_model(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="toy", messages=MESSAGES, temperature=0, extra_body=IGNORE_EOS
    )
    assert done.usage is not None
    assert done.usage.total_tokens == 512
    assert done.choices[0].finish_reason == "length"


def test_a_streamed_chat_with_stop_strings(client: openai.OpenAI) -> None:
    whole = expected(CHAT_PROMPT, 200)
    stop = next(c for c in whole[20:] if c.isprintable() and c != "\ufffd")
    stream = client.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        max_tokens=200,
        temperature=0,
        stop=[stop],
        stream=True,
        extra_body=IGNORE_EOS,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_helpers_of_the_package_understand_the_stream(client: openai.OpenAI) -> None:
    whole = expected(CHAT_PROMPT, 200)
    stop = next(c for c in whole[20:] if c.isprintable() and c != "\ufffd")
    with client.chat.completions.stream(
        model="toy", messages=MESSAGES, temperature=0, stop=stop, extra_body=IGNORE_EOS
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
        assert message.content == whole[: whole.index(stop)]


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    prompt = "<s>system: be brief</s><s>user: hello</s><s>assistant: "
    options: Any = {"model": "toy", "input": "hello", "instructions": "be brief",
                    "max_output_tokens": 12, "temperature": 0}  # fmt: skip
    done = client.responses.create(**options)
    text = expected(prompt, 12)
    assert text.startswith(done.output_text)  # an end-of-sequence token may come before
    assert done.usage is not None
    assert done.usage.output_tokens <= 12
    kinds: list[str] = []
    parts = ""
    for told in client.responses.create(**options, stream=True):
        kinds.append(told.type)
        if told.type == "response.output_text.delta":
            parts += told.delta
    assert parts == done.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    listed = client.responses.create(**options | {"input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]})  # fmt: skip
    assert listed.output_text == done.output_text
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**options, previous_response_id="resp_1")


def test_many_asynchronous_streams_are_not_mixed_up(server: RunningServer) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> None:
        prompt = f"prompt {i}"
        text = ""
        async for chunk in await client.completions.create(
            model="toy", prompt=prompt, max_tokens=24, temperature=0, stream=True,
            extra_body=IGNORE_EOS,
        ):  # fmt: skip
            text += chunk.choices[0].text
        assert text == expected(prompt, 24)

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            await asyncio.gather(*(one(client, i) for i in range(100)))

    asyncio.run(main())
    server.until(server.idle)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 1000}, "n"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"max_tokens": 5000}, None),
        ({"prompt": ""}, None),
        ({"prompt": "x" * 600}, None),
        ({"extra_body": {"prompt": {"a": 1}}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request(
    client: openai.OpenAI, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "toy", "prompt": "a", **options})
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"


def test_curl_streams(server: RunningServer) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "stream": True} | IGNORE_EOS
    done = subprocess.run(
        [curl, "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json",
         "-d", json.dumps(body)],
        capture_output=True, timeout=20, check=True,
    )  # fmt: skip
    events = [line for line in done.stdout.decode().split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    texts = [json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events[:-1]]
    assert "".join(texts) == expected("abc", 3)


def test_langchain(server: RunningServer) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    whole = expected(CHAT_PROMPT, 200)
    stop = next(c for c in whole[20:] if c.isprintable() and c != "\ufffd")
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="toy", temperature=0, max_tokens=300,
        stop_sequences=[stop], extra_body=IGNORE_EOS, max_retries=0,
    )  # fmt: skip
    said = chat.invoke([("user", "hello")])
    assert said.content == whole[: whole.index(stop)]
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in chat.stream("hello")) == said.content
    assert [m.content for m in chat.batch(["hello", "hello"])] == [said.content] * 2


@pytest.mark.slow
def test_our_openapi_description_holds_under_schemathesis(server: RunningServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
         "--max-examples", "15", "--seed", "1", "--request-timeout", "20", "--no-color",
         "--generation-database", "none", "--phases", "examples,coverage,fuzzing",
         "--exclude-checks", "unsupported_method,positive_data_acceptance"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    server.until(server.idle)

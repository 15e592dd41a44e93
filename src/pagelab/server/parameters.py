"""From a request's fields to the engine's sampling parameters: the one place that maps them."""

from __future__ import annotations

from typing import Any

from pagelab.server.errors import ApiError
from pagelab.server.schemas import ChatRequest, CompletionRequest, Sampling
from pagelab.types import GuidedDecoding, SamplingParams


def to_sampling_params(body: Sampling) -> SamplingParams:
    """The engine's parameters for a request.

    Raises:
        RequestError: a value is out of range.
        ApiError: fields contradict each other, or name no token.
    """
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "n": body.n,
        "seed": body.seed,
        "stop": body.stop,
        "min_p": body.min_p,
        "min_tokens": body.min_tokens,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": _logit_bias(body),
        "guided": _guided(body),
        "top_k": None if body.top_k is None else max(0, body.top_k),  # -1 is vLLM's "all"
    }
    fields = {name: value for name, value in given.items() if value is not None}
    logprobs = _logprobs(body)
    echoes = isinstance(body, CompletionRequest) and body.echo
    return SamplingParams(
        **fields,
        max_tokens=_max_tokens(body),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echoes else None,
    )


def _max_tokens(body: Sampling) -> int | None:
    if isinstance(body, ChatRequest):  # up to the model's length, as OpenAI's API
        if body.max_completion_tokens is not None:
            return body.max_completion_tokens
        return body.max_tokens
    if body.max_tokens == 0 and not (isinstance(body, CompletionRequest) and body.echo):
        raise ApiError(400, "max_tokens = 0 needs echo = true: no answer else", param="max_tokens")
    # 0 asks for the prompt's log probabilities: the engine generates one token, which is dropped
    return 16 if body.max_tokens is None else max(1, body.max_tokens)


def _logprobs(body: Sampling) -> int | None:
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionRequest)
    return body.logprobs


def _logit_bias(body: Sampling) -> dict[int, float] | None:
    """JSON has only texts as keys."""
    found: dict[int, float] = {}
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(400, f"logit_bias: {token!r} is no token id", param="logit_bias")
        found[int(token)] = bias
    return found or None


def _guided(body: Sampling) -> GuidedDecoding | None:
    """`response_format` or one of vLLM's `guided_…`."""
    given: dict[str, Any] = {
        "json_schema": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    format_ = body.response_format
    if format_ is not None and format_.type != "text":
        if asked:
            raise ApiError(
                400, "give response_format or a guided_… field, not both", param="response_format"
            )
        if format_.type == "json_object":
            return GuidedDecoding(json_object=True)
        assert format_.json_schema is not None
        return GuidedDecoding(json_schema=format_.json_schema.schema_)
    return GuidedDecoding(**asked) if asked else None

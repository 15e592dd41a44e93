"""From a request's fields to the engine's sampling parameters: the one place that maps them."""

from __future__ import annotations

from typing import Any

from pagelab.server.errors import ApiError
from pagelab.server.schemas import ChatRequest, CompletionRequest, Sampling
from pagelab.types import SamplingParams

NOT_YET = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""Fields that the engine cannot honour: refused unless they ask for nothing."""

_NOTHING: tuple[Any, ...] = (None, 0, {}, "")


def to_sampling_params(body: Sampling) -> SamplingParams:
    """The engine's parameters for a request.

    Raises:
        RequestError: a value is out of range.
        ApiError: a field asks for something that the engine does not have.
    """
    _refuse_what_is_missing(body)
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
        "top_k": None if body.top_k is None else max(0, body.top_k),  # -1 is vLLM's "all"
    }
    fields = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**fields, max_tokens=_max_tokens(body), logprobs=_logprobs(body))


def _max_tokens(body: Sampling) -> int | None:
    if isinstance(body, ChatRequest):  # up to the model's length, as OpenAI's API
        if body.max_completion_tokens is not None:
            return body.max_completion_tokens
        return body.max_tokens
    return 16 if body.max_tokens is None else body.max_tokens


def _logprobs(body: Sampling) -> int | None:
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionRequest)
    return body.logprobs


def _refuse_what_is_missing(body: Sampling) -> None:
    for name in NOT_YET:
        value = getattr(body, name)
        nothing = 1.0 if name == "repetition_penalty" else None
        if value not in _NOTHING and value != nothing:
            raise ApiError(400, f"{name} is not supported by this engine", param=name)
    if body.response_format is not None and body.response_format.type != "text":
        raise ApiError(
            400, "response_format is not supported by this engine", param="response_format"
        )
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs of an echoed prompt are not supported", param="echo")

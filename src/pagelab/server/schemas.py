"""Bodies of requests. Fields are OpenAI's, then those that vLLM's clients know, then ours.

An unknown field is refused by name, as OpenAI's API does. Fields of `IGNORED` are accepted and have
no effect here; those that would change the answer in a way that we do not have are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

_Text = Annotated[str, Field(max_length=4 << 20)]
_Stop = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] | None
_TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]

IGNORED = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity",
    }
)  # fmt: skip
"""What describes the caller or a service that we are not; it changes no answer."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in IGNORED}


class StreamOptions(_Body):
    """What a stream tells beside text."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # accepted: we send none
    continuous_usage_stats: StrictBool = False


class JsonSchema(_Body):
    """The schema of `response_format`."""

    name: str = "response"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(_Body):
    """How the answer must look."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.schema_ is None
        ):
            raise ValueError("json_schema needs a json_schema with a schema")
        return self


class Sampling(_Body):
    """How tokens are chosen; both endpoints have these."""

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    stop: _Stop = None
    seed: Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(strict=True, ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    # beyond OpenAI's, named as vLLM names them
    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None
    min_p: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=1024)] | None = None
    ignore_eos: StrictBool | None = None
    repetition_penalty: Annotated[float, Field(strict=True, gt=0, le=10)] | None = None
    guided_json: dict[str, Any] | _Text | None = None
    guided_regex: _Text | None = None
    guided_choice: Annotated[list[_Text], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: _Text | None = None
    priority: Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        if isinstance(self.stop, str) and not self.stop:
            raise ValueError("stop must not be an empty text")
        return self


_Ids = Annotated[list[_TokenId], Field(min_length=1)]


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: _Text | _Ids | Annotated[list[_Text | _Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(strict=True, ge=1)] | None = None
    suffix: None = None
    add_special_tokens: StrictBool = True

    @model_validator(mode="after")
    def _no_search(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        return self


class TextPart(_Body):
    """A part of a message. Only texts are supported."""

    type: Literal["text"]
    text: _Text


class ChatMessage(BaseModel):
    """One message. Templates may use other fields, so those are passed on."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs a content")
        return self


class Tool(BaseModel):
    """A function that the model may want called; its description goes to the chat template."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self


class TokenizeRequest(_Body):
    """`POST /tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: _Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[_TokenId]
    skip_special_tokens: StrictBool = False

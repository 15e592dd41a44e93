"""The words that every room shares: ids, sampling parameters, what a request gives back.

Plain data without torch, picklable, so that it can cross a process boundary.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, NewType

from pagelab.errors import RequestError

BlockId = NewType("BlockId", int)
"""Index of a block in the pool; its slots are `block_id * block_size + offset`."""

RequestId = NewType("RequestId", str)


MAX_SAMPLES = 1024
"""The most parallel samples that a request may ask for."""


class SequenceId(NamedTuple):
    """One of the `n` sequences that a request owns."""

    request_id: RequestId
    sample: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.sample}"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end of sequence, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the model's own length
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedDecoding:
    """What a text must look like: exactly one of these. Needs `pip install 'pagelab[guided]'`.

    Attributes:
        json_schema: a JSON schema, as its text or as what `json.loads` makes of it (kept as text).
        json_object: any JSON object.
        regex: a regular expression (Rust's syntax) that the whole text matches.
        choice: the text is one of these.
        grammar: a context-free grammar, in llguidance's Lark syntax or in GBNF (`root ::= …`).

    Raises:
        RequestError: none or several are given, or one is of the wrong type. What is wrong inside
            of a schema, expression or grammar is found when the request is added.
    """

    json_schema: str | bool | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: SequenceOf[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object is True or False, not {self.json_object!r}")
        texts = (self.json_schema, self.regex, self.choice, self.grammar)
        if sum(text is not None for text in texts) + self.json_object != 1:
            raise RequestError(
                "guided decoding takes exactly one of json_schema, json_object, regex, choice and "
                "grammar"
            )
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _json_text(self.json_schema))
        for name, text in (("regex", self.regex), ("grammar", self.grammar)):
            if text is not None and not isinstance(text, str):
                raise RequestError(f"{name} must be a text, not {text!r}")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))


def _json_text(schema: object) -> str:
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, Mapping | bool):
            raise RequestError(f"json_schema must be an object, not {schema!r}")
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"json_schema is no JSON: {error}") from error


def _choices(choice: object) -> tuple[str, ...]:
    several = isinstance(choice, SequenceOf) and not isinstance(choice, str)
    if not several or not choice or any(not isinstance(text, str) or not text for text in choice):  # type: ignore[attr-defined]
        raise RequestError("choice must be a list of at least one text, none of them empty")
    return tuple(choice)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Checked when constructed.

    Attributes:
        max_tokens: tokens to generate at most; None means up to the model's length.
        min_tokens: end-of-sequence and stop conditions are ignored before this many tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: drop tokens less probable than this fraction of the most probable one.
        seed: the same request with the same seed gives the same tokens, whatever else is in its
            batch; None draws one.
        n: parallel samples of the prompt.
        stop: strings that end a sequence; the text stops before the match. None: no strings.
        stop_token_ids: tokens that end a sequence, besides the model's own.
        ignore_eos: go on past end-of-sequence until `max_tokens` (for timing).
        logprobs: with each token, the log probabilities of this many most probable tokens
            (0: of the chosen one only); None: no log probabilities. They are the model's own,
            before penalties, bias, guidance, temperature and filters.
        prompt_logprobs: the same for the prompt's tokens, in `RequestOutput.prompt_logprobs`. Such
            a request reads nothing from the prefix cache.
        repetition_penalty: of each token in prompt or output, a positive logit is divided by this
            and another one multiplied; 1 changes nothing, more discourages.
        presence_penalty: subtracted from the logit of each token in the output; -2 to 2.
        frequency_penalty: subtracted as often as the token is in the output; -2 to 2.
        logit_bias: by token id, what is added to its logit after the penalties; -100 to 100.
        guided: what the text must look like. Not together with `stop`.

    How they work together: docs/sampling.md.

    Raises:
        RequestError: a value is out of its range.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: SequenceOf[str] = ()
    stop_token_ids: SequenceOf[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    guided: GuidedDecoding | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, at_least=1)
        _require_int("min_tokens", self.min_tokens, at_least=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}"
            )
        _require_number("temperature", self.temperature, 0.0, math.inf)
        _require_int("top_k", self.top_k, at_least=0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0 (1 keeps every token)")
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_int("n", self.n, at_least=1)
        if self.n > MAX_SAMPLES:
            raise RequestError(f"n must be at most {MAX_SAMPLES}, not {self.n}")
        if self.seed is not None:
            _require_int("seed", self.seed, at_least=None)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, at_least=0)
        if self.prompt_logprobs is not None:
            _require_int("prompt_logprobs", self.prompt_logprobs, at_least=0)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop must be non-empty strings")
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, at_least=0)
        self._check_logits()

    def _check_logits(self) -> None:
        """Check what changes logits, and keep the bias as a dictionary of its own."""
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty must be above 0 (1 changes nothing)")
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError("logit_bias is a dictionary: token id → what to add")
            for token, bias in self.logit_bias.items():
                _require_int("a token id of logit_bias", token, at_least=0)
                _require_number(f"logit_bias of token {token}", bias, -100.0, 100.0)
            object.__setattr__(self, "logit_bias", dict(self.logit_bias) or None)
        if self.guided is not None and not isinstance(self.guided, GuidedDecoding):
            raise RequestError(f"guided must be a GuidedDecoding, not {self.guided!r}")
        if self.guided is not None and self.stop:
            raise RequestError(
                "stop and guided cannot go together: a text that is cut need not be what guided "
                "asks for, and a grammar says itself where the text ends"
            )

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens before them."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0


def _require_int(name: str, value: object, *, at_least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number, not {value!r}")
    if at_least is not None and value < at_least:
        raise RequestError(f"{name} must be at least {at_least}, not {value}")


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, not {value!r}")
    largest = min(high, sys.float_info.max)  # NaN fails every comparison
    if not low <= value <= largest:
        bound = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise RequestError(f"{name} must be {bound} and finite, not {value}")


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position.

    `chosen` is the sampled token's; `top` holds (token id, log probability), best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


class SampledToken(NamedTuple):
    """What a step gives back for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of the engine's clock; counts of tokens.

    The formulas over these are in `pagelab.metrics`.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    token_times: list[float] = field(default_factory=list)  # of the request's first sequence
    num_cached_tokens: int = 0  # prompt tokens that a prefix hit saved, at first admission
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` results of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's results, in the order of its sequences."""

    request_id: RequestId
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    finished: bool
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One for each token of the prompt, None for the first, which nothing comes before."""

    @property
    def text(self) -> str:
        """The text of the first result."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of the first result."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first result ended; None while it runs."""
        return self.outputs[0].finish_reason

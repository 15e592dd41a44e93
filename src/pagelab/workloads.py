"""What the experiment asks of every method: requests with prompts, lengths and arrivals.

A workload is made in two steps, since lengths count in tokens of the model in use::

    prompts | mixed | large ──▶ Workload (texts, target lengths)
                                   │ tokenize(encode)   the model's tokenizer
                                   │ random_ids(vocab)  no tokenizer
                                   ▼
                                Workload (token ids)  ──▶ every method, the same ids

The same name and seed give the same workload on every machine.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pagelab.errors import ConfigError

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request.

    Attributes:
        id: unique in its workload.
        prompt_text: the prompt's text; None where only token ids are known.
        prompt_token_ids: the prompt; None before `tokenize` or `random_ids`.
        prompt_tokens: its length in tokens; before that, the length to reach, or None for the
            whole text.
        max_tokens: tokens to generate, end-of-sequence ignored.
        arrival_s: seconds after the workload's start.
    """

    id: str
    prompt_text: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    max_tokens: int = 16
    arrival_s: float = 0.0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt's token ids, once they are known."""
        assert self.prompt_token_ids is not None, f"{self.id} is not tokenized"
        return self.prompt_token_ids

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens, once the prompt is known."""
        return len(self.token_ids) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, under a name, with a sentence for people."""

    name: str
    title: str
    requests: tuple[WorkloadRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, once they are known."""
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens to generate."""
        return sum(request.max_tokens for request in self.requests)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """From what `to_json` gave."""
        requests = []
        for item in data["requests"]:
            ids = item["prompt_token_ids"]
            fields = {**item, "prompt_token_ids": None if ids is None else tuple(ids)}
            requests.append(WorkloadRequest(**fields))
        return cls(data["name"], data["title"], tuple(requests))


# Builders

SEED_PROMPTS = (
    "Hello!",
    "How are you doing today? I hope everything is going well.",
    "Tell me a story about artificial intelligence and machine learning. " * 10,
    "Thanks!",
)


def seed_prompts() -> Workload:
    """The four prompts that the project began with, 50 new tokens each."""
    return Workload(
        "prompts",
        "Four prompts, three short and one long, 50 new tokens each",
        tuple(
            WorkloadRequest(id=f"prompt-{i}", prompt_text=text, max_tokens=50)
            for i, text in enumerate(SEED_PROMPTS)
        ),
    )


def mixed(seed: int = 0) -> Workload:
    """24 requests of very different lengths.

    Prompts are log-uniform from 4 to 160 tokens (about 1,000 in all), outputs log-uniform from
    10 to 44 (about 550 in all: the slowest method makes 10 to 15 a second). Each length is drawn
    from its own 24th of the distribution, so that the totals hardly depend on the seed.
    """
    rng = random.Random(f"mixed/{seed}")
    return _generated(
        "mixed",
        "{n} requests of very different lengths: prompts of {i0} to {i1} tokens, "
        "outputs of {o0} to {o1}",
        _log_uniform(rng, 24, 4, 160),
        _log_uniform(rng, 24, 10, 44),
        rng,
    )


def large(seed: int = 0) -> Workload:
    """32 requests with prompts uniform in 16..512 tokens and outputs uniform in 16..256."""
    rng = random.Random(f"large/{seed}")
    return _generated(
        "large",
        "{n} long requests: prompts of {i0} to {i1} tokens, outputs of {o0} to {o1}",
        [_between(rng, 16, 512) for _ in range(32)],
        [_between(rng, 16, 256) for _ in range(32)],
        rng,
    )


_BUILDERS: dict[str, Callable[[int], Workload]] = {
    "prompts": lambda seed: seed_prompts(),
    "mixed": mixed,
    "large": large,
}

WORKLOADS = tuple(_BUILDERS)


def load_workload(name: str, seed: int = 0) -> Workload:
    """Make a workload by its name.

    Raises:
        ConfigError: there is no workload of that name; lists those that there are.
    """
    if name not in _BUILDERS:
        raise ConfigError(f"no workload {name!r}: --workload takes {', '.join(WORKLOADS)}")
    return _BUILDERS[name](seed)


def _generated(
    name: str, title: str, inputs: list[int], outputs: list[int], rng: random.Random
) -> Workload:
    requests = tuple(
        WorkloadRequest(
            id=f"{name}-{i}",
            prompt_text=_prose(rng, length),
            prompt_tokens=length,
            max_tokens=output,
        )
        for i, (length, output) in enumerate(zip(inputs, outputs, strict=True))
    )
    ranges = {"i0": min(inputs), "i1": max(inputs), "o0": min(outputs), "o1": max(outputs)}
    return Workload(name, title.format(n=len(requests), **ranges), requests)


def _between(rng: random.Random, low: int, high: int) -> int:
    """Uniform in low..high. Only `random()` is used: its stream is the same in every Python."""
    return low + int(rng.random() * (high - low + 1))


def _log_uniform(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    """Log-uniform in low..high, one from each of `count` equally probable parts, shuffled."""
    ratio = math.log(high / low)
    values = [round(low * math.exp(ratio * (i + rng.random()) / count)) for i in range(count)]
    order = [(rng.random(), value) for value in values]
    return [value for _, value in sorted(order)]


# Prose

_OPENINGS = (
    "Tell me about the {noun} and the {noun}.",
    "Write a short story about a {adjective} {noun} near the {place}.",
    "Explain why the {noun} was so {adjective}.",
    "Summarize what happened at the {place} this {time}.",
    "What should we do with the {adjective} {noun}?",
    "Describe the {place} as a {person} would see it.",
)
_SENTENCES = (
    "The {person} walked to the {place} and looked at the {adjective} {noun}.",
    "Every {time}, a {adjective} {noun} appeared beside the {place}.",
    "Nobody at the {place} remembered how the {noun} came to be there.",
    "A {person} and a {person} talked about the {noun} until the {time} was over.",
    "It was a {adjective} {time}, and the {noun} was more {adjective} than before.",
    "When the {person} opened the {noun}, there was only a {adjective} {noun} inside.",
    "The {place} had a {noun}, a {noun} and one very {adjective} {noun}.",
    "In the {time}, the {person} {verb} the {noun} and carried it to the {place}.",
    "Some people say that the {noun} {verb} the {noun}, but the {person} never believed it.",
    "We {verb} the {adjective} {noun} because the {person} had asked us to.",
)
_WORDS = {
    "noun": (
        "lamp river clock letter garden machine window map boat song bridge engine mirror stone "
        "book kettle forest train piano telescope ladder recipe storm painting wheel bell coin "
        "basket library computer"
    ).split(),
    "adjective": (
        "quiet bright old strange careful heavy blue small curious broken golden distant warm "
        "narrow famous simple hidden gentle cold busy"
    ).split(),
    "place": (
        "harbour station market mountain village theatre school island workshop kitchen museum "
        "valley lighthouse farm hospital"
    ).split(),
    "person": (
        "teacher sailor doctor child farmer engineer painter neighbour student gardener writer "
        "musician baker scientist traveller"
    ).split(),
    "time": "morning evening winter summer afternoon night autumn spring".split(),
    "verb": "found repaired painted followed moved described sold borrowed measured kept".split(),
}


def _prose(rng: random.Random, words: int) -> str:
    """English sentences with at least this many words, and so at least as many tokens."""
    sentences = [_fill(rng, _OPENINGS)]
    count = len(sentences[0].split())
    while count < words:
        sentences.append(_fill(rng, _SENTENCES))
        count += len(sentences[-1].split())
    return " ".join(sentences)


def _fill(rng: random.Random, templates: Sequence[str]) -> str:
    parts = _pick(rng, templates).split("{")
    text = parts[0]
    for part in parts[1:]:
        kind, _, rest = part.partition("}")
        text += _pick(rng, _WORDS[kind]) + rest
    return text


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[int(rng.random() * len(items))]


# Token ids


def tokenize(workload: Workload, encode: Encode, decode: Decode | None = None) -> Workload:
    """Turn texts into token ids of the promised lengths.

    Args:
        workload: with texts.
        encode: text → token ids, without special tokens.
        decode: token ids → text, to show the text that was kept after cutting; without it the
            whole text is kept for display.

    Raises:
        ConfigError: a prompt is empty in this tokenizer.
    """

    def ids_of(request: WorkloadRequest) -> WorkloadRequest:
        if request.prompt_text is None:
            return request
        ids = tuple(int(token) for token in encode(request.prompt_text))
        if not ids:
            raise ConfigError(f"the prompt of {request.id} has no tokens in this tokenizer")
        text, target = request.prompt_text, request.prompt_tokens
        if target is not None and len(ids) != target:
            ids = tuple(_fit(ids, target))
            text = decode(ids) if decode is not None else text
        return dataclasses.replace(
            request, prompt_text=text, prompt_token_ids=ids, prompt_tokens=len(ids)
        )

    return dataclasses.replace(workload, requests=tuple(map(ids_of, workload.requests)))


def random_ids(workload: Workload, vocab_size: int, seed: int = 0) -> Workload:
    """Give every prompt seeded random ids below `vocab_size`, for models without a tokenizer.

    A text without a promised length counts four tokens for three words.
    """
    rng = random.Random(f"ids/{workload.name}/{seed}")

    def ids_of(request: WorkloadRequest) -> WorkloadRequest:
        length = request.prompt_tokens
        if length is None:
            length = max(1, len((request.prompt_text or "").split()) * 4 // 3)
        ids = tuple(int(rng.random() * vocab_size) for _ in range(length))
        return dataclasses.replace(
            request, prompt_text=None, prompt_token_ids=ids, prompt_tokens=length
        )

    return dataclasses.replace(workload, requests=tuple(map(ids_of, workload.requests)))


def _fit(ids: Sequence[int], length: int) -> Iterator[int]:
    """Exactly `length` ids: cut, or from the beginning again."""
    for i in range(length):
        yield ids[i % len(ids)]

"""From texts and lengths to token ids, which are the same for every method.

A request without a text gets ids of its length. What it shares with others is exact::

    no hash ids   [number of the request | a piece of the pool                        ]
    hash ids      [id | 512 in all       ][id | 512 in all       ][id | what remains  ]

The pool is a long run of tokens, random ones or encoded prose. The number in front keeps requests
apart, from their first block on, and equal hash ids give equal tokens. So a prompt of a thousand
tokens is two copies of memory, and prompts share the pool's integers.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence

from pagelab.errors import ConfigError
from pagelab.workloads.prose import prose
from pagelab.workloads.request import Workload, WorkloadRequest
from pagelab.workloads.shapes import HASH_BLOCK, RequestShape

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]

_POOL = 1 << 16  # tokens of the random pool: 2.8 MB, made in 10 ms
_PROSE_WORDS = 4096  # of the encoded pool
_NUMBERS = 1 << 40  # that the front of a piece can tell apart


def tokenize(workload: Workload, encode: Encode, decode: Decode | None = None) -> Workload:
    """Turn texts into token ids of the promised lengths.

    Args:
        workload: with texts, or with lengths only: then prompts are pieces of prose in this
            tokenizer, with the same beginning where hash ids say so.
        encode: text → token ids, without special tokens.
        decode: token ids → text, to show the text that was kept after cutting; without it the
            whole text is kept for display.

    Raises:
        ConfigError: a prompt is empty in this tokenizer.
    """
    source: PromptSource | None = None

    def ids_of(index: int, request: WorkloadRequest) -> WorkloadRequest:
        nonlocal source
        if request.prompt_text is None:
            if request.prompt_tokens is None or request.prompt_token_ids is not None:
                return request
            source = source or encoded_source(encode, workload.name)
            return _with_ids(request, index, source, decode)
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

    return dataclasses.replace(workload, requests=_map(ids_of, workload))


def random_ids(workload: Workload, vocab_size: int, seed: int = 0) -> Workload:
    """Give every prompt seeded random ids below `vocab_size`, for models without a tokenizer.

    A text without a promised length counts four tokens for three words. A request without a
    text gets what `request_of` gives a shape.
    """
    rng = random.Random(f"ids/{workload.name}/{seed}")

    def ids_of(index: int, request: WorkloadRequest) -> WorkloadRequest:
        if request.prompt_text is None and request.prompt_tokens is not None:
            return _with_ids(request, index, random_source(vocab_size, workload.name, seed))
        length = request.prompt_tokens
        if length is None:
            length = estimated_tokens(request.prompt_text or "")
        ids = tuple(int(rng.random() * vocab_size) for _ in range(length))
        return dataclasses.replace(
            request, prompt_text=None, prompt_token_ids=ids, prompt_tokens=length
        )

    return dataclasses.replace(workload, requests=_map(ids_of, workload))


def estimated_tokens(text: str) -> int:
    """Tokens of a text without a tokenizer: four for three words, at least one."""
    return max(1, len(text.split()) * 4 // 3)


def request_of(
    shape: RequestShape, index: int, *, name: str, vocab_size: int, seed: int
) -> WorkloadRequest:
    """A request with seeded random token ids of the shape's length.

    Args:
        shape: its lengths; prompts whose `hash_ids` begin alike begin alike.
        index: its place in the stream; requests of other places share no prefix (but by hash
            ids, and by chance where a prompt is too short to hold its number).
        name: of the workload: prompts of other workloads differ.
        vocab_size: ids are below it.
        seed: other seeds, other ids.
    """
    source = random_source(vocab_size, name, seed)
    return WorkloadRequest(
        id=f"{name}-{index}",
        prompt_token_ids=source.prompt(shape.input_tokens, index, shape.hash_ids),
        prompt_tokens=shape.input_tokens,
        max_tokens=shape.output_tokens,
        arrival_s=shape.arrival_s,
        asked_tokens=shape.max_tokens,
        hash_ids=shape.hash_ids,
    )


class PromptSource:
    """Makes prompts of any length from one pool of tokens."""

    def __init__(self, pool: Sequence[int], number: Callable[[int], tuple[int, ...]]) -> None:
        """With the tokens of pieces, and what writes a number in front of one."""
        self._length = len(pool)
        self._pool = tuple(pool) * 2  # a piece may begin anywhere
        self._number = number

    def prompt(self, length: int, index: int, hash_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
        """`length` token ids for the request with this index."""
        if not hash_ids:
            return self._piece(2 * index, length)
        ids: list[int] = []
        for hash_id in hash_ids:
            ids += self._piece(2 * hash_id + 1, min(HASH_BLOCK, length - len(ids)))
            if len(ids) == length:
                return tuple(ids)
        ids += self._piece(2 * index, length - len(ids))  # fewer hash ids than tokens
        return tuple(ids)

    def _piece(self, number: int, length: int) -> tuple[int, ...]:
        front = self._number(number)
        rest = length - len(front)
        if rest <= 0:
            return front[:length]
        start = number * 2654435761 % self._length  # Knuth's: neighbours begin far apart
        if rest <= self._length:
            return front + self._pool[start : start + rest]
        turned = self._pool[start : start + self._length]
        return front + (turned * (rest // self._length + 1))[:rest]


@functools.lru_cache(maxsize=4)
def random_source(vocab_size: int, name: str, seed: int) -> PromptSource:
    """Prompts of random token ids below `vocab_size`."""
    rng = random.Random(f"ids/{name}/{seed}/pool")
    pool = [int(rng.random() * vocab_size) for _ in range(_POOL)]
    digits, reach = 1, vocab_size
    while reach < _NUMBERS and vocab_size > 1:
        digits, reach = digits + 1, reach * vocab_size

    def number(value: int) -> tuple[int, ...]:
        written = []
        for _ in range(digits):
            value, digit = divmod(value, vocab_size)
            written.append(digit)
        return tuple(written)

    return PromptSource(pool, number)


def encoded_source(encode: Encode, name: str) -> PromptSource:
    """Prompts of prose in a tokenizer's tokens.

    Raises:
        ConfigError: the tokenizer gives no tokens.
    """
    pool = [int(token) for token in encode(prose(random.Random(f"prose/{name}"), _PROSE_WORDS))]
    if not pool:
        raise ConfigError("this tokenizer gives no tokens for English text")

    def number(value: int) -> tuple[int, ...]:
        return tuple(int(token) for token in encode(f"Number {value}. "))

    return PromptSource(pool, number)


def _with_ids(
    request: WorkloadRequest, index: int, source: PromptSource, decode: Decode | None = None
) -> WorkloadRequest:
    assert request.prompt_tokens is not None
    ids = source.prompt(request.prompt_tokens, index, request.hash_ids)
    text = None if decode is None else decode(ids)
    return dataclasses.replace(request, prompt_text=text, prompt_token_ids=ids)


def _map(
    change: Callable[[int, WorkloadRequest], WorkloadRequest], workload: Workload
) -> tuple[WorkloadRequest, ...]:
    return tuple(change(index, request) for index, request in enumerate(workload.requests))


def _fit(ids: Sequence[int], length: int) -> Iterator[int]:
    """Exactly `length` ids: cut, or from the beginning again."""
    for i in range(length):
        yield ids[i % len(ids)]

"""What a benchmark asks: lengths that others have published figures for, and any others.

::

    prompts4    4 requests of 2, 13, 130 and 2 tokens, 50 out: the old experiment's
    batch64     64 requests of 128 tokens, 256 out
    nano256     256 requests with the lengths of nano-vllm's bench.py, cut to the model's length
    w2          32 requests of 18 to 245 tokens, 21 to 124 out: the mixed load for a CPU

Token ids are random, seeded, and no two prompts begin alike, so that nothing depends on a text or
on a prefix that was seen before.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass

from pagelab.errors import ConfigError
from pagelab.workloads import (
    KINDS,
    RequestShape,
    ShapeOptions,
    ShapeStream,
    Workload,
    WorkloadRequest,
    load_workload,
    random_ids,
)
from pagelab.workloads.shapes import Source

NAMED = ("prompts4", "batch64", "nano256", "w2")
"""Names beside those of `pagelab.workloads`."""

DEFAULT = "prompts4"

Lengths = tuple[int, int]
"""Tokens in, tokens out."""

_PROMPTS4: tuple[Lengths, ...] = ((2, 50), (13, 50), (130, 50), (2, 50))
_W2_TEXT = (
    "232,65 120,88 149,120 42,92 49,21 57,98 217,124 210,45 217,70 236,72 64,106 18,113 87,57 "
    "77,119 119,94 77,98 49,30 158,55 142,61 42,107 139,115 50,83 32,83 31,59 71,38 156,99 21,77 "
    "245,80 37,26 224,56 120,39 207,99"
)
_NANO_VOCAB = 10_000
_NANO_LEAST = 100  # tokens of its shortest output


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadChoice:
    """What the options say; exactly one of a name and lengths, or neither for the default.

    Attributes:
        name: of `NAMED`, or what `pagelab.workloads` opens.
        num_requests: how many; not for `NAMED`, which are what they are.
        input_len: tokens of every prompt.
        output_len: tokens that every request generates.
        rate: when they arrive (`pagelab.workloads.arrivals`); None: all at the start.
    """

    name: str | None = None
    num_requests: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    rate: str | None = None

    def __post_init__(self) -> None:
        for option, value in (
            ("--num-requests", self.num_requests),
            ("--input-len", self.input_len),
            ("--output-len", self.output_len),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, not {value}")
        if (self.input_len is None) != (self.output_len is None):
            raise ConfigError("--input-len and --output-len go together: give both or neither")
        if self.name is not None and self.input_len is not None:
            raise ConfigError("--workload has lengths of its own: leave --input-len, --output-len")
        if self.num_requests is not None and self.input_len is None:
            if self.name is None:
                raise ConfigError("--num-requests needs --input-len and --output-len, or a name")
            if self.name in NAMED:
                raise ConfigError(f"--num-requests: {self.name} has a number of its own; leave it")

    @property
    def longest(self) -> int | None:
        """Tokens of a request, where the options say so themselves."""
        if self.input_len is None or self.output_len is None:
            return None
        return self.input_len + self.output_len


def build_workload(
    choice: WorkloadChoice, *, vocab_size: int, max_model_len: int, seed: int
) -> Workload:
    """The requests with their token ids.

    Requests longer than `max_model_len` are cut in `nano256` and in the catalogue's workloads (the
    title says so) and refused in the others.

    Raises:
        ConfigError: no such workload, options that do not fit it, or requests that are too long.
    """
    options = ShapeOptions(
        num_requests=choice.num_requests,
        rate=choice.rate or "burst",
        max_model_len=max_model_len,
        too_long="clip",
    )
    name = choice.name or DEFAULT
    if choice.longest is not None:
        n, i, o = choice.num_requests or 1, choice.input_len, choice.output_len
        assert i is not None
        assert o is not None
        workload = _of_lengths(f"{n}x{i}+{o}", f"{n} requests of {i} in, {o} out", [(i, o)] * n)
        name = workload.name
    elif name == "nano256":
        workload = _nano256(vocab_size, max_model_len)
    elif name in NAMED:
        workload = _named(name)
    else:
        return random_ids(_from_catalogue(name, seed, options), vocab_size, seed)
    too_long = next((r for r in workload.requests if _tokens(r) > max_model_len), None)
    if too_long is not None:
        raise ConfigError(
            f"{workload.name} has a request of {_tokens(too_long):,} tokens, more than the longest "
            f"possible here, {max_model_len:,}: raise --max-model-len or take a shorter workload"
        )
    workload = _arriving(workload, choice.rate, seed)
    return workload if name == "nano256" else random_ids(workload, vocab_size, seed)


def nano_lengths(max_model_len: int | None = None) -> list[Lengths]:
    """The lengths of nano-vllm's benchmark, cut so that each prompt leaves 100 tokens of room.

    Source: `bench.py` of nano-vllm, whose order of draws this repeats.
    """
    return [(len(ids), out) for ids, out in _nano_requests(max_model_len)]


def _named(name: str) -> Workload:
    if name == "prompts4":
        return _of_lengths(name, "4 requests of 2, 13, 130 and 2 in, 50 out", _PROMPTS4)
    if name == "batch64":
        return _of_lengths(name, "64 requests of 128 in, 256 out", [(128, 256)] * 64)
    pairs = [pair.split(",") for pair in _W2_TEXT.split()]
    lengths = [(int(i), int(o)) for i, o in pairs]
    return _of_lengths(name, "32 requests of 18 to 245 in, 21 to 124 out", lengths)


def _nano256(vocab_size: int, max_model_len: int) -> Workload:
    """nano-vllm's own token ids too, where the vocabulary has them."""
    requests = tuple(
        WorkloadRequest(
            id=f"nano256-{index}",
            prompt_token_ids=tuple(token % vocab_size for token in ids),
            prompt_tokens=len(ids),
            max_tokens=out,
        )
        for index, (ids, out) in enumerate(_nano_requests(max_model_len))
    )
    cut = f", cut to {max_model_len:,} together" if max_model_len < 2048 else ""
    return Workload("nano256", f"256 requests of 100 to 1024 in, 100 to 1024 out{cut}", requests)


def _nano_requests(max_model_len: int | None) -> list[tuple[list[int], int]]:
    if max_model_len is not None and max_model_len <= _NANO_LEAST:
        raise ConfigError(
            f"nano256 needs a length above {_NANO_LEAST}, not {max_model_len}: "
            "raise --max-model-len or take another --workload"
        )
    draw = random.Random(0).randint
    prompts = [[draw(0, _NANO_VOCAB) for _ in range(draw(100, 1024))] for _ in range(256)]
    outputs = [draw(100, 1024) for _ in range(256)]
    if max_model_len is None:
        return list(zip(prompts, outputs, strict=True))
    prompts = [ids[: max_model_len - _NANO_LEAST] for ids in prompts]
    return [
        (ids, min(out, max_model_len - len(ids))) for ids, out in zip(prompts, outputs, strict=True)
    ]


def _tokens(request: WorkloadRequest) -> int:
    return (request.prompt_tokens or 0) + request.max_tokens


def _arriving(workload: Workload, rate: str | None, seed: int) -> Workload:
    """The same requests at the times that a rate draws."""
    if rate is None:
        return workload
    shapes = [RequestShape(r.prompt_tokens or 1, r.max_tokens) for r in workload.requests]
    source = Source(workload.name, workload.title, lambda _, __: iter(shapes))
    stream = ShapeStream(source, ShapeOptions(rate=rate), seed)
    requests = tuple(
        dataclasses.replace(request, arrival_s=shape.arrival_s)
        for request, shape in zip(workload.requests, stream, strict=True)
    )
    return Workload(workload.name, stream.title, requests)


def _of_lengths(name: str, title: str, lengths: Iterable[Lengths]) -> Workload:
    requests = tuple(
        WorkloadRequest(id=f"{name}-{index}", prompt_tokens=tokens, max_tokens=output)
        for index, (tokens, output) in enumerate(lengths)
    )
    return Workload(name, title, requests)


def _from_catalogue(name: str, seed: int, options: ShapeOptions) -> Workload:
    try:
        workload = load_workload(name, seed, options)
    except ConfigError as error:
        if str(error).startswith("no workload"):
            known = f"{', '.join(NAMED)}, {KINDS}"
            raise ConfigError(f"no workload {name!r}: --workload takes {known}") from error
        raise
    counts = workload.counts
    if counts is None or not counts.sentence():
        return workload
    return dataclasses.replace(workload, title=f"{workload.title}; {counts.sentence()}")

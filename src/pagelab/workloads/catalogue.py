"""What `--workload` takes, and how it is opened: by name, by a generator's options, by file."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pagelab.errors import ConfigError
from pagelab.workloads import lengths
from pagelab.workloads.named import BUILDERS
from pagelab.workloads.request import Workload, WorkloadRequest
from pagelab.workloads.shapes import RequestShape, ShapeOptions, ShapeStream, Source, Tally
from pagelab.workloads.token_ids import Encode, estimated_tokens
from pagelab.workloads.traces import open_trace

Draw = Callable[[random.Random], Iterator[RequestShape]]

GENERATORS = ("sharegpt-like", "alpaca-like", "uniform")
WORKLOADS = (*BUILDERS, "sharegpt-like", "alpaca-like")
"""Names that need nothing more."""

KINDS = (
    f"seed, {', '.join(WORKLOADS)} (both also with a number: sharegpt-like:n=200), "
    "uniform:in=16..256,out=16..128,n=32 or a trace file (.csv, .json, .jsonl)"
)

_ALIASES = {"seed": "prompts"}  # the four prompts that the project began with
_FILE_ENDINGS = (".csv", ".json", ".jsonl", ".csv.gz", ".json.gz", ".jsonl.gz")
_DEFAULT_N = {"sharegpt-like": 64, "alpaca-like": 64, "uniform": 32}
_DEFAULT_OPTIONS = ShapeOptions()


def open_shapes(
    spec: str,
    *,
    seed: int = 0,
    options: ShapeOptions = _DEFAULT_OPTIONS,
    encode: Encode | None = None,
) -> ShapeStream:
    """Open a workload as a lazy stream of shapes.

    Args:
        spec: a name, a generator with options, or a trace file (`KINDS`).
        seed: of generators and of drawn arrivals.
        options: how many, when, and what happens to those that are too long or malformed.
        encode: counts the tokens of texts; without it they are estimated.

    Raises:
        ConfigError: there is no such workload (lists those that there are), or the file or the
            options cannot be used. Malformed lines show only when the stream is read.
    """
    kind, colon, rest = spec.partition(":")
    name = _ALIASES.get(spec, spec)
    if name in BUILDERS:
        source = _text_source(name, seed, encode)
    elif kind in GENERATORS:
        source = _generator(kind, rest if colon else None, seed, options)
    elif _is_file(spec):
        source = open_trace(Path(spec).expanduser(), skip_bad=options.skip_bad, encode=encode)
    else:
        raise ConfigError(f"no workload {spec!r}: --workload takes {KINDS}")
    return ShapeStream(source, options, seed)


def load_workload(
    spec: str,
    seed: int = 0,
    options: ShapeOptions = _DEFAULT_OPTIONS,
    encode: Encode | None = None,
) -> Workload:
    """A workload as a list in memory; `tokenize` or `random_ids` then gives it token ids.

    Arguments and errors as `open_shapes`, and the errors of reading the stream.
    """
    name = _ALIASES.get(spec, spec)
    if name in BUILDERS and options == _DEFAULT_OPTIONS:
        return BUILDERS[name](seed)
    stream = open_shapes(spec, seed=seed, options=options, encode=encode)
    requests = tuple(
        WorkloadRequest(
            id=f"{stream.name}-{index}",
            prompt_text=shape.text,
            prompt_tokens=_length(shape, stream.source.estimated),
            max_tokens=shape.output_tokens,
            arrival_s=shape.arrival_s,
            asked_tokens=shape.max_tokens,
            hash_ids=shape.hash_ids,
        )
        for index, shape in enumerate(stream)
    )
    return Workload(
        stream.name, f"{len(requests):,} requests: {stream.title}", requests, stream.counts
    )


def split_specs(text: str) -> tuple[str, ...]:
    """The workloads of a list with commas; the commas of a generator's options do not split it."""
    specs: list[str] = []
    for part in map(str.strip, text.split(",")):
        option = re.match(r"(in|out|n)=\d", part)
        if option and specs and specs[-1].partition(":")[0] in GENERATORS:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return tuple(filter(None, specs))


def _length(shape: RequestShape, estimated: bool) -> int | None:
    """The prompt's length to reach; None for a whole text whose length is only estimated."""
    whole = estimated and shape.text is not None
    if whole and shape.input_tokens == estimated_tokens(shape.text or ""):
        return None
    return shape.input_tokens


def _is_file(spec: str) -> bool:
    return "/" in spec or spec.lower().endswith(_FILE_ENDINGS) or Path(spec).exists()


def _text_source(name: str, seed: int, encode: Encode | None) -> Source:
    """A named workload's requests; each pass of a seeded one has others."""
    first = BUILDERS[name](seed)
    exact = encode is not None or all(r.prompt_tokens for r in first.requests)

    def one_pass(number: int, tally: Tally) -> Iterator[RequestShape]:
        workload = BUILDERS[name](seed + 1_000_003 * number) if number else first
        for request in workload.requests:
            text, tokens = request.prompt_text or "", request.prompt_tokens
            if tokens is None:
                tokens = len(encode(text)) if encode is not None else estimated_tokens(text)
            yield RequestShape(tokens, request.max_tokens, text=text)

    title = first.title[:1].lower() + first.title[1:]
    return Source(first.name, title, one_pass, estimated=not exact)


def _generator(kind: str, rest: str | None, seed: int, options: ShapeOptions) -> Source:
    given = _parse_options(kind, rest)
    n = given.pop("n", (_DEFAULT_N[kind],) * 2)[0]
    draw: Draw
    if kind == "uniform":
        inputs, outputs = given.get("in"), given.get("out")
        if inputs is None or outputs is None:
            raise ConfigError("uniform needs both lengths: uniform:in=16..256,out=16..128,n=32")

        def draw(rng: random.Random) -> Iterator[RequestShape]:
            return lengths.uniform(rng, inputs, outputs)

        name = f"uniform-{inputs[0]}..{inputs[1]}-{outputs[0]}..{outputs[1]}"
        title = "prompts of {}..{} tokens, outputs of {}..{}, uniform".format(*inputs, *outputs)
    else:
        draw = lengths.sharegpt_like if kind == "sharegpt-like" else lengths.alpaca_like
        name = kind
        title = f"lengths like {'ShareGPT' if draw is lengths.sharegpt_like else 'Alpaca'}'s"
    count = options.num_requests or n

    def one_pass(number: int, tally: Tally) -> Iterator[RequestShape]:
        stream = f"{kind}/{seed}/{number}" if number else f"{kind}/{seed}"
        return itertools.islice(draw(random.Random(stream)), count)

    label = name if n == _DEFAULT_N[kind] else f"{name}-n{n}"
    return Source(label, title, one_pass)


def _parse_options(kind: str, rest: str | None) -> dict[str, tuple[int, int]]:
    """`in=16..256,out=8,n=32` as ranges."""
    keys = ("in", "out", "n") if kind == "uniform" else ("n",)
    found: dict[str, tuple[int, int]] = {}
    for part in [] if rest is None else rest.split(","):
        match = re.fullmatch(r"(\w+)=(\d{1,9})(?:\.\.(\d{1,9}))?", part.strip(), re.ASCII)
        if not match or match[1] not in keys or match[1] in found:
            raise ConfigError(
                f"cannot read {part.strip()!r} in {kind}:{rest}: it takes "
                + ("in=16..256,out=16..128,n=32" if kind == "uniform" else "n=200")
            )
        low, high = int(match[2]), int(match[3] or match[2])
        if not 1 <= low <= high or (match[1] == "n" and match[3]):
            raise ConfigError(f"{part.strip()!r} in {kind}:{rest} is no range from 1 upwards")
        found[match[1]] = (low, high)
    return found

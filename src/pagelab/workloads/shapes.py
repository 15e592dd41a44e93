"""Shapes of requests: lengths and arrivals, before there are token ids.

A stream of shapes is lazy and can be read again, so that a million requests fit in any memory::

    source (trace file, generator) ─▶ too long? ─▶ n requests ─▶ arrivals ─▶ RequestShape …
         │ ends: once more from the     drop,         stop        the trace's, Poisson, …
         │ beginning, shifted in time   clip, error
         ◀──────────────────────────────────────────────┘

Every step counts what it left out (`ShapeCounts`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pagelab.errors import ConfigError
from pagelab.workloads.arrivals import Rate, parse_rate

HASH_BLOCK = 512
"""Prompt tokens that one of a shape's `hash_ids` stands for (Mooncake's format)."""

TooLong = Literal["drop", "clip", "error"]


class RequestShape(NamedTuple):
    """A request before it has token ids.

    Attributes:
        input_tokens: of the prompt, at least 1.
        output_tokens: to generate, at least 1.
        arrival_s: seconds after the stream's first request.
        hash_ids: one for each 512 prompt tokens, the last one for what remains. Equal ids stand
            for equal tokens, so prompts that begin with the same ids share a prefix. Empty: the
            prompt shares nothing.
        max_tokens: what the client asked for at most, where it differs from `output_tokens`.
        text: the prompt's text, where there is one.
    """

    input_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    hash_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOptions:
    """What to take of a source of requests.

    Attributes:
        num_requests: how many to give; None for a trace's own length or a generator's default.
            Dropped ones do not count. A source that is shorter begins again.
        rate: when they arrive (`pagelab.workloads.arrivals`); None for the source's own times,
            or all at once where it has none.
        max_model_len: tokens that prompt and output may have together; None for no limit.
        too_long: what happens to a request beyond it.
        skip_bad: leave malformed lines out and count them; else they are errors.
        asked_tokens: the `max_tokens` of every client. A request's output is as the source says,
            but an allocator that reserves must reserve for this. Never less than the output, and
            at most what `max_model_len` leaves beside the prompt, as servers do.
    """

    num_requests: int | None = None
    rate: str | None = None
    max_model_len: int | None = None
    too_long: TooLong = "error"
    skip_bad: bool = False
    asked_tokens: int | None = None

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--requests", self.num_requests, 1),
            ("--max-model-len", self.max_model_len, 2),
            ("--asked-tokens", self.asked_tokens, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} must be at least {least}, not {value}")
        if self.too_long not in ("drop", "clip", "error"):
            raise ConfigError(f"--too-long takes drop, clip or error, not {self.too_long!r}")
        parse_rate(self.rate)


@dataclass(frozen=True, slots=True)
class ShapeCounts:
    """What a pass over a stream met.

    Attributes:
        read: requests that the source gave, dropped ones included.
        bad: malformed lines that were skipped (with `skip_bad`).
        dropped: requests that were too long and left out.
        clipped: requests that were too long and cut.
        left_out: entries that hold no request: a trace's failed ones, conversations without an
            answer.
        passes: how often the source was begun.
        first_bad: what was wrong with the first bad line, with file and line number.
    """

    read: int = 0
    bad: int = 0
    dropped: int = 0
    clipped: int = 0
    left_out: int = 0
    passes: int = 0
    first_bad: str | None = None

    def sentence(self) -> str:
        """What was left out or cut, for people; empty if nothing was."""
        parts = []
        if self.dropped:
            parts.append(f"{self.dropped:,} too long and dropped")
        if self.clipped:
            parts.append(f"{self.clipped:,} too long and cut")
        if self.left_out:
            parts.append(f"{self.left_out:,} entries without a request left out")
        if self.bad:
            parts.append(f"{self.bad:,} bad lines skipped (the first: {self.first_bad})")
        return "; ".join(parts)


class Tally:
    """The counts of a pass that goes on."""

    __slots__ = ("bad", "clipped", "dropped", "first_bad", "left_out", "passes", "read")

    def __init__(self) -> None:
        self.read = self.bad = self.dropped = self.clipped = self.left_out = self.passes = 0
        self.first_bad: str | None = None

    def note_bad(self, message: str) -> None:
        """Count a malformed line."""
        self.bad += 1
        self.first_bad = self.first_bad or message

    def counts(self) -> ShapeCounts:
        """As they are now."""
        return ShapeCounts(
            self.read,
            self.bad,
            self.dropped,
            self.clipped,
            self.left_out,
            self.passes,
            self.first_bad,
        )


@dataclass(frozen=True, slots=True)
class Source:
    """Where shapes come from.

    Attributes:
        name: short; labels runs and makes request ids.
        title: for people, begins in lower case ("requests of …").
        one_pass: the source's shapes from the beginning, in order of arrival. Takes the number
            of the pass (a generator gives others in each) and what to count in.
        own_arrivals: whether the shapes come with times.
        estimated: whether lengths were estimated from words, for want of a tokenizer.
    """

    name: str
    title: str
    one_pass: Callable[[int, Tally], Iterator[RequestShape]]
    own_arrivals: bool = False
    estimated: bool = False


class ShapeStream:
    """Requests in order of arrival; each `iter()` begins again and gives the same."""

    def __init__(self, source: Source, options: ShapeOptions, seed: int) -> None:
        """Check that the source and the options fit together.

        Raises:
            ConfigError: `rate` asks for the trace's own arrivals and it has none.
        """
        self.source = source
        self.options = options
        self._seed = seed
        self._rate = _resolve(parse_rate(options.rate), source)
        self._tally = Tally()

    @property
    def name(self) -> str:
        """A short label."""
        return self.source.name

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.source.title}, {self._rate.words}"

    @property
    def has_arrivals(self) -> bool:
        """Whether requests arrive over time; else all are there at the start."""
        return self._rate.kind != "burst"

    @property
    def counts(self) -> ShapeCounts:
        """Of the latest pass, so far."""
        return self._tally.counts()

    def __iter__(self) -> Iterator[RequestShape]:
        """A pass.

        Raises:
            ConfigError: a malformed line, a request that is too long, an unreadable file; the
                message names the option that helps.
        """
        self._tally = Tally()
        shapes: Iterator[RequestShape] = self._kept(self._tally)
        if self.options.num_requests is not None:
            shapes = itertools.islice(shapes, self.options.num_requests)
        return self._rate.apply(shapes, self._seed)

    def _kept(self, tally: Tally) -> Iterator[RequestShape]:
        """Shapes that fit, pass after pass if a number of requests is wanted."""
        shift, base = 0.0, 0  # of this pass: seconds, hash ids
        for number in itertools.count():
            tally.passes += 1
            kept, first, last, top = 0, 0.0, 0.0, -1
            for raw in self.source.one_pass(number, tally):
                tally.read += 1
                shape = _fit(raw, tally.read, self.source.name, self.options, tally)
                if shape is None:
                    continue
                last = shape.arrival_s
                if not kept:
                    first = last
                kept += 1
                if shape.hash_ids:
                    top = max(top, *shape.hash_ids)
                if number:
                    moved = tuple(i + base for i in shape.hash_ids)
                    shape = shape._replace(arrival_s=last + shift, hash_ids=moved)
                yield shape
            if not kept:
                raise ConfigError(_nothing(self.source.name, self.options, tally))
            if self.options.num_requests is None:
                return
            # The next pass follows after a mean gap, as the request after the last one would.
            shift += (last - first) * kept / max(1, kept - 1)
            base += top + 1


def _resolve(rate: Rate | None, source: Source) -> Rate:
    if rate is None:
        return Rate("trace") if source.own_arrivals else Rate("burst")
    if rate.kind == "trace" and not source.own_arrivals:
        raise ConfigError(
            f"--rate trace: {source.name} has no arrivals of its own; "
            "take --rate burst, or a number of requests a second"
        )
    return rate


def _fit(
    shape: RequestShape, number: int, name: str, options: ShapeOptions, tally: Tally
) -> RequestShape | None:
    """The shape within `max_model_len`, and with what its client asks for; None: dropped.

    A clipped request keeps its output where it can: the end of its prompt goes first, to one
    token if need be, then the end of its output. The beginning of the prompt stays, so that
    shared prefixes stay shared.
    """
    limit, asked = options.max_model_len, options.asked_tokens or shape.max_tokens
    tokens, output, hash_ids = shape.input_tokens, shape.output_tokens, shape.hash_ids
    if limit is None or tokens + output <= limit:
        if asked is None:
            return shape
    elif options.too_long == "drop":
        tally.dropped += 1
        return None
    elif options.too_long == "error":
        raise ConfigError(
            f"request {number} of {name} has {tokens:,} tokens in and {output:,} out, more than "
            f"--max-model-len {limit:,}: --too-long drop|clip leaves such requests out or cuts "
            "them"
        )
    else:
        tally.clipped += 1
        tokens = max(1, min(tokens, limit - output))
        output = min(output, limit - tokens)
        hash_ids = hash_ids[: -(-tokens // HASH_BLOCK)]
    if asked is not None:
        asked = max(output, asked if limit is None else min(asked, limit - tokens))
    return shape._replace(
        input_tokens=tokens,
        output_tokens=output,
        hash_ids=hash_ids,
        max_tokens=None if asked == output else asked,
    )


def _nothing(name: str, options: ShapeOptions, tally: Tally) -> str:
    if tally.dropped:
        return (
            f"all {tally.read:,} requests of {name} are longer than "
            f"--max-model-len {options.max_model_len:,}; --too-long clip cuts them"
        )
    return f"{name} has no requests ({tally.counts().sentence() or 'it is empty'})"

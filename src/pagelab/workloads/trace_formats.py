"""What the entries of each trace format hold, and how they become shapes."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagelab.workloads.shapes import HASH_BLOCK, RequestShape
from pagelab.workloads.token_ids import Encode, estimated_tokens
from pagelab.workloads.trace_lines import BadLineError

MOST_TOKENS = 1 << 24
"""Of a prompt or an output: beyond any model's context, so a mistake."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MOST_SECONDS = 1e11  # 3,000 years, so that dates as seconds pass


@dataclass(frozen=True, slots=True)
class Format:
    """How the entries of one file are read.

    Attributes:
        title: what the trace is, for people.
        parse: a line (or an item of an array) → its shape, None if it holds no request.
        header_line: number of the line that is no entry; 0 for none.
        array: entries are the items of one JSON array.
        own_arrivals: shapes come with times.
        estimated: lengths are estimated from words.
    """

    title: str
    parse: Callable[[Any], RequestShape | None]
    header_line: int = 0
    array: bool = False
    own_arrivals: bool = False
    estimated: bool = False


# Values


def tokens_of(value: object, what: str) -> int:
    """A number of tokens, at least 1.

    Raises:
        BadLineError: it is none.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal() and text.isascii() and len(text) < 20:
            value = int(text)
        else:
            value = _float(text)
    if isinstance(value, float) and value.is_integer():  # 12.0, as some tools write counts
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise BadLineError(f"{what} is {_short(value)}, not a count from 1 to {MOST_TOKENS:,}")
    return value


def seconds_of(value: object, what: str) -> float:
    """A time in seconds.

    Raises:
        BadLineError: it is none.
    """
    number = _float(value) if isinstance(value, str) else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not 0 <= number <= _MOST_SECONDS
    ):
        raise BadLineError(f"{what} is {_short(number)}, not a time in seconds from 0")
    return float(number)


def _date(value: object, what: str) -> float:
    """Seconds of an ISO date; without a zone it counts as UTC."""
    try:
        date = datetime.datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise BadLineError(f"{what} is {_short(value)}, not a date") from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return (date - _EPOCH).total_seconds()


def _float(text: str) -> float | str:
    """The number; the text again if it is none, for the message."""
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def _short(value: object) -> str:
    text = repr(value) if value != "" else "empty"
    return text if len(text) <= 40 else f"{text[:37]}..."


# CSV


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a CSV format, in lower case.

    Attributes:
        arrival: its column; may be absent if `arrival_optional`.
        failed: 0 tokens in and out or out alone mark a request that failed.
        asked: a column with what the client asked for at most, if it is there.
    """

    title: str
    arrival: str
    input: str
    output: str
    time: Callable[[object, str], float] = seconds_of
    arrival_optional: bool = True
    failed: bool = False
    asked: str | None = None


_CSV = (
    _Columns("the trace", "arrival_s", "input_tokens", "output_tokens", asked="max_tokens"),
    _Columns(
        "the Azure trace",
        "timestamp",
        "contexttokens",
        "generatedtokens",
        time=_date,
        arrival_optional=False,
    ),
    _Columns(
        "the BurstGPT trace",
        "timestamp",
        "request tokens",
        "response tokens",
        arrival_optional=False,
        failed=True,
    ),
    _Columns("the trace", "arrived_at", "num_prefill_tokens", "num_decode_tokens"),
)

COLUMNS = (
    "arrival_s,input_tokens,output_tokens (the first may be absent), "
    "TIMESTAMP,ContextTokens,GeneratedTokens (Azure), "
    "Timestamp,Request tokens,Response tokens (BurstGPT) or "
    "arrived_at,num_prefill_tokens,num_decode_tokens (Vidur)"
)


def csv_format(header_line: int, header: str, first_row: str) -> Format | None:
    """The format of a CSV file with this header; None if it is of none.

    The first row tells whether arrivals are filled in: then they must be in every row.
    """
    try:
        names = [name.strip().lower() for name in _cells(header)]
    except BadLineError:
        return None
    for columns in _CSV:
        needed = {columns.input, columns.output}
        if not columns.arrival_optional:
            needed.add(columns.arrival)
        if needed <= set(names):
            break
    else:
        return None
    where = {name: names.index(name) for name in names}
    arrival = where.get(columns.arrival)
    timed = arrival is not None and (
        not columns.arrival_optional or _cell(first_row, arrival) != ""
    )
    return Format(
        title=columns.title,
        parse=_row_parser(columns, where, timed),
        header_line=header_line,
        own_arrivals=timed,
    )


def _row_parser(
    columns: _Columns, where: dict[str, int], timed: bool
) -> Callable[[str], RequestShape | None]:
    count, time = len(where), columns.time
    arrival_at, asked_at = where.get(columns.arrival), where.get(columns.asked or "")
    input_at, output_at = where[columns.input], where[columns.output]
    last = max(input_at, output_at, arrival_at if timed and arrival_at is not None else 0)

    def parse(line: str) -> RequestShape | None:
        cells = _cells(line)
        if len(cells) <= last:
            raise BadLineError(f"{len(cells)} values, but the header names {count}")
        arrival = 0.0
        if timed and arrival_at is not None:
            arrival = time(cells[arrival_at], columns.arrival)
        elif arrival_at is not None and cells[arrival_at : arrival_at + 1] not in ([], [""]):
            raise BadLineError(f"{columns.arrival} is given, but the first row has none")
        if columns.failed and cells[output_at].strip() == "0":
            return None
        output = tokens_of(cells[output_at], columns.output)
        asked = cells[asked_at].strip() if asked_at is not None and asked_at < len(cells) else ""
        return RequestShape(
            tokens_of(cells[input_at], columns.input),
            output,
            arrival,
            max_tokens=_asked(asked, output) if asked else None,
        )

    return parse


def _cells(line: str) -> list[str]:
    """The values of one line: a quote that is never closed spoils this line only."""
    line = line.rstrip("\r\n")
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise BadLineError(str(error)) from None


def _cell(line: str, index: int) -> str:
    try:
        return _cells(line)[index].strip()
    except (BadLineError, IndexError):
        return "?"  # the pass names what is wrong with it


def _asked(value: object, output: int) -> int:
    asked = tokens_of(value, "max_tokens")
    if asked < output:
        raise BadLineError(f"max_tokens is {asked}, less than the {output} tokens of the output")
    return asked


# JSON

KEYS = (
    "input_tokens,output_tokens (and arrival_s, hash_ids, max_tokens), "
    "timestamp,input_length,output_length,hash_ids (Mooncake) or conversations (ShareGPT)"
)


def json_format(first: dict[str, Any], array: bool, encode: Encode | None) -> Format | None:
    """The format of a file whose first object this is; None if it is of none."""
    if "conversations" in first:
        words = "" if encode else ", lengths estimated as 4 tokens for 3 words,"
        return Format(
            title=f"first turns{words} of the conversations",
            parse=lambda entry: _conversation(as_object(entry), encode),
            array=array,
            estimated=encode is None,
        )
    if {"input_length", "output_length"} <= first.keys():
        timed = "timestamp" in first
        return Format(
            title="the Mooncake trace",
            parse=_object_parser("input_length", "output_length", "timestamp", 1e-3, timed),
            array=array,
            own_arrivals=timed,
        )
    if {"input_tokens", "output_tokens"} <= first.keys():
        timed = first.get("arrival_s") is not None
        return Format(
            title="the trace",
            parse=_object_parser("input_tokens", "output_tokens", "arrival_s", 1.0, timed),
            array=array,
            own_arrivals=timed,
        )
    return None


def as_object(entry: object) -> dict[str, Any]:
    """A JSON object, from its text if it is a line.

    Raises:
        BadLineError: it is no object.
    """
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as error:
            raise BadLineError(f"not a JSON object ({error})") from None
    if not isinstance(entry, dict):
        raise BadLineError(f"{_short(entry)} is not a JSON object")
    return entry


def _object_parser(
    input_key: str, output_key: str, arrival_key: str, unit: float, timed: bool
) -> Callable[[object], RequestShape]:
    """Of objects with lengths; `unit` is the arrivals' in seconds."""

    def parse(entry: object) -> RequestShape:
        data = as_object(entry)
        tokens = tokens_of(data.get(input_key), input_key)
        output = tokens_of(data.get(output_key), output_key)
        arrival = 0.0
        if timed:
            arrival = seconds_of(data.get(arrival_key), arrival_key) * unit
        elif data.get(arrival_key) is not None:
            raise BadLineError(f"{arrival_key} is given, but the first object has none")
        asked = data.get("max_tokens")
        return RequestShape(
            tokens,
            output,
            arrival,
            _hash_ids(data.get("hash_ids"), tokens),
            None if asked is None else _asked(asked, output),
        )

    return parse


def _hash_ids(value: object, tokens: int) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 1 << 62 for i in value):
        raise BadLineError("hash_ids is not a list of whole numbers from 0")
    blocks = -(-tokens // HASH_BLOCK)
    if len(value) > blocks:
        raise BadLineError(f"{len(value)} hash_ids, but {tokens} tokens have {blocks} blocks")
    return tuple(value)


def _conversation(data: dict[str, Any], encode: Encode | None) -> RequestShape | None:
    """The first turn if it is a human's, with the answer's length; None without both."""
    turns = data.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadLineError("conversations is not a list of turns")
    if len(turns) < 2 or [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        return None
    prompt, answer = (turn.get("value") for turn in turns[:2])
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise BadLineError("a turn's value is not a text")
    if not prompt.strip() or not answer.strip():
        return None
    count = estimated_tokens if encode is None else lambda text: len(encode(text))
    tokens, output = count(prompt), count(answer)
    if not tokens or not output:
        return None
    return RequestShape(tokens, output, text=prompt)

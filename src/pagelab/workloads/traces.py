"""Requests from a trace file, of any format below; the first line tells which.

    first line or first object                      format
    arrival_s,input_tokens,output_tokens            plain CSV; arrivals may be empty or absent
    TIMESTAMP,ContextTokens,GeneratedTokens         Azure 2023, 2024: dates
    Timestamp,…,Request tokens,Response tokens,…    BurstGPT: seconds; 0 tokens: failed
    arrived_at,num_prefill_tokens,num_decode_tokens Vidur, Sarathi-Serve; arrivals may be absent
    {"timestamp":…,"input_length":…}                Mooncake JSONL: ms, hash_ids
    {"input_tokens":…,"output_tokens":…}            plain JSONL: arrival_s, hash_ids, max_tokens
    {"conversations":[{"from":"human",…},…]}        ShareGPT: the first turn and its answer

JSON objects stand one a line, or in one array (then the file is loaded whole). Gzip files are
unpacked as they are read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pagelab.errors import ConfigError
from pagelab.workloads.shapes import RequestShape, Source, Tally
from pagelab.workloads.token_ids import Encode
from pagelab.workloads.trace_formats import (
    COLUMNS,
    KEYS,
    Format,
    as_object,
    csv_format,
    json_format,
)
from pagelab.workloads.trace_lines import (
    BadLineError,
    in_order,
    numbered_lines,
    open_text,
    unreadable,
)

Reject = Callable[[int, BadLineError], None]

_LONGEST_NAME = 40


def open_trace(path: Path, *, skip_bad: bool = False, encode: Encode | None = None) -> Source:
    """Recognise a trace file; its requests are read when they are asked for.

    Args:
        path: the file.
        skip_bad: leave malformed lines out, and count them.
        encode: counts the tokens of conversations; without it, four for three words.

    Raises:
        ConfigError: the file cannot be read, or is of no known format.
    """
    form = _recognise(path, skip_bad, encode)

    def one_pass(number: int, tally: Tally) -> Iterator[RequestShape]:
        reject = _rejecter(path, form.array, tally if skip_bad else None)
        records = _records(path, form, reject, tally)
        return in_order(records, reject) if form.own_arrivals else (shape for _, shape in records)

    return Source(
        name=trace_name(path),
        title=f"{form.title} {path.name}",
        one_pass=one_pass,
        own_arrivals=form.own_arrivals,
        estimated=form.estimated,
    )


def trace_name(path: Path) -> str:
    """The file's name without its endings, at most 40 characters."""
    name = path.name
    for ending in (".gz", ".csv", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return name[:_LONGEST_NAME] or "trace"


def _records(
    path: Path, form: Format, reject: Reject, tally: Tally
) -> Iterator[tuple[int, RequestShape]]:
    """Every request with its line's number (or its place in the array)."""
    for number, entry in _entries(path, form.array):
        if number == form.header_line:
            continue
        try:
            shape = form.parse(entry)
        except BadLineError as error:
            reject(number, error)
            continue
        if shape is None:
            tally.left_out += 1
        else:
            yield number, shape


def _rejecter(path: Path, array: bool, tally: Tally | None) -> Reject:
    """What is told of bad lines: counts them, or raises ConfigError if there is no tally."""

    def reject(number: int, error: BadLineError) -> None:
        message = f"{path}, {'entry' if array else 'line'} {number}: {error}"
        if tally is None:
            raise ConfigError(f"{message}; --skip-bad leaves such lines out")
        tally.note_bad(message)

    return reject


def _entries(path: Path, array: bool) -> Iterator[tuple[int, Any]]:
    return enumerate(_json_array(path), 1) if array else numbered_lines(path)


# The format


def _recognise(path: Path, skip_bad: bool, encode: Encode | None) -> Format:
    """The file's format, by its header or its first object that can be read."""
    lines = numbered_lines(path)
    number, first = next(lines, (0, ""))
    if not number:
        raise ConfigError(f"{path} is empty")
    start = first.lstrip()[0]
    if start in "[{":
        found = json_format(_first_object(path, start == "[", skip_bad), start == "[", encode)
    else:
        found = csv_format(number, first, next(lines, (0, ""))[1])
    if found is None:
        raise ConfigError(
            f"{path}, line {number}: not the beginning of a trace that PageLab knows. A CSV begins "
            f"with a header that has the columns {COLUMNS}; JSON objects have the keys {KEYS}"
        )
    return found


def _first_object(path: Path, array: bool, skip_bad: bool) -> dict[str, Any]:
    reject = _rejecter(path, array, Tally() if skip_bad else None)
    for number, entry in _entries(path, array):
        try:
            return as_object(entry)
        except BadLineError as error:
            reject(number, error)
    raise ConfigError(f"{path} holds no JSON object")


def _json_array(path: Path) -> list[Any]:
    try:
        with open_text(path) as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); an array is read as a whole, "
            "so --skip-bad cannot help: mend it, or write one object a line"
        ) from None
    except (OSError, EOFError, zlib.error, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreadable(path, error) from None
    assert isinstance(data, list)  # it begins with [
    return data

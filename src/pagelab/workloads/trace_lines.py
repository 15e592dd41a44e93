"""The lines of a trace file, whatever they hold: one after another, numbered, in bounded memory."""

from __future__ import annotations

import gzip
import heapq
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from pagelab.errors import ConfigError
from pagelab.workloads.shapes import RequestShape

LONGEST_LINE = 1 << 20
"""Characters; a request of a million tokens has 2,000 hash ids, which take 20,000."""

LOOK_AHEAD = 256
"""Lines that a request may stand too late in its file and still be put into its place."""

_GZIP_MAGIC = b"\x1f\x8b"


class BadLineError(ValueError):
    """A line that holds no request that could be read; its text says why, for people."""


def open_text(path: Path) -> TextIO:
    """The file as text, unpacked if it is a gzip file; without a byte order mark.

    Raises:
        ConfigError: it cannot be opened, or is not a file that can be read twice.
        OSError: it cannot be read.
    """
    try:
        if not path.exists():
            raise ConfigError(f"no file {path}")
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise ConfigError(f"{path} is {what}; --workload takes a trace file")
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP_MAGIC
        raw = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115 (the wrapper closes it)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise unreadable(path, error) from None
    # What is not UTF-8 becomes a mark that no number or name has, so its line is named as bad.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace")


def unreadable(path: Path, error: Exception) -> ConfigError:
    """The error for people about a file that cannot be read."""
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"cannot read {path}: {reason}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line that is not blank, with its number from 1.

    Raises:
        ConfigError: the file cannot be read, or a line is longer than 1 MiB.
    """
    number = 0
    try:
        with open_text(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise ConfigError(
                        f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; "
                        "is it a trace?"
                    )
                if not line.isspace():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None


def in_order(
    records: Iterator[tuple[int, RequestShape]], reject: Callable[[int, BadLineError], None]
) -> Iterator[RequestShape]:
    """Shapes sorted by arrival, as far as a window of 256 can; the first one arrives at 0.

    Traces are nearly sorted. One that is not would have to be held in memory: a request that
    stands more than 256 lines too late is a bad line.

    Args:
        records: shapes with the numbers of their lines.
        reject: told of bad lines; raises, or returns to go on without them.
    """
    window: list[tuple[float, int, RequestShape]] = []
    start = latest = None
    for number, shape in records:
        if latest is not None and shape.arrival_s < latest:
            late = latest - shape.arrival_s
            text = f"arrives {late:g} s before one that stands {LOOK_AHEAD} lines or more above it"
            reject(number, BadLineError(f"{text}; sort the file by arrival"))
            continue
        item = (shape.arrival_s, number, shape)
        if len(window) < LOOK_AHEAD:
            heapq.heappush(window, item)
            continue
        latest, number, shape = heapq.heappushpop(window, item)
        start = latest if start is None else start
        yield shape._replace(arrival_s=latest - start)
    for arrival, _number, shape in sorted(window):
        start = arrival if start is None else start
        yield shape._replace(arrival_s=arrival - start)

"""`ledger.jsonl`: the ledger of every step of every run, one line a step. See docs/ledger.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pagelab.errors import ReportError
from pagelab.results import MethodRun

LEDGER_FILE = "ledger.jsonl"
COLUMNS = (
    "t",
    "running",
    "waiting",
    "live",
    "reserved",
    "internal",
    "cached",
    "free",
    "external",
    "rounding",
    "shared_saved",
)


def start_ledger(path: Path) -> None:
    """Make an empty file in the place of an older one.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from error


def append_ledger(path: Path, run: MethodRun) -> None:
    """Write a run's steps behind those that are there, line by line.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            for line in _lines(run):
                file.write(line)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from error


def _lines(run: MethodRun) -> Iterator[str]:
    for workload in run["workloads"]:
        columns = [workload["steps"][name] for name in COLUMNS]  # type: ignore[literal-required]
        for step, values in enumerate(zip(*columns, strict=True)):
            line = {
                "label": run["label"],
                "workload": workload["name"],
                "repeat": run["repeat"],
                "step": step,
                **dict(zip(COLUMNS, values, strict=True)),
            }
            yield json.dumps(line, separators=(",", ":")) + "\n"

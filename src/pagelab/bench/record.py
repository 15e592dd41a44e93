"""One benchmark's record: JSON with everything, CSV with a line a repeat.

::

    {schema, version, kind, created, command, environment,
     engine, settings, workload, startup, memory, memory_budget,
     ceilings, reference,          null with --no-limits
     repeats: [{duration_s, output_tokens_per_s, …, latency_s}],
     summary: {figure: {median, min, max}},
     profile}                      null without --profile
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagelab.bench.limits import Ceilings, ReferenceTime
from pagelab.bench.profile import StepProfile
from pagelab.bench.run import Run
from pagelab.bench.session import Session
from pagelab.errors import ReportError
from pagelab.metrics import spread
from pagelab.telemetry import describe_environment

SCHEMA = "pagelab.bench"
VERSION = 1

FIGURES = ("duration_s", "output_tokens_per_s", "total_tokens_per_s", "times_reference")
"""Of a repeat, with a spread in the summary (latencies too)."""

Record = dict[str, Any]


def make_record(
    kind: str,
    session: Session,
    runs: Sequence[Run],
    *,
    command: str,
    memory: dict[str, int | None],
    ceilings: Ceilings | None = None,
    reference: ReferenceTime | None = None,
    profile: StepProfile | None = None,
) -> Record:
    """Everything about one benchmark, as plain data.

    Args:
        kind: throughput or latency.
        session: what ran.
        runs: the repeats.
        command: the command line that repeats it.
        memory: peaks in bytes, `Session.memory`.
        ceilings: None where limits were not measured.
        reference: the workload's time under them.
        profile: of the extra run, if there was one.
    """
    workload = session.workload
    repeats = [_repeat(run, workload.prompt_tokens, reference) for run in runs]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "environment": describe_environment(),
        "engine": session.engine_settings(),
        "settings": session.settings.to_json(),
        "workload": {
            "name": workload.name,
            "title": workload.title,
            "requests": len(workload.requests),
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "lengths": [list(pair) for pair in session.lengths],
        },
        "startup": dataclasses.asdict(session.startup),
        "memory": memory,
        "memory_budget": session.llm.memory_budget.to_json(),
        "ceilings": None if ceilings is None else dataclasses.asdict(ceilings),
        "reference": None if reference is None else reference.to_json(),
        "repeats": repeats,
        "summary": summary_of(repeats),
        "profile": None if profile is None else profile.to_json(),
    }


def summary_of(repeats: Sequence[Record]) -> Record:
    """Median, smallest and largest of every figure over the repeats."""
    summary: Record = {
        name: spread([repeat[name] for repeat in repeats])
        for name in FIGURES
        if repeats[0][name] is not None
    }
    latency = repeats[0]["latency_s"]
    summary["latency_s"] = {
        pool: {
            figure: spread([repeat["latency_s"][pool][figure] for repeat in repeats])
            for figure in figures
        }
        for pool, figures in latency.items()
    }
    return summary


def save_json(record: Record, path: Path) -> None:
    """Write a record.

    Raises:
        ReportError: it cannot be written.
    """
    _write(path, json.dumps(record, indent=1) + "\n")


def save_csv(record: Record, path: Path) -> None:
    """Write the repeats as lines, each with what is needed to compare it with others.

    Raises:
        ReportError: it cannot be written.
    """
    rows = [_csv_row(record, number) for number in range(len(record["repeats"]))]
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error


def check_paths(*paths: Path | None) -> None:
    """Make the folders of these files, so that no run is lost to a name that cannot be written.

    Raises:
        ReportError: a folder cannot be made, or is a file.
    """
    for path in paths:
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ReportError(f"no folder for {path}: {error.strerror or error}") from error
            if path.is_dir():
                raise ReportError(f"{path} is a folder: give a file")


def _repeat(run: Run, prompt_tokens: int, reference: ReferenceTime | None) -> Record:
    output = run.output_tokens
    return {
        "duration_s": run.duration_s,
        "steps": run.steps,
        "output_tokens": output,
        "output_tokens_per_s": output / run.duration_s,
        "total_tokens_per_s": (prompt_tokens + output) / run.duration_s,
        "times_reference": None if reference is None else run.duration_s / reference.total_s,
        "preemptions": run.preemptions,
        "recomputed_tokens": run.recomputed_tokens,
        "cached_tokens": run.cached_tokens,
        "other_load_cores": run.other_load_cores,
        "latency_s": run.latencies(),
    }


def _csv_row(record: Record, number: int) -> Record:
    repeat, engine, environment = (
        record["repeats"][number],
        record["engine"],
        record["environment"],
    )
    on_gpu = engine["device"].startswith("cuda")
    cards = [gpu["name"] for gpu in environment["gpus"]]
    row = {
        "created": record["created"],
        "kind": record["kind"],
        "machine": cards[0] if on_gpu and cards else environment["cpu"]["model"],
        "torch": (environment["torch"] or {}).get("version"),
        "pagelab": environment["pagelab"],
        **{name: engine[name] for name in ("model", "random_weights", "device", "dtype")},
        "workload": record["workload"]["name"],
        "temperature": record["settings"]["temperature"],
        "concurrency": record["settings"]["concurrency"],
        "rate": record["settings"]["rate"],
        "repeat": number + 1,
    }
    row |= {name: value for name, value in repeat.items() if name != "latency_s"}
    for pool, figures in repeat["latency_s"].items():
        row |= {f"{pool}_{figure}_s": value for figure, value in figures.items()}
    return row


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error

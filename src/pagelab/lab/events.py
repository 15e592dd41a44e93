"""What happens while an experiment runs, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.lab.methods import Variant
from pagelab.results import KVCapacity, MethodRun, Phase, Results, Snapshot, WorkloadRun


@dataclass(frozen=True, slots=True)
class ExperimentStarted:
    """Everything that was asked, before the first run."""

    results: Results
    variants: tuple[Variant, ...]
    results_path: str


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """The first method of a phase comes next."""

    phase: Phase
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A method's process starts."""

    variant: Variant
    repeat: int
    repeats: int


@dataclass(frozen=True, slots=True)
class StageReached:
    """A memory snapshot."""

    label: str
    repeat: int
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class CapacityReported:
    """What a method made of the KV budget."""

    label: str
    capacity: KVCapacity


@dataclass(frozen=True, slots=True)
class ProgressMade:
    """Output tokens of a workload so far."""

    label: str
    workload: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class WorkloadFinished:
    """A workload is done under one method."""

    label: str
    repeat: int
    run: WorkloadRun


@dataclass(frozen=True, slots=True)
class RunFinished:
    """A method's process has ended, well or not."""

    run: MethodRun


@dataclass(frozen=True, slots=True)
class ExperimentFinished:
    """All runs are over; the results are complete, or say why not."""

    results: Results


Event = (
    ExperimentStarted
    | PhaseStarted
    | RunStarted
    | StageReached
    | CapacityReported
    | ProgressMade
    | WorkloadFinished
    | RunFinished
    | ExperimentFinished
)

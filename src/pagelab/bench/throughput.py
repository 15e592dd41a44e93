"""`pagelab bench throughput`: how many tokens a second, against what the machine could do."""

from __future__ import annotations

from pagelab.bench.profile import StepProfile, profile_steps
from pagelab.bench.record import Record, make_record
from pagelab.bench.run import Run, WorkloadRunner
from pagelab.bench.session import Session, Stage, open_session
from pagelab.bench.settings import BenchSettings


def bench_throughput(settings: BenchSettings, stage: Stage, command: str = "") -> Record:
    """All requests at once; the time from the first one's start to the last token.

    Args:
        settings: what to run.
        stage: shows progress.
        command: the command line that repeats it, for the record.

    Returns:
        The record (`bench.record`).

    Raises:
        ConfigError, ModelError: before anything ran.
        RequestError, StepError: the engine cannot serve the workload.
    """
    session = open_session(settings, stage)
    return measure("throughput", session, stage, command)


def measure(kind: str, session: Session, stage: Stage, command: str) -> Record:
    """The repeats, then what would disturb them: limits and the profile."""
    settings = session.settings
    total = session.workload.output_tokens
    runs: list[Run] = []
    for number in range(settings.repeats):
        with stage(f"repeat {number + 1} of {settings.repeats}", total) as on_tokens:
            runs.append(session.run(on_tokens))
    memory = session.memory()  # before limits take their own
    profile = None
    if settings.profile is not None:
        with stage("profile", 0):
            profile = _profile(session, runs[-1].steps)
    ceilings = reference = None
    if settings.limits:
        with stage("limits", 0):
            ceilings = session.ceilings()
        # where requests arrive over time, that decides how long it takes
        if ceilings is not None and settings.workload.rate in (None, "burst"):
            reference = session.reference(ceilings)
    return make_record(
        kind,
        session,
        runs,
        command=command,
        memory=memory,
        ceilings=ceilings,
        reference=reference,
        profile=profile,
    )


def _profile(session: Session, steps: int) -> StepProfile:
    settings = session.settings
    assert settings.profile is not None
    runner = WorkloadRunner(
        session.llm.core,
        session.workload,
        temperature=settings.temperature,
        seed=settings.seed,
        concurrency=settings.concurrency,
    )
    return profile_steps(runner, session.llm.device, steps, settings.profile)

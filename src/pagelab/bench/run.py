"""One run of a workload on an engine: token ids in, token ids out, nothing else on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pagelab.engine.core import EngineCore
from pagelab.engine.replay import RealClock, result_of, sampling_of
from pagelab.errors import StepError
from pagelab.metrics import end_to_end as e2e
from pagelab.metrics import inter_token_latencies, mean, percentile, tpot, ttft
from pagelab.results import RequestResult
from pagelab.scheduling.sequence import Request
from pagelab.telemetry import OtherLoad
from pagelab.workloads import Workload, WorkloadRequest

OnTokens = Callable[[int], None]
"""Told the output tokens so far, a few times a second at most."""

_TELL_EVERY_S = 0.2
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as it went.

    Attributes:
        duration_s: from the first request's arrival to the last token.
        steps: of the engine.
        requests: each with its times.
        other_load_cores: that other programs used meanwhile (`telemetry.OtherLoad`).
    """

    duration_s: float
    steps: int
    requests: Sequence[RequestResult]
    other_load_cores: float

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(len(request["output_token_ids"]) for request in self.requests)

    @property
    def preemptions(self) -> int:
        """Requests that lost their blocks and were computed again, each time counted."""
        return sum(request["preemptions"] for request in self.requests)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens computed again after preemptions."""
        return sum(request["recomputed_tokens"] for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that a prefix hit saved."""
        return sum(request["cached_tokens"] for request in self.requests)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Mean and percentiles in seconds of TTFT, ITL, TPOT and E2E (`pagelab.metrics`)."""
        requests = self.requests
        pools = {
            "ttft": [ttft(r) for r in requests],
            "itl": [gap for r in requests for gap in inter_token_latencies(r)],
            "tpot": [x for r in requests if (x := tpot(r)) is not None],
            "e2e": [e2e(r) for r in requests],
        }
        return {
            name: {"mean": mean(values)} | {f"p{q}": percentile(values, q) for q in PERCENTILES}
            for name, values in pools.items()
        }


class WorkloadRunner:
    """Runs a workload step by step; `run_workload` does it in one go.

    ::

        waiting ──(arrived, and fewer than `concurrency` in the engine)──▶ core ──▶ results

    With a concurrency a request arrives when it is let in: its TTFT has no queueing of ours.
    """

    def __init__(
        self,
        core: EngineCore,
        workload: Workload,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        concurrency: int | None = None,
    ) -> None:
        self.core = core
        self.steps = self.tokens = 0
        self._temperature, self._seed, self._concurrency = temperature, seed, concurrency
        self._waiting = deque(workload.requests)
        self._served: list[tuple[WorkloadRequest, Request, float]] = []
        self._unfinished = 0
        self._clock = RealClock()
        self.started = self._clock()

    @property
    def finished(self) -> bool:
        """Whether all requests have ended, and nothing is in flight."""
        return not self._waiting and not self.core.has_unfinished_requests

    def step(self) -> None:
        """Let in who may, and make a step.

        Raises:
            RequestError: a request that can never be served; the option to change is named.
            StepError: a request failed.
        """
        self._let_in()
        for event in self.core.step():
            self.tokens += event.token is not None
            if event.finish_reason is not None:
                self._unfinished -= 1
                if event.sequence.error is not None:
                    raise StepError(f"{event.sequence.request.id} failed: {event.sequence.error}")
        self.steps += 1

    def cancel(self) -> None:
        """End what still runs, so that the engine can be used again."""
        self._waiting.clear()
        for _, request, _ in self._served:
            self.core.cancel(request.id)
        while self.core.has_unfinished_requests:
            self.core.step()

    def results(self) -> list[RequestResult]:
        """Each request as it went, in the workload's order."""
        results = []
        for asked, request, arrival in self._served:
            result = result_of(asked, request, self._clock, self.started)
            result["arrival_s"] = arrival
            results.append(result)
        return results

    def _let_in(self) -> None:
        if not self.core.has_unfinished_requests and self._concurrency is None:
            self._clock.wait_until(self.started + self._waiting[0].arrival_s)
        now = self._clock() - self.started
        while self._waiting:
            if self._concurrency is None:
                arrival = self._waiting[0].arrival_s
                if arrival > now:
                    return
            elif self._unfinished >= self._concurrency:
                return
            else:
                arrival = now
            asked = self._waiting.popleft()
            request = self.core.add_request(
                asked.token_ids,
                sampling_of(asked, self._temperature, self._seed),
                request_id=asked.id,
                arrival_time=self.started + arrival,
                output_tokens=asked.max_tokens,
            )
            self._served.append((asked, request, arrival))
            self._unfinished += 1


def run_workload(
    core: EngineCore,
    workload: Workload,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    concurrency: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Run:
    """Run all of a workload's requests to their end.

    Args:
        core: the engine, idle.
        workload: requests in order of arrival, with token ids.
        temperature: 0 is greedy.
        seed: of sampling.
        concurrency: requests in the engine at the same time, whatever their arrivals; None: each
            comes at its arrival.
        on_tokens: told how far it is.

    Raises:
        RequestError, StepError: as `WorkloadRunner.step`.
    """
    load = OtherLoad()
    runner = WorkloadRunner(
        core, workload, temperature=temperature, seed=seed, concurrency=concurrency
    )
    told = runner.started
    try:
        while not runner.finished:
            runner.step()
            if on_tokens is not None and (now := time.perf_counter()) - told > _TELL_EVERY_S:
                told = now
                on_tokens(runner.tokens)
    except BaseException:
        runner.cancel()
        raise
    duration = time.perf_counter() - runner.started
    return Run(
        duration_s=duration,
        steps=runner.steps,
        requests=runner.results(),
        other_load_cores=load.cores(),
    )

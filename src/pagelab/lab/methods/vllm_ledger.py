"""What vLLM tells of its blocks, turned into the ledger's states.

Its scheduler lives in another process and reports, with each step's tokens, which share of its
blocks is in use, how many requests run and wait, and what its prefix cache found. Which request
holds which block it does not tell; but what a request that has a token must hold follows from its
length::

    used blocks * block size = live + reserved + internal
                               │      └────────┴── the tail of each request's last block
                               └── the rest: tokens written, prompts that are being computed

So the blocks in use are vLLM's own figure, and the split within them is exact but for prompts
whose first token is not there yet (their tails count as live). Free blocks whose content could be
reused are free in its figures, and here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from pagelab.lab.methods.recording import empty_steps, micro
from pagelab.results import Steps


class SchedulerReport(NamedTuple):
    """vLLM's own figures after a step."""

    usage: float  # blocks in use, as a share of all but the null block
    running: int
    waiting: int
    prefix_queries: int  # tokens looked up in this step
    prefix_hits: int
    preempted_hits: int  # those of `prefix_hits` that belong to requests preempted before


class Decoding(NamedTuple):
    """A request that has its first token and has not ended, as it went into the step."""

    written: int  # tokens whose K/V are in blocks
    finally_written: int


class VllmRecorder:
    """Writes down vLLM's steps. `num_blocks` is vLLM's own count; one of them is never given out.

    That null block counts as internal waste.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks, self._block_size = num_blocks, block_size
        self.steps: Steps = empty_steps()
        self.prefix_queries = self.prefix_hits = self.preempted_hits = 0

    @property
    def live(self) -> int:
        """Slots that hold a token's K/V, at the last step."""
        return self.steps["live"][-1] if self.steps["live"] else 0

    @property
    def allocated(self) -> int:
        """Slots in blocks that requests hold, at the last step."""
        if not self.steps["free"]:
            return 0
        return (self._num_blocks - 1) * self._block_size - self.steps["free"][-1]

    def record(
        self, t: float, report: SchedulerReport, decoding: Sequence[Decoding], new_tokens: int
    ) -> None:
        """Add a step that ended at `t` seconds of the workload.

        Args:
            t: seconds.
            report: vLLM's figures.
            decoding: requests that have a token, in order of arrival; more than `report.running`
                when some are preempted, and vLLM preempts the latest first.
            new_tokens: tokens computed.
        """
        size, usable = self._block_size, self._num_blocks - 1
        used = min(usable, max(0, round(report.usage * usable)))
        reserved = internal = blocks = 0
        for request in decoding[: report.running]:
            held = -(-request.written // size)
            later = min(held * size, request.finally_written) - request.written
            blocks += held
            reserved += later
            internal += held * size - request.written - later
        # figures and tokens may be a step apart: never more tails than there are slots
        reserved = min(reserved, used * size)
        internal = min(internal, used * size - reserved)
        steps = self.steps
        steps["t"].append(micro(t))
        steps["new_tokens"].append(new_tokens)
        steps["running"].append(report.running)
        steps["waiting"].append(report.waiting)
        steps["live"].append(used * size - reserved - internal)
        steps["reserved"].append(reserved)
        steps["internal"].append(internal + size)
        steps["cached"].append(0)
        steps["free"].append((usable - used) * size)
        steps["external"].append(0)
        steps["shared_saved"].append(max(0, blocks - used) * size)
        steps["rounding"].append(0)
        self.prefix_queries += report.prefix_queries
        self.prefix_hits += report.prefix_hits
        self.preempted_hits += report.preempted_hits

    def step_at(self, t: float) -> int:
        """Index of the step in which something happened at `t` seconds."""
        times = self.steps["t"]
        return max(0, min(bisect_left(times, t), len(times) - 1))

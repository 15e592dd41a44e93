"""What a step found, written by its last kernel straight into the host's memory.

A copy after each step would cost 9 µs of the device's time (docs/log.md). Every step has a slot of
its own, in turn, and a word on the device says whose turn it is, since the addresses in a CUDA
graph stay the same::

    turn ──┐
    slots  | 0 | 1 | 2 |        a slot: tokens | usable | finite, max_seqs words each
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagelab.kernels.sizes import aligned


class Mailbox:
    """Slots for the results of steps, in memory that host and device share.

    Args:
        slots: steps whose results lie here at the same time, at most.
        max_seqs: sequences of a step at most.
        device: that writes.

    Attributes:
        words: int32 `[slots, 3, stride]`, pinned.
        turn: int32 `[1]` on the device, the slot of the step that runs.
    """

    def __init__(self, slots: int, max_seqs: int, device: torch.device) -> None:
        self.words = torch.zeros(
            slots, 3, aligned(max_seqs), dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._last = 0  # the slot of the last step that was started
        self._agreed = True

    def open(self, num_seqs: int) -> torch.Tensor:
        """The slot `[3, num_seqs]` of the step that is launched next on the current stream.

        Then comes `keep`, or `lose`.
        """
        if not self._agreed:
            self.turn.fill_(self._last)
            self._agreed = True
        return self.words[self._next(), :, :num_seqs]

    def keep(self) -> None:
        """The step was started: its slot is its own until everybody else had a turn."""
        self._last = self._next()

    def lose(self) -> None:
        """A step failed, and nobody knows whether the device took its turn.

        The next step gets the same slot: another one may still hold the results of a step that is
        not collected. What the failed step may still write there, it writes before.
        """
        self._agreed = False

    def _next(self) -> int:
        return (self._last + 1) % len(self.words)


@triton.jit
def next_turn(turn, slots):
    """The step that begins takes the next slot; by one program, and one kernel of a step."""
    last = tl.load(turn)
    tl.store(turn, tl.where(last + 1 < slots, last + 1, 0))


@triton.jit
def deliver(box, turn, stride, i, token, usable, finite, mask):
    """Write sequence `i`'s token, and whether it is usable and finite, into the step's slot."""
    to = box + tl.load(turn) * (3 * stride) + i
    tl.store(to, token, mask=mask)
    tl.store(to + stride, usable, mask=mask)
    tl.store(to + 2 * stride, finite, mask=mask)

"""Tokens to text as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class DecodeStream(Protocol):
    """Decodes one sequence's tokens one by one (`models.tokenizer`)."""

    def step(self, token_id: int) -> str | None:
        """The text that this token completes; None while characters are incomplete."""
        ...

    def finish(self) -> str:
        """What is left of characters that no token will complete."""
        ...


class TextStream:
    """The text of one sequence while it is generated.

    ::

        tokens ──▶ decode ──▶ text | may begin a stop string |
                              └ delta() ─┘  held back

    When a stop string appears, the text ends before it and `stopped` is set.
    """

    def __init__(self, decoder: DecodeStream, stop: Sequence[str], min_tokens: int) -> None:
        self.text = ""
        self.stopped = False
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._searched = 0  # no stop string begins before this
        self._delivered = 0

    def feed(self, token_id: int) -> None:
        """Take one more token."""
        self._num_tokens += 1
        self.text += self._decoder.step(token_id) or ""
        if self._num_tokens >= self._min_tokens:
            self._look_for_stop()
        else:
            self._searched = len(self.text)  # what is complete by now never counts

    def finish(self) -> None:
        """Say that no token comes any more: an incomplete last character becomes text."""
        if not self.stopped:
            self.text += self._decoder.finish()

    def delta(self, *, finished: bool) -> str:
        """The text since the last call that no stop string can take back any more."""
        end = len(self.text) if finished else len(self.text) - self._held_back()
        delta = self.text[self._delivered : end]
        self._delivered = max(self._delivered, end)
        return delta

    def _look_for_stop(self) -> None:
        found = [at for stop in self._stop if (at := self.text.find(stop, self._searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        else:
            longest = max((len(stop) for stop in self._stop), default=0)
            self._searched = max(self._searched, len(self.text) - longest + 1)

    def _held_back(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )

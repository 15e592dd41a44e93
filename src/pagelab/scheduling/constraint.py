"""What a sequence's tokens must follow, as the scheduler sees it."""

from __future__ import annotations

from typing import Protocol


class Constraint(Protocol):
    """Follows one sequence's output and says which token may come next (`engine.guided`).

    ::

        allowed ──▶ a step samples within it ──▶ advance(token) ──▶ allowed ──▶ …
                                                                 ended: nothing may come

    Each sequence owns one, and only collected tokens advance it, so a preemption leaves it as
    it is.
    """

    @property
    def allowed(self) -> bytes:
        """Which tokens may come next: bit `t % 8` of byte `t // 8` is token t's."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the output may end here."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the output is complete and nothing but an end may follow."""
        ...

    def advance(self, token_id: int) -> None:
        """Take the next token in.

        Raises:
            RequestError: nothing could follow it, or it takes too much to find out what may.
        """
        ...

    def copy(self) -> Constraint:
        """Another one in the same state."""
        ...

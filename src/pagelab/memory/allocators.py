"""The policies that PageLab compares: how many slots a sequence should hold.

Everything else (pool, block tables, scheduler, kernels) is shared, so a difference between two
runs can only come from here. A policy of one's own is a class with these four members.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pagelab.errors import ConfigError


class Demand(NamedTuple):
    """What an allocator may know of a sequence. (A tuple: hundreds are made every step.)

    ::

        0 ······ prompt_tokens ······ num_tokens ············· max_tokens ······ max_model_len
                                      (known now, at least      (where it ends
                                       one step ahead)           at the latest)
    """

    prompt_tokens: int
    num_tokens: int  # tokens whose K/V it must be able to hold now
    max_tokens: int  # prompt and output together, at most
    max_model_len: int


class Allocator(Protocol):
    """Who gets how many slots, and when.

    `slots` is asked at admission and again before every step; where it grows with `num_tokens`,
    set `grows`. A `contiguous` allocator's ranges cannot grow and cannot share blocks.
    """

    name: str
    contiguous: bool
    grows: bool

    def slots(self, demand: Demand) -> int:
        """Slots that this sequence should hold now: at least `demand.num_tokens`."""
        ...


class ContiguousMax:
    """The traditional method: the longest possible request, in one piece, from the start.

    Source: Orca (Max) in the PagedAttention paper (Kwon et al., SOSP 2023).
    """

    name = "contiguous-max"
    contiguous = True
    grows = False

    def slots(self, demand: Demand) -> int:
        """The model's maximum length, whatever the request."""
        return demand.max_model_len


class Paged:
    """PagedAttention: the blocks of the tokens it has, one more when the last is full."""

    name = "paged"
    contiguous = False
    grows = True

    def slots(self, demand: Demand) -> int:
        """The tokens it has."""
        return demand.num_tokens


ALLOCATORS: dict[str, type[ContiguousMax] | type[Paged]] = {
    allocator.name: allocator for allocator in (ContiguousMax, Paged)
}


def make_allocator(name: str) -> Allocator:
    """An allocator by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ALLOCATORS:
        raise ConfigError(f"no allocator {name!r}: choose one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]()

"""The policies that PageLab compares: how many slots a sequence should hold.

Everything else (pool, block tables, scheduler, kernels) is shared, so a difference between two
runs can only come from here. A policy of one's own is a class with the four members of
`Allocator`; `examples/headroom_allocator.py` is one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from pagelab.errors import ConfigError


class Demand(NamedTuple):
    """What an allocator may know of a sequence. (A tuple: hundreds are made every step.)

    ::

        0 ····· prompt_tokens ···· num_tokens ····· final_tokens ···· max_tokens ···· max_model_len
                                   (known now, at   (where it ends,   (where the
                                    least one step   if anybody        client lets it
                                    ahead)           knows: replays)   end at the latest)

    Where nobody knows the end, `final_tokens` is `max_tokens`.
    """

    prompt_tokens: int
    num_tokens: int  # tokens whose K/V it must be able to hold now
    final_tokens: int  # prompt and output together, as they will be
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


class ContiguousPow2:
    """The prompt, and the output's length rounded up to a power of two, in one piece.

    It has to know the output's length, about; a replay does. Source: Orca (Pow2), ibidem.
    """

    name = "contiguous-pow2"
    contiguous = True
    grows = False

    def slots(self, demand: Demand) -> int:
        """Prompt + 2^⌈log2(output)⌉, and never more than the model's maximum length."""
        output = max(1, demand.final_tokens - demand.prompt_tokens)
        rounded = demand.prompt_tokens + (1 << (output - 1).bit_length())
        return max(demand.num_tokens, min(rounded, demand.max_model_len))


class ContiguousOracle:
    """Exactly the tokens that the request will have in the end, in one piece.

    Nobody can know that; it is the best that reserving could do. Source: Orca (Oracle), ibidem.
    """

    name = "contiguous-oracle"
    contiguous = True
    grows = False

    def slots(self, demand: Demand) -> int:
        """Prompt + output."""
        return demand.final_tokens


class ReservedPaged:
    """All blocks that the request may need at most, anywhere in the pool, from the start.

    What several small engines do: nobody is ever preempted, and what a client asks for and does
    not use is reserved until the request ends.
    """

    name = "reserved-paged"
    contiguous = False
    grows = False

    def slots(self, demand: Demand) -> int:
        """Prompt + the most output that was asked for."""
        return demand.max_tokens


class Paged:
    """PagedAttention: the blocks of the tokens it has, one more when the last is full."""

    name = "paged"
    contiguous = False
    grows = True

    def slots(self, demand: Demand) -> int:
        """The tokens it has."""
        return demand.num_tokens


ALLOCATORS: dict[str, type[Allocator]] = {
    allocator.name: allocator
    for allocator in (ContiguousMax, ContiguousPow2, ContiguousOracle, ReservedPaged, Paged)
}


def make_allocator(name: str) -> Allocator:
    """An allocator by its name, or one's own as `module:Class` or `path/to/file.py:Class`.

    Raises:
        ConfigError: there is none of that name, or what is there is no allocator.
    """
    if name in ALLOCATORS:
        return ALLOCATORS[name]()
    if ":" not in name:
        raise ConfigError(
            f"no allocator {name!r}: choose one of {', '.join(ALLOCATORS)}, or name a class of "
            "your own as module:Class or file.py:Class"
        )
    module, _, attribute = name.rpartition(":")
    made = _construct(_import(module, name), attribute, name)
    problem = _problem_with(made)
    if problem is not None:
        raise ConfigError(f"allocator {name!r}: {problem}")
    return cast("Allocator", made)


def _import(module: str, name: str) -> Any:
    """A module by its dotted name (the current folder's, too) or by its file."""
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            assert spec is not None
            assert spec.loader is not None
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
            return found
        here = str(Path.cwd())
        if here not in sys.path:  # as `python -m` has it, and console scripts have not
            sys.path.append(here)
        return importlib.import_module(module)
    except Exception as error:  # somebody else's code: anything may come out of it
        raise ConfigError(
            f"allocator {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _construct(module: Any, attribute: str, name: str) -> Any:
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise ConfigError(f"allocator {name!r}: there is no class {attribute!r} in that module")
    try:
        return found()
    except Exception as error:
        raise ConfigError(
            f"allocator {name!r} cannot be made without arguments: {type(error).__name__}: {error}"
        ) from error


def _problem_with(allocator: Any) -> str | None:
    name = getattr(allocator, "name", None)
    if not isinstance(name, str) or not name:
        return "it needs a `name`, a text"
    if name in ALLOCATORS:
        return f"its name {name!r} is taken: choose another one"
    for member in ("contiguous", "grows"):
        if not isinstance(getattr(allocator, member, None), bool):
            return f"it needs `{member}`, True or False"
    if allocator.contiguous and allocator.grows:
        return "a contiguous range cannot grow: set `grows` or `contiguous` to False"
    if not callable(getattr(allocator, "slots", None)):
        return "it needs a method `slots(demand)`"
    return None

"""The methods that an experiment can compare, each run in a process of its own.

Importing this package imports no method: the worker imports the one that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagelab.errors import ConfigError
from pagelab.results import Phase

METHODS = {
    "hf-generate": "pagelab.lab.methods.hf_generate:HfGenerate",
    "hf-static": "pagelab.lab.methods.hf_static:HfStatic",
    "pagelab": "pagelab.lab.methods.native:Native",
}
"""Name → where its class is."""

ALLOCATORS: dict[str, Phase] = {"contiguous-max": "traditional", "paged": "paged"}
"""Allocators of `pagelab` that are compared, and the phase in which each runs."""

DEFAULT_METHODS = ("hf-generate", "hf-static", "pagelab")
DEFAULT_ALLOCATORS = ("contiguous-max", "paged")


@dataclass(frozen=True, slots=True)
class Variant:
    """One method under one allocator: a row of the comparison."""

    method: str
    allocator: str | None
    label: str
    phase: Phase


def variants(methods: tuple[str, ...], allocators: tuple[str, ...]) -> list[Variant]:
    """Expand methods and allocators, in the order in which they run: the paged phase last.

    A method may be `module:Class`, a `Method` of one's own; it runs in the first phase.

    Raises:
        ConfigError: a name that is not known; lists those that are.
    """
    found: list[Variant] = []
    for method in methods:
        if method == "pagelab":
            for allocator in allocators:
                if allocator not in ALLOCATORS:
                    raise ConfigError(
                        f"no allocator {allocator!r}: --allocators takes {', '.join(ALLOCATORS)}"
                    )
                label = f"pagelab {allocator}"
                found.append(Variant(method, allocator, label, ALLOCATORS[allocator]))
        elif method in METHODS or ":" in method:
            found.append(Variant(method, None, method, "traditional"))
        else:
            raise ConfigError(f"no method {method!r}: --methods takes {', '.join(METHODS)}")
    labels = [variant.label for variant in found]
    if len(set(labels)) < len(labels):
        raise ConfigError("a method or allocator is named twice")
    if not found:
        raise ConfigError("nothing to compare: name at least one method (and one allocator)")
    return sorted(found, key=lambda variant: variant.phase == "paged")


def method_path(method: str) -> tuple[str, str]:
    """Module and class of a method.

    Raises:
        ConfigError: it is neither known nor `module:Class`.
    """
    module, colon, name = METHODS.get(method, method).partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"no method {method!r}: --methods takes {', '.join(METHODS)}")
    return module, name

"""The compiled extension: found, loaded once, and its instruction set chosen.

A plain C library called through ctypes, which lets go of the GIL. It is optional: without a
compiler at installation PageLab runs on torch's own operations.

Environment:
    PAGELAB_NATIVE: `0` turns it off; the name of an instruction set (`pagelab check` lists those
        that run here) takes that one instead of the fastest.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from ctypes import c_char_p, c_int32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

VARIABLE = "PAGELAB_NATIVE"
NAME = "_pagelab.so"
_VERSION = 2  # of the C ABI
_OFF = ("0", "off", "no", "false")


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded library and an instruction set of it."""

    library: ctypes.CDLL
    isa: int  # a pointer
    name: str


def native() -> Native | None:
    """The extension with the instruction set to use; None where it does not run."""
    found = _choose(os.environ.get(VARIABLE, ""))
    return found if isinstance(found, Native) else None


def why_no_native(environment: Mapping[str, str] = os.environ) -> str | None:
    """Why the extension does not run here; None where it does."""
    found = _choose(environment.get(VARIABLE, ""))
    return found if isinstance(found, str) else None


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of the extension that run here, the fastest first."""
    loaded = _load()
    return () if isinstance(loaded, str) else tuple(_names(loaded))


def _choose(setting: str) -> Native | str:
    if setting.lower() in _OFF:
        return f"{VARIABLE} is {setting}"
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    sets = _names(loaded)
    name = next(iter(sets)) if setting.lower() in ("", "1", "on", "auto") else setting
    if name not in sets:
        return f"{VARIABLE} is {setting!r}: here are {', '.join(sets)}"
    return Native(loaded, sets[name], name)


def _names(library: ctypes.CDLL) -> dict[str, int]:
    found: dict[str, int] = {}
    while pointer := library.pagelab_isa(len(found)):
        found[library.pagelab_isa_name(pointer).decode()] = pointer
    return found


@cache
def _load(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    path = folder / NAME
    if not path.exists():
        return "it was not compiled: install g++ or clang++, then PageLab again"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    version = library.pagelab_version()
    if version != _VERSION:
        return f"{path} is of another version ({version}, not {_VERSION}): install PageLab again"
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, f"pagelab_{name}")
        function.restype, function.argtypes = result, arguments
    return library


_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # result, arguments
    "isa": (c_void_p, c_int32),
    "isa_name": (c_char_p, c_void_p),
    "pool_new": (c_void_p, c_int32),
    "pool_free": (None, c_void_p),
    "linear_new": (c_void_p, c_void_p, *[c_int32] * 4),
    "linear_free": (None, c_void_p),
    "pack": (None, *[c_void_p] * 5),
    "pack_blocks": (None, *[c_void_p] * 3, c_int32, c_void_p, c_void_p),
    "linear": (None, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_void_p),
    "attend": (None, *[c_void_p] * 5, c_int32, c_void_p),
    "step": (c_int32, *[c_void_p] * 4),
    "logits": (c_int32, *[c_void_p] * 4, c_int32, c_void_p),
}

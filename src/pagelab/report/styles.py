"""How each method's lines and points look: never by colour alone.

A line has a colour and dashes of its own, a point a colour and a shape of its own; paging methods'
points are filled, the others' hollow. `assets/page.css` has the colours, for light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pagelab.results import Phase

# No two are alike, in one phase or across the two. The first of the paging methods is solid.
_DASHES: dict[Phase, tuple[tuple[int, ...], ...]] = {
    "paged": ((), (12, 3), (12, 3, 3, 3), (9, 2, 2, 2, 2, 2), (16, 4)),
    "traditional": (
        (2, 2),
        (6, 3),
        (6, 2, 2, 2),
        (3, 4),
        (9, 5),
        (1, 3),
        (4, 2, 1, 2),
        (14, 3, 2, 3, 2, 3),
    ),
}
# SVG paths in a box from -1 to 1, for Vega's points and for the legend.
_SHAPES = (
    "M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z",  # circle
    "M-.9 -.9H.9V.9H-.9Z",  # square
    "M0 -1.1L1.1 .9H-1.1Z",  # triangle, up
    "M0 -1.3L1.1 0L0 1.3L-1.1 0Z",  # diamond
    "M0 1.1L1.1 -.9H-1.1Z",  # triangle, down
    "M-.4 -1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",  # cross
    "M1.1 0L-.9 1.1V-1.1Z",  # triangle, right
    "M-1.1 -.5H1.1V.5H-1.1Z",  # bar
)
FIRST = "pagelab paged"  # has the first style of its phase, whatever ran before it


class Style(NamedTuple):
    """The look of one method."""

    color: str  # a CSS value
    dash: tuple[int, ...]
    shape: str  # an SVG path
    filled: bool


def styles(names: Iterable[tuple[str, Phase]]) -> dict[str, Style]:
    """A style for each name, in the order given; all differ, also without their colours."""
    ordered = sorted(dict(names).items(), key=lambda item: item[0] != FIRST)
    found: dict[str, Style] = {}
    counts: dict[Phase, int] = {"paged": 0, "traditional": 0}
    for name, phase in ordered:
        found[name] = _style(phase, counts[phase])
        counts[phase] += 1
    return found


def _style(phase: Phase, number: int) -> Style:
    dashes = _DASHES[phase]
    turn, place = divmod(number, len(dashes))
    # After one round of them all, dashes go with other colours than before.
    dash = dashes[(place + turn) % len(dashes)]
    shape = _SHAPES[number % len(_SHAPES)]
    return Style(f"var(--{phase}-{place})", dash, shape, phase == "paged")

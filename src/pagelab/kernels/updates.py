"""Changes that the host makes to what lives on the device, many in one copy.

All state that a step reads lies in one arena of 32-bit words; a change is a place in it and a
word. The changes of a step come over in one transfer and are scattered by its first kernel::

    upload | count | – | place, word | place, word | …          (int32)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagelab.kernels.launch import Device, begin
from pagelab.kernels.mailbox import Mailbox, next_turn

PROGRAMS = 16


@triton.jit
def _apply(
    upload,
    arena,
    turn,
    slots,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    if TURN:
        if tl.program_id(0) == 0:
            next_turn(turn, slots)
    count = tl.load(upload)
    for start in range(tl.program_id(0) * BLOCK, count, PROGRAMS * BLOCK):
        i = start + tl.arange(0, BLOCK)
        live = i < count
        place = tl.load(upload + 2 + 2 * i, mask=live, other=0)
        tl.store(arena + place, tl.load(upload + 3 + 2 * i, mask=live, other=0), mask=live)


def apply_updates(
    upload: torch.Tensor, arena: torch.Tensor, device: Device, mailbox: Mailbox | None = None
) -> None:
    """Write the upload's changes into the arena (both int32). They must not repeat a place.

    With a mailbox a step begins here, and takes the next slot of it.
    """
    device.launch(
        _apply,
        (PROGRAMS,),
        upload,
        arena,
        upload if mailbox is None else mailbox.turn,
        0 if mailbox is None else len(mailbox.words),
        PROGRAMS,
        256,
        mailbox is not None,
        device.pdl,
        num_warps=4,
    )

"""What the device keeps of each sequence, and how the host changes it.

A mirror, never the owner: the scheduler has the progress, the KV manager the block tables, and
every row can be written again from a batch. All of it lies in one arena of 32-bit words, so that
any change is (place, word) and a step's changes go over in one copy::

    arena | order | next_token | computed | output_index | temperature … | block tables ········ |

    order: the rows of a decode step's sequences, in the order of the batch; then the scratch row
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from pagelab.kernels.sampling import SamplingMode, SamplingState
from pagelab.kernels.sizes import MAX_SUPPRESSED, aligned
from pagelab.kernels.step_state import SequenceRows
from pagelab.scheduling.batch import ScheduledSequence
from pagelab.types import BlockId, SamplingParams, SequenceId


@dataclass(slots=True, eq=False)
class Row:
    """What the host knows of a row of the device."""

    index: int
    sequence_id: SequenceId
    next_start: int = -1  # where the device expects the sequence's next token; -1: not written
    block_ids: tuple[BlockId, ...] = ()
    last_step: int = -1
    sampled: bool = True  # the last step here gave the device the sequence's next token
    suppresses: bool = False
    identity: tuple[SamplingParams, int] | None = None  # what is written: parameters and seed
    mode: SamplingMode = SamplingMode.GREEDY  # what these parameters need
    logprobs: bool = False


class DeviceState:
    """The arena, its parts as tensors, and the changes that are not sent yet.

    Args:
        num_rows: sequences that it has room for, without the scratch row.
        max_blocks: blocks of a sequence at most.
        scratch_block: where padding writes.
        device: where.
        vocab_size: of the model.
    """

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        scratch_block: int,
        device: torch.device,
        *,
        vocab_size: int,
    ) -> None:
        self.num_rows, self.max_blocks, self.device = num_rows, max_blocks, device
        self._vocab_size = vocab_size
        rows = num_rows + 1
        self._places: dict[str, int] = {}
        sizes = {
            "seed": 2 * rows,  # first: 64-bit words must be aligned
            "order": num_rows,
            "next_token": rows,
            "computed": rows,
            "output_index": rows,
            "temperature": rows,
            "top_k": rows,
            "top_p": rows,
            "min_p": rows,
            "suppressed": rows * MAX_SUPPRESSED,
            "num_suppressed": rows,
            "min_until": rows,
            "block_tables": rows * max_blocks,
        }
        end = 0
        for name, size in sizes.items():
            self._places[name] = end
            end += aligned(size)
        self.arena = torch.zeros(end, dtype=torch.int32, device=device)

        def part(name: str) -> torch.Tensor:
            return self.arena[self._places[name] : self._places[name] + sizes[name]]

        tables = part("block_tables").view(rows, max_blocks)
        tables[num_rows] = scratch_block
        self.order = part("order")
        self.order.fill_(num_rows)
        self.rows = SequenceRows(part("next_token"), part("computed"), part("output_index"), tables)
        self.sampling = SamplingState(
            temperature=part("temperature").view(torch.float32),
            top_k=part("top_k"),
            top_p=part("top_p").view(torch.float32),
            min_p=part("min_p").view(torch.float32),
            seed=part("seed").view(torch.int64),
            output_index=part("output_index"),
            suppressed=part("suppressed").view(rows, MAX_SUPPRESSED),
            num_suppressed=part("num_suppressed"),
            min_until=part("min_until"),
        )
        self.sampling.top_p.fill_(1.0)
        self._rows: dict[SequenceId, Row] = {}
        self._free = list(range(num_rows - 1, -1, -1))
        self._places_changed: list[int] = []
        self._words: list[int] = []
        self._order: list[int] = []  # as the device has it

    def row(self, part: ScheduledSequence, step: int, collected: int) -> Row:
        """The row of a scheduled sequence, brought up to date with it (`take_changes`).

        Rows whose last step is `collected` or earlier may be given to somebody else.
        """
        row = self._rows.get(part.sequence_id)
        if row is None:
            row = self._new_row(part, collected)
        known = row.identity
        if known is None or known[0] is not part.params or known[1] != part.position_seed[0]:
            self._describe(row, part)  # a request's name may come again
        if row.next_start != part.start:
            self._place(row, part)
        elif not row.sampled:  # a chunk of the prompt went before
            self._set(self._places["next_token"] + row.index, part.token_ids[0])
        if row.block_ids is not part.block_ids:
            self._update_table(row, part.block_ids)
        if part.suppressed and not row.suppresses:
            self._suppress(row, part)
        row.next_start = part.start + part.num_tokens
        row.sampled = part.samples
        row.last_step = step
        return row

    def set_order(self, indices: list[int]) -> None:
        """The rows of a decode step."""
        known = self._order
        if indices == known:
            return
        base = self._places["order"]
        for i, index in enumerate(indices):
            if i >= len(known) or known[i] != index:
                self._set(base + i, index)
        for i in range(len(indices), len(known)):
            self._set(base + i, self.num_rows)
        self._order = indices

    def forget_order(self) -> None:
        """What was sent of the order may not have arrived."""
        self._order = [-1] * self.num_rows

    def take_changes(self) -> np.ndarray | None:
        """The changes since the last call, `[count, 2]` int32 (place, word); None if none."""
        if not self._places_changed:
            return None
        # of several changes to a place the last one counts
        words = dict(zip(self._places_changed, self._words, strict=True))
        changes = np.empty((len(words), 2), np.int32)
        changes[:, 0] = list(words)
        changes[:, 1] = np.array(list(words.values()), np.int64).astype(np.uint32).view(np.int32)
        self._places_changed.clear()
        self._words.clear()
        return changes

    def _new_row(self, part: ScheduledSequence, collected: int) -> Row:
        if not self._free:
            for old in list(self._rows.values()):
                if old.last_step <= collected:
                    del self._rows[old.sequence_id]
                    self._free.append(old.index)
        row = self._rows[part.sequence_id] = Row(self._free.pop(), part.sequence_id)
        return row

    def _describe(self, row: Row, part: ScheduledSequence) -> None:
        """How the sequence samples."""
        params, index = part.params, row.index
        seed = part.position_seed[0] & 0xFFFFFFFFFFFFFFFF
        self._set(self._places["seed"] + 2 * index, seed & 0xFFFFFFFF)
        self._set(self._places["seed"] + 2 * index + 1, seed >> 32)
        for name, word in (
            ("temperature", _bits(params.temperature)),
            ("top_k", min(params.top_k, 0x7FFFFFFF)),
            ("top_p", _bits(params.top_p)),
            ("min_p", _bits(params.min_p)),
            ("num_suppressed", 0),
            ("min_until", params.min_tokens),
        ):
            self._set(self._places[name] + index, word)
        row.identity, row.suppresses = (params, part.position_seed[0]), False
        row.mode = SamplingMode.of([params], self._vocab_size)
        row.logprobs = params.logprobs is not None
        row.next_start = -1

    def _place(self, row: Row, part: ScheduledSequence) -> None:
        """The sequence starts here, or again (after a preemption)."""
        self._set(self._places["computed"] + row.index, part.start)
        self._set(self._places["output_index"] + row.index, part.position_seed[1])
        if part.token_ids:
            self._set(self._places["next_token"] + row.index, part.token_ids[0])

    def _update_table(self, row: Row, block_ids: tuple[BlockId, ...]) -> None:
        known = row.block_ids
        base = self._places["block_tables"] + row.index * self.max_blocks
        ids = block_ids[: self.max_blocks]  # what a reservation has beyond is never reached
        same = len(known)
        if known != ids[:same]:
            same = 0
        self._places_changed.extend(range(base + same, base + len(ids)))
        self._words.extend(ids[same:])
        row.block_ids = block_ids

    def _suppress(self, row: Row, part: ScheduledSequence) -> None:
        ids = part.suppressed[:MAX_SUPPRESSED]  # with more, the runner masks the logits itself
        base = self._places["suppressed"] + row.index * MAX_SUPPRESSED
        for i, token in enumerate(ids):
            self._set(base + i, token)
        self._set(self._places["num_suppressed"] + row.index, len(ids))
        row.suppresses = True

    def _set(self, place: int, word: int) -> None:
        self._places_changed.append(place)
        self._words.append(word)


_LARGEST = float(np.finfo(np.float32).max)
_FLOAT32, _FLOAT32_BITS = struct.Struct("<f"), struct.Struct("<I")


def _bits(value: float) -> int:
    return _FLOAT32_BITS.unpack(_FLOAT32.pack(min(value, _LARGEST)))[0]  # type: ignore[no-any-return]

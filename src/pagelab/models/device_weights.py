"""Weights on their way from a file to a GPU, one tensor at a time."""

from __future__ import annotations

from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import SimpleQueue

import numpy as np
import torch

from pagelab.models.passed_weights import PassedWeights

PIECE_BYTES = 16 << 20
"""What one thread reads and sends at a time."""

_SMALL_BYTES = 1 << 20  # such tensors go over as they are: a norm is not worth two threads


class DeviceWeights(PassedWeights):
    """A mapping of tensors on the host, each of which arrives on the device when it is taken.

    ::

        file, mapped    ──▶ pinned piece ──▶ the device ──▶ converted into its place
        or dequantized      (a thread for each of some pieces; 16 MiB)

    The host never holds more than the tensor that is taken (of a mapped file: none of it) and
    the pinned pieces; the device never more than the tensor, in its final dtype, and a piece for
    each thread in the file's. Use it as a context manager, or `close` it.

    Args:
        source: the tensors, in any float dtype; emptied as this is.
        dtype: that they arrive in.
        device: where.
        threads: that read and send.
        piece_bytes: of each.
    """

    def __init__(
        self,
        source: MutableMapping[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        threads: int = 4,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(source)
        self._dtype, self._device = dtype, device
        self._piece_bytes = piece_bytes
        self._cuda = device.type == "cuda"
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pagelab-weights")
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(threads):
            self._lanes.put(_Lane(piece_bytes, device))

    def __enter__(self) -> DeviceWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and let go of the pinned memory."""
        self._threads.shutdown(cancel_futures=True)
        self._lanes = SimpleQueue()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        if tensor.numel() * max(tensor.element_size(), self._dtype.itemsize) <= _SMALL_BYTES:
            return tensor.to(self._device, self._dtype, copy=True)
        return self._send(tensor)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        target = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
        source, place = tensor.contiguous().view(-1), target.view(-1)
        # the target's memory may have been someone else's, whose work is not done yet
        free = torch.cuda.current_stream(self._device).record_event() if self._cuda else None
        step = max(1, self._piece_bytes // tensor.element_size())
        pieces = [slice(at, at + step) for at in range(0, len(source), step)]
        sent = [self._threads.submit(self._piece, source[p], place[p], free) for p in pieces]
        for each in sent:
            each.result()
        return target

    def _piece(
        self, source: torch.Tensor, target: torch.Tensor, free: torch.cuda.Event | None
    ) -> None:
        lane = self._lanes.get()
        try:
            lane.send(source, target, free)
        finally:
            self._lanes.put(lane)


class _Lane:
    """A piece of pinned memory, and on a GPU a stream of its own."""

    def __init__(self, piece_bytes: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._buffer = torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._stream = torch.cuda.Stream(device) if cuda else None

    def send(
        self, source: torch.Tensor, target: torch.Tensor, free: torch.cuda.Event | None
    ) -> None:
        """Copy and convert; returns when it is there, and the buffer free again."""
        size = source.numel() * source.element_size()
        buffer = self._buffer[:size]
        # numpy copies with one thread and without the interpreter's lock
        np.copyto(buffer.numpy(), source.view(torch.uint8).numpy())
        staged = buffer.view(source.dtype)
        with torch.inference_mode(), self._on_stream():
            if self._stream is None:
                target.copy_(staged)
                return
            assert free is not None
            self._stream.wait_event(free)
            if source.dtype is target.dtype:
                target.copy_(staged, non_blocking=True)
            else:
                target.copy_(staged.to(self._device, non_blocking=True))
            self._stream.synchronize()

    def _on_stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

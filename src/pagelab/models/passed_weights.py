"""Weights that pass through somebody's hands on their way to the decoder."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch

from pagelab.native.packed import Blocks


class PassedWeights(MutableMapping[str, torch.Tensor]):
    """A mapping that is its source in all but what `__getitem__` makes of a tensor.

    Args:
        source: emptied as this is.
    """

    def __init__(self, source: MutableMapping[str, torch.Tensor]) -> None:
        self._source = source

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[name]

    def blocks(self, name: str) -> Blocks | None:
        """The source's own quantized blocks of a matrix, where it holds such."""
        read = getattr(self._source, "blocks", None)
        return None if read is None else read(name)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._source[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

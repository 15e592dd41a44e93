"""A GGUF file's weights, each dequantized when it is taken."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch

from pagelab.models.gguf_file import GGUFFile
from pagelab.models.gguf_model import read_array, read_blocks, stored_names
from pagelab.models.spec import ModelSpec
from pagelab.native.packed import Blocks


class GGUFWeights(MutableMapping[str, torch.Tensor]):
    """All of `expected_weights(spec)`: on the host there is only what was taken and not let go.

    Quantized tensors come as float32, others in the file's dtype.

    Args:
        file: the file.
        spec: of its model.

    Raises:
        CorruptModelError: a tensor is missing or has another shape.
        UnsupportedModelError: a tensor that the spec has no place for, or (when it is taken) that
            cannot be read.
    """

    def __init__(self, file: GGUFFile, spec: ModelSpec) -> None:
        self._file, self._spec = file, spec
        self._places = stored_names(file, spec)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(read_array(self._file, self._spec, name, self._places[name]))

    def blocks(self, name: str) -> Blocks | None:
        """A matrix in the file's own quantized blocks; None where it is of another type."""
        return read_blocks(self._file, self._spec, name, self._places[name])

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        raise TypeError("a file's weights are read, not set")

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

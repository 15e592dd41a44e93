"""Weights that are drawn, not read: a model of a true shape for timing, without its files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, MutableMapping

import torch

from pagelab.models.spec import ModelSpec
from pagelab.models.weights import expected_weights

STD = 0.02  # as transformers starts these families


class RandomWeights(MutableMapping[str, torch.Tensor]):
    """All of `expected_weights(spec)`, each drawn when it is taken, on the device and in its dtype.

    Nothing is kept, so that of a large model only what the decoder has packed so far exists, and
    never on the host or in float32. A tensor depends on the seed and its name alone (and on the
    kind of device, whose generator draws it), whatever the order in which they are taken.

    Matrices and biases are normal with a deviation of 0.02; norms' weights are 1 plus that.

    Args:
        spec: of the model.
        dtype: of every tensor.
        device: where they are drawn.
        seed: another seed, other weights.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self._shapes = expected_weights(spec)
        self._dtype, self._device, self._seed = dtype, device, seed
        self._generator = torch.Generator(device)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        self._generator.manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        return tensor.normal_(float(is_norm), STD, generator=self._generator)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        raise TypeError("random weights are drawn, not set")

    def __delitem__(self, name: str) -> None:
        del self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

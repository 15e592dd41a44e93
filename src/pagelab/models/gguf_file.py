"""The GGUF container: metadata and tensors, read straight from a memory map.

`gguf.GGUFReader` makes a numpy array of every one of a vocabulary's strings, 2.1 s for the
default model's 98,052 tokens and merges; walking them with `struct` takes 0.06 s. Types, block
sizes and dequantization are the `gguf` package's.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md::

    "GGUF" version:u32 tensors:u64 pairs:u64
    pairs   × (key:string type:u32 value)
    tensors × (name:string n:u32 dims:u64[n] type:u32 offset:u64)      dims: the fastest first
    padding to general.alignment, then the tensors' bytes
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import numpy.typing as npt

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd", strict=True))
# dequantizing works on 16 rows at a time: longer rows make it 4 times as fast
_ROW_BYTES = 32768


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in torch's order, the slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int  # bytes from the beginning of the file
    nbytes: int


class GGUFFile:
    """One GGUF file: its metadata, its tensors' places, and their contents when asked for.

    Args:
        path: the file.

    Raises:
        ModelNotFoundError: it cannot be read.
        CorruptModelError: it is no GGUF, or it ends too early.
        UnsupportedModelError: another version, byte order, tensor type, or one of several parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if path.stat().st_size == 0:
                    raise CorruptModelError(f"{path} is empty")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelNotFoundError(f"{path} cannot be read: {error.strerror or error}") from error
        self._at = 0
        self.metadata: Mapping[str, Any]
        self.tensors: Mapping[str, GGUFTensor]
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CorruptModelError(f"{path} is no whole GGUF file: {error}") from error

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor's values, a copy of its own.

        Quantized types and BF16 come as float32; F64, F32 and F16 as they are.

        Raises:
            UnsupportedModelError: a type that `gguf` cannot dequantize.
        """
        tensor = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.start)
        kinds = gguf.GGMLQuantizationType
        plain = {kinds.F64: np.float64, kinds.F32: np.float32, kinds.F16: np.float16}
        if tensor.type in plain:
            return raw.view(plain[tensor.type]).reshape(tensor.shape).copy()
        try:
            with np.errstate(all="ignore"):  # broken scales become NaN: no warning of numpy's
                values = gguf.dequantize(_long_rows(raw, tensor), tensor.type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.path}: {name} has the type {tensor.type.name}, which cannot be dequantized"
            ) from error
        reshaped: npt.NDArray[Any] = values.reshape(tensor.shape)
        return reshaped

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A matrix's own bytes, `[rows, bytes a row]`, in the file's memory map."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.start)
        return raw.reshape(prod(tensor.shape[:-1]), -1)

    def _read_header(self) -> None:
        if self._take(4) != _MAGIC:
            raise CorruptModelError(f"{self.path} is no GGUF file: it does not begin with GGUF")
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            what = "big-endian" if swapped else f"version {version}"
            raise UnsupportedModelError(f"{self.path} is {what}; PageLab reads GGUF 2 and 3")
        num_tensors, num_pairs = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind)
        self.metadata = metadata
        if metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedModelError(
                f"{self.path}: split.count is {metadata['split.count']}: merge the parts into one "
                "file with llama.cpp's gguf-split"
            )
        self.tensors = self._place([self._tensor() for _ in range(num_tensors)])

    def _place(self, tensors: list[GGUFTensor]) -> dict[str, GGUFTensor]:
        """Turn offsets into the data section into offsets into the file, and check them."""
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CorruptModelError(f"{self.path}: general.alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        placed: dict[str, GGUFTensor] = {}
        for t in tensors:
            start = begin + t.start
            if start + t.nbytes > len(self._bytes):
                raise CorruptModelError(
                    f"{self.path} is truncated: {t.name} ends at byte {start + t.nbytes:,}, "
                    f"the file at {len(self._bytes):,}"
                )
            if t.name in placed:
                raise CorruptModelError(f"{self.path} has two tensors named {t.name}")
            placed[t.name] = GGUFTensor(t.name, t.shape, t.type, start, t.nbytes)
        return placed

    def _tensor(self) -> GGUFTensor:
        name = self._string()
        (num_dims,) = self._unpack("I")
        if num_dims > _MAX_DIMS:
            raise CorruptModelError(f"{self.path}: {name} has {num_dims} dimensions")
        shape = tuple(reversed(self._unpack(f"{num_dims}Q")))
        code, offset = self._unpack("IQ")
        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{self.path}: {name} has the tensor type {code}, which gguf does not know"
            ) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise CorruptModelError(
                f"{self.path}: {name} has the shape {list(shape)}, "
                f"which {kind.name}'s blocks of {block} do not fill"
            )
        return GGUFTensor(name, shape, kind, offset, prod(shape) // block * block_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._unpack("IQ")
            if item in _SCALARS:
                if count > len(self._bytes):  # before struct builds a tuple of it
                    self._truncated()
                return list(self._unpack(f"{count}{_SCALARS[item]}"))
            if item == _STRING:
                return self._strings(count)
            if item == _ARRAY:
                raise UnsupportedModelError(f"{self.path}: an array of arrays in the metadata")
            kind = item
        if kind not in _SCALARS:
            raise CorruptModelError(f"{self.path}: metadata of an unknown type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _strings(self, count: int) -> list[str]:
        """Many strings, with as few calls as Python allows: a vocabulary has 100,000."""
        data, at, end = self._bytes, self._at, len(self._bytes)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            (length,) = unpack(data, at)
            begin = at + 8
            at = begin + length
            if at > end:
                self._truncated()
            strings.append(data[begin:at].decode())
        self._at = at
        return strings

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        return self._take(length).decode()

    def _unpack(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        at, self._at = self._at, self._at + struct.calcsize(form)
        return struct.unpack_from(form, self._bytes, at)

    def _take(self, count: int) -> bytes:
        at, self._at = self._at, self._at + count
        if self._at > len(self._bytes):
            self._truncated()
        return self._bytes[at : self._at]

    def _truncated(self) -> NoReturn:
        raise CorruptModelError(
            f"{self.path} is truncated: its header goes past its {len(self._bytes):,} bytes"
        )


def _long_rows(raw: npt.NDArray[np.uint8], tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
    """The bytes as rows of whole blocks, about `_ROW_BYTES` each."""
    rows = prod(tensor.shape[:-1])
    merged = max(1, _ROW_BYTES * rows // max(1, tensor.nbytes))
    while rows % merged:
        merged -= 1
    return raw.reshape(rows // merged, -1)

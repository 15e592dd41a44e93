"""Weights on their way to a device: the same values, one at a time, with a bar for the patient."""

from __future__ import annotations

import io
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch
from rich.console import Console

from pagelab.execution.load_progress import LoadProgress, WatchedWeights, loaded_bytes
from pagelab.models.device_weights import DeviceWeights
from pagelab.models.fetch import resolve
from pagelab.models.gguf_weights import GGUFWeights
from pagelab.models.registry import load_spec, load_weights, open_weights
from tests.support.tiny_models import tiny_gguf, tiny_source

CPU = torch.device("cpu")


class Noted(MutableMapping[str, torch.Tensor]):
    """Tensors that note when they are read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.read = tensors, list[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.tensors[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (700, 401), (1 << 19,)])
def test_every_piece_arrives_in_its_place_and_the_model_s_dtype(
    stored: torch.dtype, wanted: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(stored)
    with DeviceWeights({"w": tensor}, wanted, CPU, threads=3, piece_bytes=10_000) as weights:
        found = weights.pop("w")
        assert len(weights) == 0
    assert found.dtype is wanted
    assert torch.equal(found, tensor.to(wanted))
    assert found.data_ptr() != tensor.data_ptr()  # it may be changed in place


def test_a_tensor_that_is_no_contiguous_one_is_sent_by_its_values() -> None:
    tensor = torch.arange(600_000, dtype=torch.float32).view(600, 1000).t()
    with DeviceWeights({"w": tensor}, torch.float32, CPU, piece_bytes=4096) as weights:
        assert torch.equal(weights.pop("w"), tensor)


def test_nothing_is_read_before_it_is_taken() -> None:
    source = Noted({name: torch.full((600, 600), float(i)) for i, name in enumerate("abc")})
    with DeviceWeights(source, torch.bfloat16, CPU) as weights:
        assert list(weights) == ["a", "b", "c"]
        assert source.read == []
        weights.pop("b")
        assert source.read == ["b"]
        assert list(source) == ["a", "c"]
        with pytest.raises(KeyError):
            weights.pop("b")


def test_an_error_of_a_thread_is_an_error_of_the_taking(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    with DeviceWeights({"w": torch.zeros(1 << 20)}, torch.float32, CPU) as weights:
        monkeypatch.setattr("pagelab.models.device_weights.np.copyto", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            weights.pop("w")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_opened_weights_are_the_loaded_ones(name: str) -> None:
    for source in (tiny_source(name), resolve(tiny_gguf(name, "Q8_0"))):
        spec = load_spec(source)
        loaded, opened = load_weights(source, spec), open_weights(source, spec)
        assert set(opened) == set(loaded)
        for key, tensor in loaded.items():
            assert torch.equal(opened.pop(key), tensor)
        assert len(opened) == 0


def test_a_gguf_is_dequantized_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(tiny_gguf("llama", "Q8_0"))
    spec = load_spec(source)
    opened = open_weights(source, spec)
    assert isinstance(opened, GGUFWeights)
    read: list[str] = []
    original = opened._file.read

    def noted(name: str) -> Any:
        read.append(name)
        return original(name)

    monkeypatch.setattr(opened._file, "read", noted)
    opened.pop("model.norm.weight")
    assert read == ["output_norm.weight"]
    with pytest.raises(TypeError, match="read, not set"):
        opened["x"] = torch.zeros(1)


def test_all_weights_are_counted_on_the_bar() -> None:
    source = tiny_source("llama")
    spec = load_spec(source)
    size = loaded_bytes(spec, 2)
    assert size == 2 * spec.num_parameters
    with LoadProgress(size) as progress:
        watched = WatchedWeights(open_weights(source, spec), progress, 2)
        for name in list(watched):
            watched.pop(name)
        assert progress.loaded_bytes == size
        assert not progress.shown


@pytest.mark.parametrize(
    ("terminal", "enabled", "seconds", "shown"),
    [
        (True, True, 1.5, True),
        (True, True, 0.5, False),
        (True, False, 9.0, False),
        (False, True, 9.0, False),
    ],
)
def test_the_bar_appears_on_a_terminal_after_a_second(
    terminal: bool, enabled: bool, seconds: float, shown: bool
) -> None:
    now = [100.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with LoadProgress(1000, enabled=enabled, console=console, clock=lambda: now[0]) as progress:
        progress.advance(10)
        now[0] += seconds
        progress.advance(10)
        assert progress.shown is shown
    assert ("loading weights" in out.getvalue()) is shown

"""The extension's products: against torch, and every row independent of the rows beside it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from pagelab.native.library import Native, instruction_sets, native
from pagelab.native.packed import KINDS, Blocks, PackedLinear, Threads

pytestmark = pytest.mark.skipif(native() is None, reason="the extension does not run here")

TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "int8": 1.5e-2, "q8": 1.5e-2, "q4": 0.1}
SHAPES = [(96, 64), (33, 50), (40, 1540)]  # out, in


def extension(isa: str, monkeypatch: pytest.MonkeyPatch) -> Native:
    monkeypatch.setenv("PAGELAB_NATIVE", isa)
    found = native()
    assert found is not None
    assert found.name == isa
    return found


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_torch_whatever_the_number_of_rows(
    shape: tuple[int, int], kind: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(extension(isa, monkeypatch), 2)
    torch.manual_seed(0)
    weight, bias = torch.randn(shape) * 0.05, torch.randn(shape[0])
    packed = PackedLinear(threads, KINDS[kind], weight, bias)
    x = torch.randn(61, shape[1])
    want = x @ weight.T + bias
    whole = packed(threads, x)
    assert float((whole - want).norm() / want.norm()) < TOLERANCE[kind]
    for rows in (1, 2, 3, 7, 14, 15, 29):
        assert torch.equal(packed(threads, x[:rows]), whole[:rows]), "to the bit"


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_files_blocks_are_taken_over_exactly(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs of whole numbers up to 127 quantize exactly, so that only the weights are tested."""
    threads = Threads(extension(isa, monkeypatch), 2)
    torch.manual_seed(0)
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quantize(torch.randn(70, 96).numpy(), kind)
    blocks = Blocks(int(kind), data, 96)
    packed = PackedLinear(threads, blocks.kind, blocks)
    x = torch.randint(-127, 128, (9, 96)).float()
    x[:, ::32] = 127.0
    want = x.double() @ torch.from_numpy(gguf.dequantize(data, kind)).double().T
    torch.testing.assert_close(packed(threads, x).double(), want, rtol=1e-5, atol=1e-3)
    floats = PackedLinear(threads, KINDS["float32"], blocks)
    values = PackedLinear(threads, KINDS["float32"], torch.from_numpy(gguf.dequantize(data, kind)))
    assert torch.equal(floats(threads, x), values(threads, x)), "the same values to the bit"


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_products_of_blocks_are_within_their_inputs_rounding(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 1/127 of a group's peak (2.3 deviations of 32 normal numbers on average, 4 seldom)
    is off by 1/sqrt(12) of itself at random: 0.5 to 0.9 % of a deviation."""
    threads = Threads(extension(isa, monkeypatch), 2)
    torch.manual_seed(0)
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quantize((torch.randn(96, 640) * 0.05).numpy(), kind)
    packed = PackedLinear(threads, Blocks(int(kind), data, 640).kind, Blocks(int(kind), data, 640))
    x = torch.randn(50, 640)
    want = x.double() @ torch.from_numpy(gguf.dequantize(data, kind)).double().T
    assert float((packed(threads, x) - want).norm() / want.norm()) < 0.009


def test_a_group_of_zeros_and_a_huge_number_stay_what_they_are() -> None:
    found = native()
    assert found is not None
    threads = Threads(found, 1)
    weight = torch.eye(64)
    packed = PackedLinear(threads, KINDS["q8"], weight)
    x = torch.zeros(2, 64)
    x[1, 40] = 1e30
    got = packed(threads, x)
    assert not got[0].any()
    assert float(got[1, 40]) == pytest.approx(1e30, rel=1e-2)
    assert not got[1, :32].any()


def test_many_threads_take_every_piece_once() -> None:
    found = native()
    assert found is not None
    torch.manual_seed(0)
    weight = torch.randn(700, 64)
    alone, many = Threads(found, 1), Threads(found, 9)
    packed = PackedLinear(alone, KINDS["float32"], weight)
    x = torch.randn(5, 64)
    want = packed(alone, x)
    for _ in range(300):
        assert torch.equal(packed(many, x), want)


def test_sums_beyond_sixteen_bits_do_not_overflow() -> None:
    """The instruction sets without byte products add up pairs in wider numbers."""
    found = native()
    assert found is not None
    threads = Threads(found, 1)
    weight = torch.full((32, 64), -1.0)
    x = torch.full((1, 64), -3.0)
    for kind in ("int8", "q8"):
        got = PackedLinear(threads, KINDS[kind], weight)(threads, x)
        np.testing.assert_allclose(got, 192.0, rtol=1e-3)

"""The decoder of `decoder`, with as few kernels a layer as it takes, for a CUDA graph.

Few rows (most decode steps), five kernels a layer::

    qkv (norm inside) → attention (norm of q and k, rotary embedding, cache write inside)
    → output (+ residual) → up (norm and activation inside) → down (+ residual)

More rows, with products by cuBLAS: norm, qkv, project (for sequences that bring several tokens),
attention, output (+ residual), norm, up, activation, down (+ residual).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from pagelab.kernels.elementwise import (
    NormWeights,
    Pending,
    activate_,
    add_norm,
    gated,
    last_norm,
    sum_rows,
)
from pagelab.kernels.launch import Device
from pagelab.kernels.linear import (
    FoldedNorm,
    Peaks,
    SplitWorkspace,
    Tiling,
    empty_rows,
    linear,
)
from pagelab.kernels.paged_decode import Projections
from pagelab.kernels.row_stats import RowStats
from pagelab.kernels.sizes import MAX_LINEAR_ROWS, split_blocks, split_sums
from pagelab.kernels.step_state import Embeddings
from pagelab.kernels.tilings import INVARIANT, fitted, head_tiling, tiling_for
from pagelab.models.decoder import Decoder, DecoderLayer
from pagelab.models.layers import Linear, Norm

Attend = Callable[[int, torch.Tensor, Projections], torch.Tensor]
"""`attend(layer, qkv, projections)` → `[T, H · D]`: everything from raw projections to attention's
output, K/V written."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A linear layer; with `norm`, of the normed input, whose weight is folded into it."""

    weight: torch.Tensor  # [N, K], contiguous
    bias: torch.Tensor | None
    norm: FoldedNorm | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Product
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: _Product
    up: _Product
    down: _Product


class FusedDecoder:
    """Takes over the weights of a decoder (whose norms it folds into them, in place).

    Args:
        decoder: on the device, not packed; not to be used any more.
        device: how its kernels are launched.
        max_tokens: of a step.
        batch_invariant: the same kernels with the same tiles for any number of rows.
    """

    def __init__(
        self, decoder: Decoder, device: Device, *, max_tokens: int, batch_invariant: bool = False
    ) -> None:
        self.spec = spec = decoder.spec
        self.device = device
        self.dtype = decoder.dtype
        self._invariant = batch_invariant
        # in float32 cuBLAS is ahead: Triton's products in full precision use no matrix units
        self._max_rows = 0 if decoder.dtype is torch.float32 else MAX_LINEAR_ROWS
        self.layers = [
            _Layer(
                qkv=_fold(layer.attention_norm, layer.qkv),
                q_norm=None if layer.q_norm is None else layer.q_norm.weight,
                k_norm=None if layer.k_norm is None else layer.k_norm.weight,
                output=_product(layer.output),
                up=_fold(layer.mlp_norm, _paired(layer.up) if spec.gated_mlp else layer.up),
                down=_product(layer.down),
            )
            # one by one, so that weights which are copied are not there twice for all layers
            for layer in _taken(decoder.layers)
        ]
        self.head = decoder.head.weight
        where = self.head.device
        self.embeddings = Embeddings(
            decoder.embedding,
            decoder.position_embedding if decoder.rotary is None else None,
            None if decoder.rotary is None else decoder.rotary.frequencies,
        )
        final = decoder.final_norm
        self.final_norm = NormWeights(final.weight, final.bias, final.eps, spec.norm == "layernorm")
        self._logits_shape = self.head.new_empty(1).expand(len(self.head))  # takes no memory
        self._workspace = SplitWorkspace(
            split_sums(spec.hidden_size), split_blocks(spec.hidden_size), where
        )
        layer = spec.norm == "layernorm"
        self._stats = RowStats(max_tokens, spec.hidden_size, layer=layer, device=where)

    def stats_of(self, rows: int) -> RowStats | None:
        """Where the sums of the first hidden state of so many rows go; None: nobody reads them."""
        layer, spec = self.layers[0], self.spec
        n, hidden = layer.qkv.weight.shape
        if self._tiling(rows, n, hidden, gated=False, norm=True) is None:
            return None
        # as many blocks as the layers after it get, so that their kernel serves the first one too
        down = self._tiling(rows, hidden, spec.intermediate_size, gated=False, norm=False)
        self._stats.blocks = 1 if down is None else -(-hidden // down.block_n)
        return self._stats

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> Pending | None:
        """Run all layers on the residual stream x `[T, hidden]`, in place.

        cos and sin are `[T, D / 2]`; the sums of x are where `stats_of` says. Returns what is
        still to be added to x.
        """
        spec = self.spec
        rope = spec.positions == "rope"
        pending: Pending | None = None
        for i, layer in enumerate(self.layers):
            qkv = self._normed(x, pending, layer.qkv)
            projections = Projections(
                cos if rope else None,
                sin if rope else None,
                layer.q_norm,
                layer.k_norm,
                spec.norm_eps,
            )
            pending = self._added(x, attend(i, qkv, projections), layer.output)
            hidden = self._normed(x, pending, layer.up, activate=True)
            pending = self._added(x, hidden, layer.down)
        return pending

    def logits(
        self,
        x: torch.Tensor,
        pending: Pending | None,
        last: torch.Tensor,
        finite: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Logits of the rows `last` `[S]` into `out` `[S, vocab]` float32; see `last_norm`."""
        h = empty_rows(x, len(last), x.shape[1])
        last_norm(x, pending, last, self.final_norm, h, finite, self.device)
        tiling = self._head_tiling(h)
        if tiling is not None:
            linear(h, self.head, out, tiling, self._workspace, self.device)
        elif h.dtype is torch.float32:
            torch.mm(h, self.head.t(), out=out)
        elif h.is_cuda:
            torch.mm(h, self.head.t(), out_dtype=torch.float32, out=out)
        else:
            out.copy_(h @ self.head.t())

    def peaks(
        self,
        x: torch.Tensor,
        pending: Pending | None,
        last: torch.Tensor,
        finite: torch.Tensor,
        out: Peaks,
    ) -> int | None:
        """The largest logits instead of all, in blocks; how many blocks a row has.

        None, and nothing done, where that is not the faster way.
        """
        tiling = None if len(last) > MAX_LINEAR_ROWS else self._head_tiling(x)
        if tiling is None:
            return None
        h = empty_rows(x, len(last), x.shape[1])
        last_norm(x, pending, last, self.final_norm, h, finite, self.device)
        shape = self._logits_shape.expand(len(last), -1)
        linear(h, self.head, shape, tiling, self._workspace, self.device, peaks=out)
        return -(-len(self.head) // tiling.block_n)

    def _head_tiling(self, h: torch.Tensor) -> Tiling | None:
        if self._invariant:
            return fitted(INVARIANT, h.shape[1])
        return head_tiling(len(h), h.shape[1]) if len(h) <= self._max_rows else None

    def _tiling(self, rows: int, n: int, k: int, *, gated: bool, norm: bool) -> Tiling | None:
        if self._invariant:
            return fitted(INVARIANT, k)
        if rows > self._max_rows:
            return None
        return tiling_for(rows, n, k, gated=gated, norm=norm)

    def _normed(
        self,
        x: torch.Tensor,
        pending: Pending | None,
        product: _Product,
        *,
        activate: bool = False,
    ) -> torch.Tensor:
        """`product(norm(x + pending))`, x updated, and the feed-forward's activation if asked."""
        assert product.norm is not None
        gate = activate and self.spec.gated_mlp
        kind = self.spec.activation if activate else "none"
        rows, k = x.shape
        n = product.weight.shape[0] // (2 if gate else 1)
        tiling = self._tiling(rows, n, k, gated=gate, norm=True)
        if tiling is not None:
            if pending is not None:
                sum_rows(x, pending, self._stats, self.device)
            out = empty_rows(x, rows, n)
            linear(
                x,
                product.weight,
                out,
                tiling,
                self._workspace,
                self.device,
                bias=product.bias,
                norm=product.norm,
                activation=kind,
                gated=gate,
                stats=self._stats,
            )
            return out
        h = torch.empty_like(x)
        layer = self.spec.norm == "layernorm"
        add_norm(x, pending, h, self.device, eps=product.norm.eps, layer=layer)
        out = F.linear(h, product.weight, product.bias)
        if gate:
            wide, out = out, empty_rows(x, rows, n)
            gated(wide, out, kind, self.device)
        elif activate:
            activate_(out, kind, self.device)
        return out

    def _added(self, x: torch.Tensor, y: torch.Tensor, product: _Product) -> Pending | None:
        """`x += product(y)`, and the sums of its rows; or part of it, and what is left to do."""
        rows, k = y.shape
        n = x.shape[1]
        tiling = self._tiling(rows, n, k, gated=False, norm=False)
        if tiling is None:
            torch.addmm(x, y, product.weight.t(), out=x)
            return Pending(product.bias)
        linear(
            y,
            product.weight,
            x,
            tiling,
            self._workspace,
            self.device,
            bias=product.bias,
            residual=x,
            stats=self._stats,
        )
        return None


def _taken(layers: list[DecoderLayer]) -> Iterator[DecoderLayer]:
    while layers:
        yield layers.pop(0)


def _product(layer: Linear) -> _Product:
    return _Product(layer.weight.contiguous(), layer.bias)


def _paired(layer: Linear) -> Linear:
    """A layer of gates first, then of what they let through, with each gate next to its own."""

    def paired(t: torch.Tensor) -> torch.Tensor:
        gates, others = t.chunk(2)
        return torch.stack([gates, others], 1).flatten(0, 1)

    bias = None if layer.bias is None else paired(layer.bias)
    return Linear(paired(layer.weight), bias, pack=False)


def _fold(norm: Norm, layer: Linear) -> _Product:
    """`layer(norm(x))` with the norm's weight, and its bias, in the layer."""
    weight = layer.weight.contiguous()
    bias = layer.bias
    sums = None
    if norm.kind == "layernorm":
        assert norm.bias is not None
        more = weight.float() @ norm.bias.float()
        bias = (more if bias is None else more + bias.float()).to(weight.dtype)
    weight.mul_(norm.weight)
    if norm.kind == "layernorm":
        sums = weight.float().sum(1)
    return _Product(weight, bias, FoldedNorm(norm.eps, sums))

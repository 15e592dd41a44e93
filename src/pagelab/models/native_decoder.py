"""A decoder for the compiled extension: weights packed its way, and the description it reads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pagelab.models.decoder import Weights
from pagelab.models.layers import inverse_frequencies
from pagelab.models.spec import ModelSpec
from pagelab.native.library import why_no_native
from pagelab.native.packed import KINDS, Blocks, PackedLinear, Threads
from pagelab.native.structures import (
    ACTIVATIONS,
    KV_TYPES,
    CLayer,
    CModel,
    CNorm,
)

QUANTIZATIONS = ("int8", "q4")
"""Ways to keep weights in fewer bits; inputs are then quantized by token and group of 32."""

_PANEL = 32  # what the extension rounds sizes up to


def why_not_native(spec: ModelSpec, dtype: str) -> str | None:
    """Why the extension does not run a model here; None where it does."""
    reason = why_no_native()
    if reason is not None:
        return reason
    if dtype not in ("float32", "bfloat16"):
        return f"it has float32 and bfloat16, not {dtype}"
    if spec.head_dim % 16:
        return f"it needs heads of a multiple of 16, not {spec.head_dim}"
    return None


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Which kind of packed weight a matrix becomes, by where it comes from."""

    matrix: int
    table: int  # the embedding and the head
    keeps: frozenset[int]  # kinds of stored blocks that are taken over as they are


def _kinds(dtype: str, quantization: str | None) -> _Kinds:
    if quantization is None:
        return _Kinds(KINDS[dtype], KINDS[dtype], frozenset())
    if quantization == "int8":
        return _Kinds(KINDS["int8"], KINDS["q8"], frozenset({KINDS["q8"]}))
    return _Kinds(KINDS["q4"], KINDS["q8"], frozenset({KINDS["q4"], KINDS["q8"]}))


class NativeDecoder:
    """Weights in the extension's layout.

    Args:
        spec: what to build.
        weights: in transformers' names and shapes; emptied, each packed as it is taken.
        dtype: `float32` or `bfloat16`: of the weights where they are not quantized.
        quantization: one of `QUANTIZATIONS`, or None. Blocks that a GGUF file holds in a kind that
            the extension has are packed as they are (`q4`: Q4_0, Q4_1, Q8_0; `int8`: Q8_0).
        threads: that pack, and that will run it.
        kv_dtype: what K/V is kept in, `float32`, `bfloat16` or `int8`; None: `dtype`.

    Attributes:
        model: the C structure; valid as long as this object.
        weight_bytes: of packed matrices.
        kind: of the layers' matrices that were packed from floats.
        embedding: the table of tokens.
        head: what the last hidden state is multiplied by: the same where they are tied.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        dtype: str,
        quantization: str | None,
        threads: Threads,
        kv_dtype: str | None = None,
    ) -> None:
        self.spec, self.dtype, self.threads = spec, dtype, threads
        self._weights, self._kinds = weights, _kinds(dtype, quantization)
        self._keep: list[Any] = []  # whatever the C structures point to
        self.weight_bytes = 0
        self.kind = self._kinds.matrix
        gpt2 = spec.architecture == "gpt2"
        base = "transformer.wte" if gpt2 else "model.embed_tokens"
        embedding = self._packed([base], bias=False, kind=self._kinds.table)
        self.embedding: PackedLinear = self._keep[-1]
        head = embedding
        if not spec.tied_embeddings:
            head = self._packed(["lm_head"], bias=False, kind=self._kinds.table)
        self.head: PackedLinear = self._keep[-1]
        build = self._gpt2_layer if gpt2 else self._llama_layer
        self._layers = (CLayer * spec.num_layers)(*(build(i) for i in range(spec.num_layers)))
        model = CModel(
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            layers=spec.num_layers,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab=spec.vocab_size,
            gated=spec.gated_mlp,
            activation=ACTIVATIONS[spec.activation],
            layernorm=spec.norm == "layernorm",
            kv_type=KV_TYPES[kv_dtype or dtype],
            eps=spec.norm_eps,
            scale=spec.head_dim**-0.5,
            embedding=embedding,
            head=head,
            final_norm=self._norm("transformer.ln_f" if gpt2 else "model.norm"),
            layer=self._layers,
        )
        if spec.positions == "rope":
            model.frequencies = self._pointer(inverse_frequencies(spec))
        else:
            model.position_embedding = self._pointer(weights.pop("transformer.wpe.weight"))
        self.model = model

    def _llama_layer(self, index: int) -> CLayer:
        spec, base = self.spec, f"model.layers.{index}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        qkv = [f"{attention}.{part}_proj" for part in "qkv"]
        return CLayer(
            attention_norm=self._norm(f"{base}.input_layernorm"),
            q_norm=self._norm(f"{attention}.q_norm") if spec.qk_norm else CNorm(),
            k_norm=self._norm(f"{attention}.k_norm") if spec.qk_norm else CNorm(),
            mlp_norm=self._norm(f"{base}.post_attention_layernorm"),
            qkv=self._packed(qkv, bias=spec.qkv_bias),
            output=self._packed([f"{attention}.o_proj"], bias=spec.output_bias),
            up=self._packed([f"{mlp}.gate_proj", f"{mlp}.up_proj"], bias=spec.mlp_bias),
            down=self._packed([f"{mlp}.down_proj"], bias=spec.mlp_bias),
        )

    def _gpt2_layer(self, index: int) -> CLayer:
        base = f"transformer.h.{index}"
        return CLayer(
            attention_norm=self._norm(f"{base}.ln_1"),
            mlp_norm=self._norm(f"{base}.ln_2"),
            qkv=self._packed([f"{base}.attn.c_attn"], bias=True, turned=True),
            output=self._packed([f"{base}.attn.c_proj"], bias=True, turned=True),
            up=self._packed([f"{base}.mlp.c_fc"], bias=True, turned=True),
            down=self._packed([f"{base}.mlp.c_proj"], bias=True, turned=True),
        )

    def _packed(
        self,
        names: Sequence[str],
        *,
        bias: bool,
        kind: int | None = None,
        turned: bool = False,
    ) -> int:
        """Matrices with the same input as one packed weight; returns its address.

        `turned`: the weights are stored `[in, out]` (GPT-2).
        """
        weights = self._weights
        matrices = [f"{name}.weight" for name in names]
        blocks = None if turned else stored_blocks(weights, matrices)
        kind = self._kinds.matrix if kind is None else kind
        source: torch.Tensor | Blocks
        if blocks is not None:
            kind = blocks.kind if blocks.kind in self._kinds.keeps else kind
            source = blocks
        else:
            parts = [weights.pop(name).float() for name in matrices]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            source = whole.t() if turned else whole
        own_bias = torch.cat([weights.pop(f"{name}.bias") for name in names]) if bias else None
        packed = PackedLinear(self.threads, kind, source, own_bias)
        self._keep.append(packed)
        self.weight_bytes += packed.nbytes
        return packed.pointer

    def _norm(self, name: str) -> CNorm:
        weight = self._pointer(self._weights.pop(f"{name}.weight"))
        if self.spec.norm == "rmsnorm":
            return CNorm(weight=weight)
        return CNorm(weight=weight, bias=self._pointer(self._weights.pop(f"{name}.bias")))

    def _pointer(self, tensor: torch.Tensor) -> int:
        """The address of a float32 copy, zeros behind it up to a multiple of 32."""
        padding = -tensor.numel() % _PANEL
        copy = torch.cat([tensor.detach().float().flatten(), torch.zeros(padding)])
        self._keep.append(copy)
        return copy.data_ptr()


def stored_blocks(weights: Weights, names: Sequence[str]) -> Blocks | None:
    """Matrices as their file's own blocks, one below the other, taken out of `weights`.

    The extension unpacks them faster than they could be read as floats. None where there are none,
    or they are not all of one type.
    """
    read = getattr(weights, "blocks", None)
    if read is None:
        return None
    found: list[Blocks] = []
    for name in names:
        blocks = read(name)
        if blocks is None or (found and (blocks.type, blocks.k) != (found[0].type, found[0].k)):
            return None
        found.append(blocks)
    for name in names:
        del weights[name]
    return Blocks(found[0].type, np.concatenate([blocks.data for blocks in found]), found[0].k)


def address(structure: ctypes.Structure) -> int:
    """Where a C structure lies."""
    return ctypes.addressof(structure)

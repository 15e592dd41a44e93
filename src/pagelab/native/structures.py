"""The C structures of `csrc/model.h`, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

F32, BF16, INT8, Q8, Q4 = range(5)
"""Kinds of packed weights (`Kind`)."""

KV_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
"""What K/V may be kept in (`KvType`)."""

PARTS = ("embed", "norm", "linear", "place", "attention", "activation", "head")
"""Parts of a step whose time is told (`Part`)."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


class CLinear(ctypes.Structure):
    """A packed weight. Made and freed by the library."""

    _fields_ = (
        ("kind", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("np", c_int32),
        ("kp", c_int32),
        ("unused", c_int32),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("panel_bytes", c_int64),
    )


class CNorm(ctypes.Structure):
    """A norm's weight and bias, padded with zeros to a multiple of 32."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class CLayer(ctypes.Structure):
    """One layer."""

    _fields_ = (
        ("attention_norm", CNorm),
        ("q_norm", CNorm),
        ("k_norm", CNorm),
        ("mlp_norm", CNorm),
        ("qkv", c_void_p),
        ("output", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
    )


class CModel(ctypes.Structure):
    """A decoder."""

    _fields_ = (
        ("hidden", c_int32),
        ("inner", c_int32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("vocab", c_int32),
        ("gated", c_int32),
        ("activation", c_int32),
        ("layernorm", c_int32),
        ("kv_type", c_int32),
        ("unused", c_int32),
        ("eps", c_float),
        ("scale", c_float),
        ("frequencies", c_void_p),
        ("position_embedding", c_void_p),
        ("embedding", c_void_p),
        ("head", c_void_p),
        ("final_norm", CNorm),
        ("layer", POINTER(CLayer)),
    )


class CStep(ctypes.Structure):
    """One step's inputs and where its results go."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
        ("num_sampled", c_int32),
        ("num_blocks", c_int32),
        ("block_size", c_int32),
        ("num_kept", c_int32),
        ("token_ids", c_void_p),
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("table", c_void_p),
        ("block_ids", c_void_p),
        ("sampled", c_void_p),
        ("kv", c_void_p),
        ("logits", c_void_p),
        ("tokens", c_void_p),
        ("finite", c_void_p),
        ("kept", c_void_p),
        ("hidden", c_void_p),
        ("seconds", c_void_p),
    )

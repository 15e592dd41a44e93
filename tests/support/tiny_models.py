"""Tiny random models of every supported architecture, saved by transformers itself.

All parameters are random, biases and norms too, and large enough that logits are well apart. Each
model is made once in a test session, in a folder that goes away with the process::

    tiny_model("qwen2")                  → folder: config.json, model.safetensors, tokenizer.json
    tiny_model("qwen2", sharded=True)    → the same, in several files
    tiny_gguf("qwen2", "Q8_0")           → the same weights as llama.cpp's converter would write
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers

from pagelab.models.fetch import ModelSource, resolve

VOCAB = 264  # 256 bytes, two special tokens, and rows that no token uses
BOS, EOS = 256, 257
MAX_POSITION = 512

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)

_SHARED = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA_LIKE = _SHARED | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {  # name: transformers' configuration and its fields
    "llama": ("LlamaConfig", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "llama3": ("LlamaConfig", _LLAMA_LIKE | {"rope_parameters": _LLAMA3_ROPE}),
    "llama-bias": ("LlamaConfig", _LLAMA_LIKE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 32, "num_hidden_layers": 3}),
    "gpt2": (
        "GPT2Config",
        _SHARED | {"n_positions": MAX_POSITION, "n_embd": 64, "n_layer": 2, "n_head": 4},
    ),
}
"""Every tiny model by name."""

GGUF_ARCHITECTURES = {"llama": "llama", "llama-bias": "llama", "mistral": "llama"} | {
    name: name for name in ("qwen2", "qwen3", "gpt2")
}
"""Tiny models that llama.cpp's converter can write, and its name for their architecture."""


@functools.cache
def _home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pagelab-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tiny_model(name: str, *, sharded: bool = False, tokenizer: bool = True) -> Path:
    """The folder of a tiny model; tests must not write into it."""
    return _saved(name, sharded, tokenizer)


@functools.cache
def _saved(name: str, sharded: bool, tokenizer: bool) -> Path:
    folder = _home() / f"{name}-{sharded}-{tokenizer}"
    folder.mkdir()
    _random_model(name).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    if tokenizer:
        save_byte_tokenizer(folder)
    return folder


def tiny_source(name: str, *, sharded: bool = False) -> ModelSource:
    """A tiny model's folder as `resolve` finds it."""
    return resolve(tiny_model(name, sharded=sharded))


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, and `<s>`, `</s>`; ids below 256 are the bytes themselves."""
    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")]
    backend.add_special_tokens(special)
    return backend


def save_byte_tokenizer(folder: Path) -> None:
    """Write the byte tokenizer's files, with a chat template, as transformers would."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_gguf(name: str, quantization: str = "F32") -> Path:
    """A tiny model as a GGUF, its matrices in one type (`F32`, `F16`, `Q8_0`, `Q4_0`, …)."""
    path = _home() / f"{name}-{quantization}.gguf"
    if not path.exists():
        write_gguf(path, name, quantization)
    return path


def write_gguf(
    path: Path,
    name: str,
    quantization: str = "F32",
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, npt.NDArray[Any] | None] | None = None,
) -> None:
    """Write a tiny model as llama.cpp's converter does, q and k permuted for `llama`.

    Args:
        path: where.
        name: which tiny model.
        quantization: type of the matrices; vectors stay F32.
        metadata: more keys, or other values: numbers, texts, truths, lists.
        tensors: more tensors, or other ones (in GGUF's names); None leaves one out.
    """
    model = _random_model(name)
    architecture = GGUF_ARCHITECTURES[name]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(model.config, architecture) | (metadata or {})).items():
        _add(writer, key, value)
    arrays: dict[str, npt.NDArray[Any] | None] = dict(gguf_arrays(name))
    for tensor, values in (arrays | (tensors or {})).items():
        if values is None:
            continue
        kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
        writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_arrays(name: str) -> dict[str, npt.NDArray[Any]]:
    """A tiny model's weights in llama.cpp's names and layout."""
    model = _random_model(name)
    architecture = GGUF_ARCHITECTURES[name]
    kind = next(k for k, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    arrays = {}
    for their_name, tensor in model.state_dict().items():
        if their_name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "gpt2" and their_name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        ):
            values = values.T
        if architecture == "llama" and ".q_proj." in their_name:
            values = _permute(values, model.config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in their_name:
            values = _permute(values, model.config.num_key_value_heads)
        ours = names.get_name(their_name, try_suffixes=(".weight", ".bias"))
        assert ours is not None, their_name
        arrays[ours] = np.ascontiguousarray(values)
    return arrays


def _permute(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp's converter: the two halves of a head's rows become pairs."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "attention.head_count": heads,
    }
    if architecture == "gpt2":
        own["feed_forward_length"] = 4 * hidden
        own["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        own["feed_forward_length"] = config.intermediate_size
        own["attention.head_count_kv"] = config.num_key_value_heads
        own["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        own["attention.key_length"] = own["attention.value_length"] = head_dim
        own["rope.dimension_count"] = head_dim
        own["rope.freq_base"] = config.rope_parameters["rope_theta"]
    return {f"{architecture}.{key}": value for key, value in own.items()} | _vocabulary()


def _vocabulary() -> dict[str, Any]:
    """The byte tokenizer in GGUF's words, with one merge so that the list is not empty."""
    letters = _byte_letters()
    tokens = [*letters, "<s>", "</s>", "he", *(f"[PAD{i}]" for i in range(259, VOCAB))]
    types = [1] * 256 + [3, 3, 1] + [5] * (VOCAB - 259)  # normal, control, unused
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@functools.cache
def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@functools.cache
def _random_model(name: str) -> Any:
    class_name, fields = TINY[name]
    config = getattr(transformers, class_name)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.25)
            for key, parameter in model.named_parameters():
                if "norm" in key or ".ln_" in key:
                    parameter += 0.0 if key.endswith("bias") else 1.0
    return model

"""A tokenizer from a GGUF file's metadata, `tokenizer.ggml.*`.

Byte-level BPE is built here. How a text is cut before merging is not in the file, only its name
(`tokenizer.ggml.pre`): the rules below are those of the models' own tokenizer.json. Other names
are refused, because a wrong rule gives other tokens without any error. SentencePiece
vocabularies go through transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pagelab.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from pagelab.models import tokenizer as ours
from pagelab.models.folder_tokenizer import from_transformers
from pagelab.models.gguf_file import GGUFFile
from pagelab.models.gguf_model import eos_token_ids

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched whole in a text

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class _Rule(NamedTuple):
    """How a family cuts texts, and what else its tokenizer.json says."""

    pre: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False  # a piece that is in the vocabulary is taken whole
    add_bos: bool = False  # where the file does not say


def _gpt2_pre() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm_pre() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_pre()])


def _split_by(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, bytes_only])

    return build


_GPT2_RULE = _Rule(_gpt2_pre)
_LLAMA3_RULE = _Rule(_split_by(_LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2_RULE = _Rule(_split_by(_QWEN2), normalizers.NFC)
_RULES = {
    "gpt-2": _GPT2_RULE,
    "smollm": _Rule(_smollm_pre),
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE._replace(normalizer=None, add_bos=True),
}
# files from before the field, or with "default": these families have one rule each
_BY_ARCHITECTURE = {"gpt2": _GPT2_RULE, "qwen2": _QWEN2_RULE, "qwen3": _QWEN2_RULE}


def build_tokenizer(file: GGUFFile) -> ours.Tokenizer:
    """The tokenizer that a file's metadata describes.

    Raises:
        ModelNotFoundError: the file has none.
        CorruptModelError: its parts do not fit together.
        UnsupportedModelError: a kind of tokenizer, or a rule for cutting texts, that we lack.
    """
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        raise ModelNotFoundError(f"{file.path} has no tokenizer: give token ids instead of texts")
    if kind == "gpt2":
        backend = _byte_level_bpe(file)
    elif kind == "llama":
        backend = from_transformers(file.path.parent, gguf_file=file.path.name)
    else:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}: PageLab has gpt2 (byte-level BPE) "
            "and llama (SentencePiece); give token ids"
        )
    template = metadata.get("tokenizer.chat_template")
    return ours.Tokenizer(
        backend,
        eos_token_ids=eos_token_ids(metadata),
        special_tokens=_special_tokens(file),
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_bpe(file: GGUFFile) -> Tokenizer:
    rule = _rule(file)
    tokens = _strings(file, "tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    # a token may begin with a space itself
    merges = [_pair(merge) for merge in _strings(file, "merges")]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CorruptModelError(
            f"{file.path}: vocabulary and merges do not fit: {error}"
        ) from error
    backend = Tokenizer(model)
    if rule.normalizer is not None:
        backend.normalizer = rule.normalizer()
    backend.pre_tokenizer = rule.pre()
    backend.decoder = decoders.ByteLevel()
    _mark_tokens(backend, tokens, _token_types(file))
    _frame(backend, file, rule)
    return backend


def _rule(file: GGUFFile) -> _Rule:
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if name == "default":
        rule = _BY_ARCHITECTURE.get(file.metadata.get("general.architecture", ""))
    else:
        rule = _RULES.get(name)
    if rule is None:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}: PageLab has {', '.join(_RULES)}; give "
            "token ids"
        )
    return rule


def _strings(file: GGUFFile, name: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CorruptModelError(f"{file.path}: tokenizer.ggml.{name} is no list of texts")
    return value


def _token_types(file: GGUFFile) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(types, list):
        raise CorruptModelError(f"{file.path}: tokenizer.ggml.token_type is no list")
    return types


def _pair(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _mark_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tell the tokenizer which tokens are matched whole: control tokens, and added words."""
    control = [t for t, kind in zip(tokens, types, strict=False) if kind == _CONTROL and t]
    words = [t for t, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED and t]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in words])


def _frame(backend: Tokenizer, file: GGUFFile, rule: _Rule) -> None:
    """Tokens that go before and after every text, where the file wants them."""
    special = _special_tokens(file)
    wanted = {
        "bos_token": file.metadata.get("tokenizer.ggml.add_bos_token", rule.add_bos),
        "eos_token": file.metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    bos, eos = (special.get(name) if wanted[name] else None for name in ("bos_token", "eos_token"))
    if bos is None and eos is None:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    parts = [part for part in (bos, "$A", eos) if part is not None]
    second = [part if part == "$A" else f"{part}:1" for part in parts]
    frame = {token for token in (bos, eos) if token is not None}
    ids = [(token, backend.token_to_id(token)) for token in sorted(frame)]
    backend.post_processor = processors.TemplateProcessing(
        single=parts, pair=[*parts, *(p.replace("$A", "$B:1") for p in second)], special_tokens=ids
    )


def _special_tokens(file: GGUFFile) -> dict[str, str]:
    """Texts of the special tokens, by transformers' names."""
    keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    found = {}
    for key, name in keys.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CorruptModelError(f"{file.path}: tokenizer.ggml.{key}_token_id is {index!r}")
        found[name] = tokens[index]
    return found

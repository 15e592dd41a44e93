"""The tokenizer of a model folder: `tokenizer.json`, with transformers as the way out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pagelab.errors import (
    CorruptModelError,
    ModelNotFoundError,
    PageLabError,
    UnsupportedModelError,
)
from pagelab.models.hf_config import eos_token_ids, read_json
from pagelab.models.tokenizer import Tokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# any of these means that there is a tokenizer, which transformers may be able to read
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        ModelNotFoundError: there is none; CorruptModelError: it is broken.
        UnsupportedModelError: of a kind that transformers cannot read either.
    """
    config = _optional(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    if path.is_file():
        backend = _from_json(path)
        _add_tokens(backend, config)
    elif any((folder / name).is_file() for name in _OTHER_FILES):
        backend = from_transformers(folder)
    else:
        raise ModelNotFoundError(f"{folder} has no tokenizer: give token ids instead of texts")
    special = _special_tokens(config) or _special_tokens(
        _optional(folder / "special_tokens_map.json")
    )
    ends = list(eos_token_ids(_optional(folder / "config.json"), folder))
    end = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if end is not None and end not in ends:
        ends.append(end)
    return Tokenizer(
        backend,
        eos_token_ids=ends,
        special_tokens=special,
        chat_template=_chat_template(folder, config),
    )


def from_transformers(folder: Path, **options: Any) -> tokenizers.Tokenizer:
    """What transformers makes of the files, as a `tokenizers` object. Imports transformers.

    Raises:
        UnsupportedModelError: transformers cannot, or its tokenizer is not of that kind.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except PageLabError:
        raise
    except Exception as error:  # transformers raises nearly anything on files it cannot read
        first_line = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{folder}: transformers cannot read its tokenizer ({first_line}): give token ids"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UnsupportedModelError(
            f"{folder}: a tokenizer of class {type(tokenizer).__name__}, which has no fast form: "
            "give token ids"
        )
    return backend


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CorruptModelError(f"{path} is no tokenizer file: {error}") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value  # an AddedToken's JSON
        if isinstance(text, str):
            found[name] = text
    return found


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config.json adds and tokenizer.json lacks, as transformers does."""
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        return
    for index, token in sorted(added.items(), key=lambda item: int(item[0])):
        text = token["content"]
        if backend.token_to_id(text) is None and int(index) == backend.get_vocab_size():
            options = {k: v for k, v in token.items() if k not in ("content", "__type")}
            backend.add_tokens([tokenizers.AddedToken(text, **options)])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default template: a file of its own wins over tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptModelError(f"{path} cannot be read: {error}") from error
    old = _optional(folder / "chat_template.json").get("chat_template")
    template = old if old is not None else config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None

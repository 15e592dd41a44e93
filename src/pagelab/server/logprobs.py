"""Log probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagelab.models.tokenizer import Tokenizer
from pagelab.types import TokenLogprobs

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have (a token that a filter or a mask forbade)."""


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """`logprobs` of a chat choice or its delta."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data)}

    return {
        "content": [
            entry(token_id, found.chosen)
            | {"top_logprobs": [entry(other, value) for other, value in found.top[:top]]}
            for token_id, found in zip(token_ids, logprobs, strict=True)
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """`logprobs` of a completion's choice, piece by piece: offsets count through its text.

    Args:
        tokenizer: gives the tokens' texts.
        echo: the prompt's text, where the choice's text begins with it.
        top: how many alternatives were asked for.
    """

    def __init__(self, tokenizer: Tokenizer, echo: str, top: int) -> None:
        self._tokenizer = tokenizer
        self._echo = echo
        self._offset = len(echo)
        self._top = top

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """An echoed prompt's; before its first token nothing was to be foreseen: null."""
        self._offset = 0
        pieces = self.take(token_ids, logprobs)
        self._offset = len(self._echo)  # special tokens are no part of the text
        return pieces

    def take(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """The next tokens'."""
        pieces: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, found in zip(token_ids, logprobs, strict=True):
            text = self._text(token_id)
            pieces["tokens"].append(text)
            pieces["token_logprobs"].append(None if found is None else max(found.chosen, LEAST))
            pieces["top_logprobs"].append(None if found is None else self._alternatives(found))
            pieces["text_offset"].append(self._offset)
            self._offset += len(text)
        return pieces

    def _alternatives(self, found: TokenLogprobs) -> dict[str, float]:
        return {self._text(other): max(value, LEAST) for other, value in found.top[: self._top]}

    def _text(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:  # part of a character, written as OpenAI's API does
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

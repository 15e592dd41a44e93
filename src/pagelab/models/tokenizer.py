"""Text to token ids and back, on the `tokenizers` library alone.

transformers is not imported: that takes 2.5 s here, and a tokenizer file is read in 0.2 s.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import tokenizers

from pagelab.errors import RequestError
from pagelab.models.chat_template import ChatTemplate, Message

_MANY = 4_096
"""Characters or ids from which the library is asked for a batch of one: only then it gives the
interpreter's lock back, and a thread that tokenizes stops nobody (0.6 s for 560,000 characters)."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: the tokenizer itself, special tokens and post-processor included.
        eos_token_ids: tokens that end a text or a turn.
        special_tokens: texts by name (`bos_token`, `eos_token`, …), for the chat template.
        chat_template: source of the chat template, if the model has one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()  # what is too long is refused by the engine, not cut here
        # `<|im_start|>` in a text is that token, as in transformers and llama.cpp
        backend.encode_special_tokens = False
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_source = chat_template
        self._chat: ChatTemplate | None = None
        self.eos_token_ids = tuple(eos_token_ids)

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, added ones included; a model's own may be padded to more."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        text = self._special_tokens.get("bos_token")
        return None if text is None else self._backend.token_to_id(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._chat_source is not None

    def to_json(self) -> str:
        """All of it, special tokens included, as the text of a `tokenizer.json`."""
        return str(self._backend.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with those that the model wants around every text.

        Raises:
            RequestError: the text is not valid Unicode (a lone surrogate).
        """
        try:
            if len(text) < _MANY:
                found = self._backend.encode(text, add_special_tokens=add_special_tokens)
            else:
                (found,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
            return list(found.ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"a prompt must be a text of valid Unicode: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary are nothing."""
        if len(ids) < _MANY:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; none for ids beyond the vocabulary.

        A token may end inside a character, so this is exact where `decode` gives U+FFFD.
        """
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)) is not None:
            return bytes([int(byte[1], 16)])
        if "\u2581" in piece:  # SentencePiece's space, which `decode` drops at the beginning
            return str(piece).replace("\u2581", " ").encode()
        text = self.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text.encode()
        letters = _letter_bytes()
        if all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return text.encode()

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the model to answer.

        Raises:
            RequestError: the model has no chat template, or it refuses these messages.
            CorruptModelError: the template is broken.
        """
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)  # the template wrote them itself

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text that `apply_chat_template` encodes; raises the same errors.

        `tools` are descriptions of functions, for templates that know them.
        """
        if self._chat_source is None:
            raise RequestError("the model has no chat template: give a prompt instead")
        if self._chat is None:
            self._chat = ChatTemplate(self._chat_source, self._special_tokens)
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Decodes one sequence's tokens as they come."""
        return DecodeStream(self, skip_special_tokens)


@cache
def _letter_bytes() -> dict[str, int]:
    """Byte-level BPE's letter of each byte: printable ones are themselves, the rest from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


class DecodeStream:
    """Text of one sequence, token by token; the parts add up to `Tokenizer.decode` of all.

    ::

        ids    … │ before │ pending │
        text   … │  known │  new …  │   new is given out once it does not end inside a character

    `before` is decoded again with what is pending, because a token's text can depend on its
    neighbour (a leading space is dropped at the beginning of a text). The method is that of
    `tokenizers.decoders.DecodeStream`, which cannot give out an unfinished end, and raises where
    a SentencePiece decoder takes back a character: there a byte that is no UTF-8 turns the bytes
    before it into U+FFFD too, after they were given out as letters. Here they stay letters.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._before: list[int] = []
        self._known = ""
        self._pending: list[int] = []

    def step(self, token_id: int) -> str | None:
        """The text that this token completes; None while characters are incomplete."""
        self._pending.append(token_id)
        text = self._decode()
        if len(text) <= len(self._known) or text.endswith("\ufffd"):
            return None
        return self._give(text)

    def finish(self) -> str:
        """What is left at the end of a sequence, incomplete characters as U+FFFD."""
        return self._give(self._decode()) if self._pending else ""

    def _decode(self) -> str:
        return self._tokenizer.decode([*self._before, *self._pending], self._skip)

    def _give(self, text: str) -> str:
        new = text[len(self._known) :]
        self._before, self._pending = self._pending, []
        self._known = self._tokenizer.decode(self._before, self._skip)
        return new

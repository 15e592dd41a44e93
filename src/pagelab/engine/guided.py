"""Guided decoding: a schema, expression or grammar becomes a `Constraint` over tokens.

llguidance (MIT) parses grammars and works out which tokens may come next: 16 µs a token in a JSON
schema of 20 fields, 0.13 ms at worst (`benchmarks/sampling_cost.py`). It is optional: `pip install
'pagelab[guided]'`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pagelab.errors import ConfigError, RequestError
from pagelab.types import GuidedDecoding

if TYPE_CHECKING:
    import llguidance

    from pagelab.models.tokenizer import Tokenizer

KEPT_GRAMMARS = 64
"""Compiled grammars that a compiler keeps; those used longest ago are dropped."""

_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"  # a small model may go on with spaces for ever


class GrammarConstraint:
    """A `scheduling.constraint.Constraint` that follows a grammar.

    Args:
        matcher: at the place where the output is.
        ends: the end-of-sequence tokens, as a bit mask like `allowed`.

    Raises:
        RequestError: no text at all fits the grammar, or it is too large to follow.
    """

    def __init__(self, matcher: llguidance.LLMatcher, ends: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self.allowed = b""
        self.complete = self.ended = False
        self._look()

    def advance(self, token_id: int) -> None:
        """Take a token in; see `Constraint.advance`."""
        if not self._matcher.consume_token(token_id):
            raise self._failure()
        self._look()

    def copy(self) -> GrammarConstraint:
        """Another one in the same state."""
        other = object.__new__(GrammarConstraint)
        other._matcher, other._ends = self._matcher.deep_copy(), self._ends
        other.allowed, other.complete, other.ended = self.allowed, self.complete, self.ended
        return other

    def _look(self) -> None:
        """Work out what may come next."""
        matcher = self._matcher
        self.allowed = matcher.compute_bitmask()  # first: it notices where nothing can follow
        self.complete = matcher.is_accepting()
        goes_on = bool(int.from_bytes(self.allowed, "little") & ~self._ends)
        self.ended = self.complete and not goes_on
        if matcher.is_error() or not (self.complete or goes_on):
            raise self._failure()

    def _failure(self) -> RequestError:
        reason = self._matcher.get_error().strip().partition("\n")[0]
        if not reason or reason.startswith("NoExtension"):
            reason = "no text fits the grammar from here on"
        return RequestError(f"guided decoding failed: {reason}")


class GrammarCompiler:
    """Makes constraints for one tokenizer. May be used by several threads.

    Args:
        tokenizer: the model's.
        vocab_size: logits of the model, which may be more than the tokenizer's tokens.
        eos_token_ids: what ends a sequence in the engine; none: the tokenizer's own.

    Raises:
        ConfigError: llguidance is not installed.
        RequestError: there is no end-of-sequence token, so nothing could end a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int] = ()
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError(
                "guided decoding needs llguidance: pip install 'pagelab[guided]'"
            ) from error
        ends = [*(eos_token_ids or tokenizer.eos_token_ids)]
        if not ends:
            raise RequestError("guided decoding needs a model with an end-of-sequence token")
        self._library = llguidance
        self._ends = sum(1 << token for token in set(ends))
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.to_json(),
                n_vocab=max(vocab_size, tokenizer.vocab_size),
                eos_token=ends,
            )
        except Exception as error:  # of tokenizers that it does not know
            raise RequestError(
                f"guided decoding does not know this model's tokenizer: {error}"
            ) from error
        self._known: OrderedDict[GuidedDecoding, GrammarConstraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, guided: GuidedDecoding) -> GrammarConstraint:
        """A constraint in its first state.

        Raises:
            RequestError: what is wrong with the schema, expression or grammar.
        """
        with self._lock:
            known = self._known.get(guided)
            if known is not None:
                self._known.move_to_end(guided)
                return known.copy()
        made = self._compile(guided)
        with self._lock:
            self._known[guided] = made
            if len(self._known) > KEPT_GRAMMARS:
                self._known.popitem(last=False)
            return made.copy()

    def _compile(self, guided: GuidedDecoding) -> GrammarConstraint:
        name = _kind(guided)
        try:
            grammar = self._grammar(guided, name)
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
            if matcher.is_error():
                raise RequestError(matcher.get_error().strip())
            return GrammarConstraint(matcher, self._ends)
        except ValueError as error:  # a RequestError is one, too
            raise RequestError(f"{name} cannot be used: {error}") from error

    def _grammar(self, guided: GuidedDecoding, name: str) -> str:
        """llguidance's own form of it; raises ValueError where it cannot be read."""
        if name in ("json_object", "json_schema"):
            schema = '{"type": "object"}' if guided.json_object else guided.json_schema
            assert isinstance(schema, str)
            return self._library.LLMatcher.grammar_from_json_schema(
                schema, {"whitespace_pattern": _WHITESPACE}
            )
        if guided.choice is not None:
            return self._library.grammar_from("choice", json.dumps(guided.choice))
        if guided.regex is not None:
            return self._library.grammar_from("regex", guided.regex)
        assert guided.grammar is not None
        return self._library.grammar_from("grammar", guided.grammar)


def _kind(guided: GuidedDecoding) -> str:
    """Which of the five it is."""
    if guided.json_object:
        return "json_object"
    names = ("json_schema", "regex", "choice", "grammar")
    return next(name for name in names if getattr(guided, name) is not None)

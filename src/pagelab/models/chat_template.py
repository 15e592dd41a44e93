"""Chat templates, rendered as transformers renders them.

A template is a program that came with a model: it runs in jinja2's sandbox, where it can read its
arguments and nothing else. Source of the names it may use: transformers' documentation, "Writing
a chat template".
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagelab.errors import CorruptModelError, RequestError

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`; an assistant's may have `tool_calls` and no content."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: the template's text.
        special_tokens: names such as `bos_token` and their texts, which templates refer to.

    Raises:
        CorruptModelError: it is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        self.knows_tools = "tools" in meta.find_undeclared_variables(_parsed(environment, source))
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CorruptModelError(f"the model's chat template is broken: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation. `tools` describe functions, as in OpenAI's API.

        Raises:
            RequestError: a message is malformed, or the template refuses the conversation.
        """
        if not messages:
            raise RequestError("there are no messages: give at least one")
        if tools and not self.knows_tools:
            raise RequestError("this model's chat template knows no tools: leave them out")
        for message in messages:
            calls = isinstance(message, Mapping) and message.get("tool_calls")
            for key in ("role",) if calls else ("role", "content"):
                if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                    raise RequestError(f"a message needs a text as its {key!r}: {message!r}")
        try:
            return self._template.render(
                self._special_tokens,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error


def _parsed(environment: ImmutableSandboxedEnvironment, source: str) -> nodes.Template:
    try:
        return environment.parse(source)
    except TemplateSyntaxError as error:
        raise CorruptModelError(f"the model's chat template is broken: {error}") from error


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for training: here, its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

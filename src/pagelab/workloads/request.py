"""A request of a workload, and the workload: what every method of the experiment is asked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pagelab.workloads.shapes import ShapeCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request.

    Attributes:
        id: unique in its workload.
        prompt_text: the prompt's text; None where only token ids are known.
        prompt_token_ids: the prompt; None before `tokenize` or `random_ids`.
        prompt_tokens: its length in tokens; before that, the length to reach, or None for the
            whole text.
        max_tokens: tokens to generate, end-of-sequence ignored.
        arrival_s: seconds after the workload's start.
        asked_tokens: what the client asks for at most, which an allocator that reserves must
            reserve; at least `max_tokens`, which is what comes. None: the same.
        hash_ids: one for each 512 prompt tokens: equal ids, equal tokens.
    """

    id: str
    prompt_text: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    max_tokens: int = 16
    arrival_s: float = 0.0
    asked_tokens: int | None = None
    hash_ids: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt's token ids, once they are known."""
        assert self.prompt_token_ids is not None, f"{self.id} is not tokenized"
        return self.prompt_token_ids

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens, once the prompt is known."""
        return len(self.token_ids) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, under a name, with a sentence for people.

    `counts` says what a trace or a generator left out; None where nothing could be.
    """

    name: str
    title: str
    requests: tuple[WorkloadRequest, ...]
    counts: ShapeCounts | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, once they are known."""
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens to generate."""
        return sum(request.max_tokens for request in self.requests)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """From what `to_json` gave."""
        requests = []
        for item in data["requests"]:
            ids = item["prompt_token_ids"]
            fields = {
                **item,
                "prompt_token_ids": None if ids is None else tuple(ids),
                "hash_ids": tuple(item.get("hash_ids", ())),
            }
            requests.append(WorkloadRequest(**fields))
        counts = data.get("counts")
        return cls(
            data["name"],
            data["title"],
            tuple(requests),
            None if counts is None else ShapeCounts(**counts),
        )

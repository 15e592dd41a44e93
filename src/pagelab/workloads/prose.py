"""Seeded English, for prompts that any tokenizer can read."""

from __future__ import annotations

import random
from collections.abc import Sequence

_OPENINGS = (
    "Tell me about the {noun} and the {noun}.",
    "Write a short story about a {adjective} {noun} near the {place}.",
    "Explain why the {noun} was so {adjective}.",
    "Summarize what happened at the {place} this {time}.",
    "What should we do with the {adjective} {noun}?",
    "Describe the {place} as a {person} would see it.",
)
_SENTENCES = (
    "The {person} walked to the {place} and looked at the {adjective} {noun}.",
    "Every {time}, a {adjective} {noun} appeared beside the {place}.",
    "Nobody at the {place} remembered how the {noun} came to be there.",
    "A {person} and a {person} talked about the {noun} until the {time} was over.",
    "It was a {adjective} {time}, and the {noun} was more {adjective} than before.",
    "When the {person} opened the {noun}, there was only a {adjective} {noun} inside.",
    "The {place} had a {noun}, a {noun} and one very {adjective} {noun}.",
    "In the {time}, the {person} {verb} the {noun} and carried it to the {place}.",
    "Some people say that the {noun} {verb} the {noun}, but the {person} never believed it.",
    "We {verb} the {adjective} {noun} because the {person} had asked us to.",
)
_WORDS = {
    "noun": (
        "lamp river clock letter garden machine window map boat song bridge engine mirror stone "
        "book kettle forest train piano telescope ladder recipe storm painting wheel bell coin "
        "basket library computer"
    ).split(),
    "adjective": (
        "quiet bright old strange careful heavy blue small curious broken golden distant warm "
        "narrow famous simple hidden gentle cold busy"
    ).split(),
    "place": (
        "harbour station market mountain village theatre school island workshop kitchen museum "
        "valley lighthouse farm hospital"
    ).split(),
    "person": (
        "teacher sailor doctor child farmer engineer painter neighbour student gardener writer "
        "musician baker scientist traveller"
    ).split(),
    "time": "morning evening winter summer afternoon night autumn spring".split(),
    "verb": "found repaired painted followed moved described sold borrowed measured kept".split(),
}


def prose(rng: random.Random, words: int) -> str:
    """English sentences with at least this many words, and so at least as many tokens."""
    sentences = [_fill(rng, _OPENINGS)]
    count = len(sentences[0].split())
    while count < words:
        sentences.append(_fill(rng, _SENTENCES))
        count += len(sentences[-1].split())
    return " ".join(sentences)


def _fill(rng: random.Random, templates: Sequence[str]) -> str:
    parts = _pick(rng, templates).split("{")
    text = parts[0]
    for part in parts[1:]:
        kind, _, rest = part.partition("}")
        text += _pick(rng, _WORDS[kind]) + rest
    return text


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[int(rng.random() * len(items))]

"""Text as it is generated: stop strings, what is held back, deltas that add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.engine.text import TextStream


class Letters:
    """A tokenizer of one letter a token; `?` stands for half a character."""

    def step(self, token_id: int) -> str | None:
        self.half = chr(token_id) == "?"
        return None if self.half else chr(token_id)

    def finish(self) -> str:
        return "�" if self.half else ""


def feed(text: str, stop: list[str], min_tokens: int = 0) -> tuple[TextStream, list[str]]:
    stream = TextStream(Letters(), stop, min_tokens)
    deltas = []
    for letter in text:
        stream.feed(ord(letter))
        deltas.append(stream.delta(finished=stream.stopped))
        if stream.stopped:
            break
    deltas.append(stream.delta(finished=True))
    return stream, deltas


def test_text_ends_before_the_stop_string() -> None:
    stream, deltas = feed("one two three", ["two"])
    assert stream.stopped
    assert stream.text == "one "
    assert "".join(deltas) == "one "


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    _, deltas = feed("a##b", ["##!"])
    assert deltas == ["a", "", "", "##b", ""]


def test_the_earliest_of_several_stop_strings_wins() -> None:
    stream, _ = feed("xaby", ["by", "ab"])
    assert stream.text == "x"


def test_stop_strings_are_ignored_before_min_tokens() -> None:
    stream, deltas = feed("ENDmoreEND.", ["END"], min_tokens=7)
    assert stream.text == "ENDmore" == "".join(deltas)
    stream, _ = feed("ENDmor", ["END"], min_tokens=7)
    assert stream.text == "ENDmor"


def test_incomplete_characters_come_with_the_token_that_completes_them() -> None:
    assert feed("a?b", [])[1] == ["a", "", "b", ""]


def test_an_incomplete_last_character_becomes_text_at_the_end() -> None:
    stream, _ = feed("a?", [])
    stream.finish()
    assert stream.text == "a�"
    stream, _ = feed("aSTOP?", ["STOP"])
    stream.finish()
    assert stream.text == "a"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_deltas_add_up_to_the_text_before_the_first_match(text: str, stop: list[str]) -> None:
    stream, deltas = feed(text, stop)
    assert "".join(deltas) == stream.text
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends:  # the match that is complete first, by the letters fed
        first = min(ends)
        starts = [text[:first].find(s) for s in stop if s in text[:first]]
        assert stream.text == text[: min(starts)]
    else:
        assert stream.text == text
        assert not stream.stopped


@pytest.mark.parametrize("min_tokens", [0, 3])
def test_long_texts_do_not_search_again_from_the_start(min_tokens: int) -> None:
    stream, _ = feed("ab" * 500 + "STOP", ["STOP"], min_tokens)
    assert stream.text == "ab" * 500

"""Guided decoding over random models: what ends by itself is what was asked for, always."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelab.engine.guided import GrammarCompiler
from pagelab.engine.llm import LLM
from pagelab.errors import ConfigError, RequestError
from pagelab.models.fetch import ModelSource
from pagelab.types import FinishReason, GuidedDecoding, RequestOutput, SamplingParams
from tests.support.engines import greedy
from tests.support.tiny_models import EOS, VOCAB, byte_tokenizer, tiny_gguf, tiny_model

pytest.importorskip("llguidance", reason="guided decoding needs the extra pagelab[guided]")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= "a" ("b" | "c")+ "d"'
LARK = 'start: "a" (B | "c")+ "d"\nB: /b+/'


@pytest.fixture(scope="module")
def llm() -> LLM:
    return engine()


def engine(model: str | None = None, **options: Any) -> LLM:
    options = {"kv_memory": "4MiB", "device": "cpu", "dtype": "float32"} | options
    return LLM(model or str(tiny_model("llama")), check_invariants=True, **options)


def params(guided: GuidedDecoding, **changes: Any) -> SamplingParams:
    return replace(SamplingParams(max_tokens=150, seed=0, guided=guided), **changes)


def check(output: RequestOutput, guided: GuidedDecoding) -> None:
    """What ended by itself must be what was asked for; what was cut off only may."""
    for each in output.outputs:
        assert each.error is None
        if each.finish_reason is FinishReason.LENGTH:
            continue
        assert each.finish_reason is FinishReason.STOP
        if guided.json_schema is not None:
            assert isinstance(guided.json_schema, str)
            jsonschema.validate(json.loads(each.text), json.loads(guided.json_schema))
        elif guided.json_object:
            assert isinstance(json.loads(each.text), dict)
        elif guided.regex is not None:
            assert re.fullmatch(guided.regex, each.text)
        elif guided.choice is not None:
            assert each.text in guided.choice
        else:
            assert re.fullmatch("a[bc]+d", each.text)


KINDS = [
    GuidedDecoding(json_schema=SCHEMA),
    GuidedDecoding(json_object=True),
    GuidedDecoding(regex=r"[0-9]{3}-[a-f]+x"),
    GuidedDecoding(choice=["yes", "yes sir", "no", '"quoted\\"', "naïve\n"]),
    GuidedDecoding(grammar=GBNF),
    GuidedDecoding(grammar=LARK),
]


@pytest.mark.parametrize(
    "guided", KINDS, ids=["schema", "object", "regex", "choice", "gbnf", "lark"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_results_are_what_was_asked_for(
    llm: LLM, guided: GuidedDecoding, temperature: float
) -> None:
    (output,) = llm.generate("x", params(guided, temperature=temperature, n=6))
    check(output, guided)
    reasons = {each.finish_reason for each in output.outputs}
    if guided.json_schema is not None or guided.choice is not None:
        assert reasons == {FinishReason.STOP}  # they cannot go on for ever


@settings(deadline=None, max_examples=40)
@given(
    choice=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 4]),
)
def test_any_choice_is_given_back_to_the_letter(
    llm: LLM, choice: list[str], seed: int, ignore_eos: bool, min_tokens: int
) -> None:
    try:
        guided = GuidedDecoding(choice=choice)
        (output,) = llm.generate(
            "x", params(guided, seed=seed, ignore_eos=ignore_eos, min_tokens=min_tokens)
        )
    except RequestError:  # a lone surrogate, or what the library's own syntax cannot say
        assert any(not text.isprintable() for text in choice)
        return
    check(output, guided)
    assert output.finish_reason is FinishReason.STOP


def test_the_same_tokens_alone_in_a_batch_and_after_preemptions() -> None:
    kinds = [params(guided, max_tokens=40, n=1 + i % 2) for i, guided in enumerate(KINDS)]
    kinds += [greedy(40), SamplingParams(max_tokens=40, seed=1)]
    prompts = [[i, 2, 3] for i in range(len(kinds))]
    roomy = engine()
    want = [roomy.generate([p], k)[0] for p, k in zip(prompts, kinds, strict=True)]
    block = 8 * roomy.spec.kv_layout("float32", 8).bytes_per_token
    tight = engine(kv_memory=14 * block, block_size=8, watermark=0.0, max_model_len=64)
    got = tight.generate(prompts, kinds)
    assert tight.core.scheduler.num_preemptions > 0
    for ours, theirs in zip(got, want, strict=True):
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
        assert [o.text for o in ours.outputs] == [o.text for o in theirs.outputs]


def test_a_gguf_files_tokenizer_works_the_same() -> None:
    guided = GuidedDecoding(json_schema=SCHEMA)
    (folder,) = engine().generate([1, 2], params(guided, temperature=0))
    (gguf,) = engine(str(tiny_gguf("llama"))).generate([1, 2], params(guided, temperature=0))
    assert gguf.text == folder.text
    check(gguf, guided)


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        ({"json_schema": {"type": "foo"}}, "json_schema cannot be used"),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "json_schema cannot be used"),
        ({"json_schema": False}, "json_schema cannot be used"),
        ({"regex": "(abc"}, "regex cannot be used"),
        ({"regex": r"[^\s\S]"}, "regex cannot be used"),
        ({"grammar": 'start: "a" b'}, "grammar cannot be used"),
        ({"grammar": 'root ::= "a" ('}, "grammar cannot be used"),
        ({"grammar": ""}, "grammar cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_a_request_error_and_starts_nothing(
    llm: LLM, guided: dict[str, Any], message: str
) -> None:
    running = llm.core.add_request([1, 2], greedy(3))
    with pytest.raises(RequestError, match=message):
        llm.generate("x", params(GuidedDecoding(**guided)))
    assert [s.request for s in llm.core.scheduler.waiting] == [running]
    llm.generate("x", greedy(4))
    assert running.finished


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"regex": "a", "choice": ["a"]},
        {"json_object": True, "json_schema": {}},
        {"json_object": 1},
        {"json_schema": "{"},
        {"json_schema": "[1]"},
        {"json_schema": 3},
        {"json_schema": {"a": {1, 2}}},
        {"json_schema": {"a": float("nan")}},
        {"choice": []},
        {"choice": "ab"},
        {"choice": [""]},
        {"choice": [1]},
        {"regex": 3},
        {"grammar": b"x"},
    ],
)
def test_fields_that_say_nothing_or_too_much_are_request_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        GuidedDecoding(**fields)


def test_guided_goes_with_no_stop_strings_and_is_one_of_its_own_class() -> None:
    with pytest.raises(RequestError, match="stop and guided"):
        SamplingParams(guided=GuidedDecoding(regex="a"), stop="b")
    with pytest.raises(RequestError, match="GuidedDecoding"):
        SamplingParams(guided={"regex": "a"})  # type: ignore[arg-type]


def test_without_the_library_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'pagelab\[guided\]'"):
        engine().generate("x", params(GuidedDecoding(regex="a")))


def test_a_stop_id_counts_where_the_text_is_complete(llm: LLM) -> None:
    guided = GuidedDecoding(regex="a+b+")
    (output,) = llm.generate("x", params(guided, stop_token_ids=[ord("a"), ord("b")]))
    assert output.text == "ab"
    assert output.token_ids == (*b"abb",)


def test_a_grammar_that_leads_nowhere_fails_its_own_request_only(llm: LLM) -> None:
    (want,) = llm.generate([[1, 2]], greedy(8))
    dead_end = params(GuidedDecoding(grammar='start: "a" D\nD: /[^\\s\\S]/'), n=2)
    bad, good = llm.generate([[3], [1, 2]], [dead_end, greedy(8)])
    for each in bad.outputs:
        assert each.finish_reason is FinishReason.ERROR
        assert each.error == "guided decoding failed: no text fits the grammar from here on"
    assert good.token_ids == want.token_ids
    assert llm.core.kv.pool.num_held == 0


def test_compiled_grammars_are_kept_and_their_copies_are_independent() -> None:
    from pagelab.models.tokenizer import Tokenizer

    compiler = GrammarCompiler(Tokenizer(byte_tokenizer()), VOCAB, (EOS,))
    first, second = (compiler.compile(GuidedDecoding(regex="ab?")) for _ in range(2))
    start = first.allowed
    first.advance(ord("a"))
    assert second.allowed == start != first.allowed
    assert (first.complete, second.complete, first.ended) == (True, False, False)
    branch = first.copy()
    first.advance(ord("b"))
    assert (first.complete, first.ended) == (True, True)
    assert not branch.ended
    with pytest.raises(RequestError, match="guided decoding failed"):
        branch.advance(ord("c"))


def test_sentencepiece_tokenizers_are_followed_by_their_bytes_and_spaces() -> None:
    from pagelab.models.tokenizer import Tokenizer

    vocab = {text: i for i, text in enumerate(["<unk>", "</s>", "▁", "a", "▁a", "ab", "b", "é"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    special = [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "</s>")]
    backend.add_special_tokens(special)
    compiler = GrammarCompiler(Tokenizer(backend), len(vocab), [vocab["</s>"]])

    def follow(constraint: Any, *texts: str) -> set[str]:
        for text in texts:
            constraint.advance(vocab[text])
        mask = int.from_bytes(constraint.allowed, "little")
        return {text for text, token in vocab.items() if mask >> token & 1}

    constraint = compiler.compile(GuidedDecoding(choice=["ab é", "ab ê", "b"]))
    assert {"a", "ab", "b", "<0x61>"} <= follow(constraint)
    assert not {"▁a", "▁", "</s>", "<unk>"} & follow(constraint)
    assert {"é", "<0xC3>"} <= follow(constraint, "ab", "▁")
    assert follow(constraint, "<0xC3>") == {"<0xA9>", "<0xAA>"}
    assert follow(constraint, "<0xAA>") == {"</s>"}
    assert constraint.ended


def test_a_model_without_an_end_cannot_be_guided() -> None:
    from pagelab.models.tokenizer import Tokenizer

    with pytest.raises(RequestError, match="end-of-sequence"):
        GrammarCompiler(Tokenizer(byte_tokenizer()), VOCAB)


@pytest.fixture(scope="module")
def real(default_model: ModelSource) -> LLM:
    return LLM(kv_memory="64MiB", device="cpu", dtype="float32", max_model_len=256)


@pytest.mark.default_model
@pytest.mark.parametrize("guided", KINDS[:4])
def test_the_default_model_answers_in_the_form_asked_for(real: LLM, guided: GuidedDecoding) -> None:
    question = [{"role": "user", "content": "Invent a person. Answer as JSON."}]
    asked = params(guided, temperature=0.8, n=3, max_tokens=60)
    (output,) = real.chat(question, asked)
    check(output, guided)
    if guided.json_schema is not None:
        assert any(each.finish_reason is FinishReason.STOP for each in output.outputs)

"""Tokenizers: of folders and of GGUF files, chat templates, and text as tokens come."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pagelab.errors import (
    CorruptModelError,
    ModelNotFoundError,
    RequestError,
    UnsupportedModelError,
)
from pagelab.models.fetch import ModelSource, resolve
from pagelab.models.registry import load_tokenizer
from pagelab.models.tokenizer import Tokenizer
from tests.support.tiny_models import (
    BOS,
    EOS,
    byte_tokenizer,
    tiny_gguf,
    tiny_model,
    tiny_source,
    write_gguf,
)

TEXTS = [
    "Hello, world!",
    "1234567890 and 3.14, 0x1F",
    "  two  spaces\t\ttabs\n\n\nlines \r\n",
    "def f(x):\n    return x**2  # ok\n",
    "naïve café, 漢字 かな 한국어 عربى 🙂👩‍👩‍👧",
    "it's we'll I'M they'Re",
    "",
    "\u00e9 or e\u0301",
    "a\u200bb\u00a0c\x00\x01",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
]
CHAT = [
    {"role": "user", "content": "Hi 12"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "<b>"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(tiny_source("llama"))


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def test_a_folder_s_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hé</s>") == [104, 195, 169, EOS]
    assert tokenizer.decode([104, 195, 169, EOS]) == "hé"
    assert tokenizer.decode([104, EOS], skip_special_tokens=False) == "h</s>"
    assert tokenizer.vocab_size == 258
    assert tokenizer.bos_token_id == BOS
    assert tokenizer.eos_token_ids == (EOS,)


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([104, 260, 105]) == "hi"


def test_a_text_of_broken_unicode_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="valid Unicode"):
        tokenizer.encode("a\ud800b")


@given(st.text(max_size=40))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 257), max_size=60))
def test_streamed_parts_add_up_to_the_whole(ids: list[int]) -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    stream = tokenizer.decode_stream()
    parts = [stream.step(token) or "" for token in ids] + [stream.finish()]
    assert "".join(parts) == tokenizer.decode(ids)


def test_a_character_comes_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    stream = tokenizer.decode_stream()
    parts = [stream.step(byte) for byte in "a🙂b".encode()]
    assert parts == ["a", None, None, None, "🙂", "b"]
    assert stream.finish() == ""
    assert stream.step(0xF0) is None
    assert stream.finish() == "\ufffd"


def test_a_stream_costs_the_same_late_as_early(tokenizer: Tokenizer) -> None:
    decoded: list[int] = []
    stream = tokenizer.decode_stream()
    original = tokenizer.decode

    def counting(ids: list[int], skip: bool = True) -> str:
        decoded.append(len(ids))
        return original(ids, skip)

    tokenizer.decode = counting  # type: ignore[method-assign, assignment]
    try:
        for _ in range(300):
            stream.step(97)
    finally:
        del tokenizer.decode
    assert max(decoded) <= 2


def test_a_chat_is_rendered_with_the_special_tokens(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat(CHAT[:1])
    assert text == "<s>user: Hi 12</s><s>assistant: "
    ids = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=False)
    assert ids == [BOS, *b"user: Hi 12", EOS]


FEATURES = (
    "{%- set ns = namespace(n=0) %}\n"
    "  {% for m in messages %}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}\n"
    "    {%- else %}{{ m | tojson }}{% if loop.index > 2 %}{% break %}{% endif %}{% endif %}\n"
    "  {% endfor %}\n"
    "{{ eos_token }}{% if tools is none %}none{% endif %}{{ strftime_now('%Y')[:2] }}"
)


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "chat_template.jinja").write_text(FEATURES)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == FEATURES
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert load_tokenizer(resolve(folder)).render_chat(CHAT) == expected
    assert "<b>" in expected  # nothing is escaped as HTML


def test_where_a_template_may_be(tmp_path: Path) -> None:
    folder = copied(tmp_path)

    def rendered() -> str:
        return load_tokenizer(resolve(folder)).render_chat(CHAT)

    config = folder / "tokenizer_config.json"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "list"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered() == "list"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered() == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),  # a sandbox: nothing is changed
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ messages + 1 }}", "refuses these messages"),
    ],
)
def test_what_a_template_refuses_is_a_request_error(template: str, error: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer(), chat_template=template)
    with pytest.raises(RequestError, match=error):
        tokenizer.apply_chat_template(CHAT)


def test_a_broken_template_is_a_corrupt_model() -> None:
    with pytest.raises(CorruptModelError, match="chat template is broken"):
        Tokenizer(byte_tokenizer(), chat_template="{% for %}").apply_chat_template(CHAT)


def test_without_a_template_or_messages(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(byte_tokenizer())
    assert not bare.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        bare.apply_chat_template(CHAT)
    with pytest.raises(RequestError, match="no messages"):
        tokenizer.apply_chat_template([])
    for message in ({"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}, "hi"):
        with pytest.raises(RequestError, match="a message needs a text"):
            tokenizer.apply_chat_template([message])  # type: ignore[list-item]


def test_a_folder_without_a_tokenizer_says_what_works() -> None:
    folder = tiny_model("llama", tokenizer=False)
    with pytest.raises(ModelNotFoundError, match="give token ids instead"):
        load_tokenizer(resolve(folder))


def test_broken_tokenizer_files_are_named(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CorruptModelError, match=r"tokenizer\.json is no tokenizer file"):
        load_tokenizer(resolve(folder))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorruptModelError, match=r"tokenizer_config\.json is no JSON"):
        load_tokenizer(resolve(folder))


def test_tokens_that_only_the_config_adds_are_added(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"258": {"content": "<x>", "special": True}}
    config["eos_token"] = {"__type": "AddedToken", "content": "<x>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(resolve(folder))
    assert tokenizer.encode("a<x>") == [97, 258]
    assert tokenizer.decode([97, 258]) == "a"
    assert tokenizer.eos_token_ids == (EOS, 258)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    backend = byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(resolve(folder)).encode("a" * 20)) == 20


def test_vocab_and_merges_go_through_transformers(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gpt2", tokenizer=False), tmp_path / "model"))
    letters = byte_tokenizer().get_vocab()
    letters |= {"Ġh": 258, "<|endoftext|>": 259}
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ h\n")
    tokenizer = load_tokenizer(resolve(folder))
    assert tokenizer.encode("a hi") == [97, 258, 105]
    assert tokenizer.decode([97, 258, 105]) == "a hi"


def test_files_that_transformers_cannot_read_either(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gpt2", tokenizer=False), tmp_path / "model"))
    (folder / "vocab.json").write_text("[]")
    (folder / "merges.txt").write_text("x")
    with pytest.raises(UnsupportedModelError, match="give token ids"):
        load_tokenizer(resolve(folder))


# GGUF


def with_metadata(tmp_path: Path, name: str = "llama", **metadata: Any) -> ModelSource:
    """A tiny GGUF with other `tokenizer.ggml.*` keys."""
    path = tmp_path / f"{name}.gguf"
    write_gguf(path, name, metadata={f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    return resolve(path)


def test_a_gguf_s_tokenizer() -> None:
    tokenizer = load_tokenizer(resolve(tiny_gguf("llama")))
    assert tokenizer.encode("hello</s>") == [258, 108, 108, 111, EOS]  # he is one token
    assert tokenizer.decode([258, 108, EOS]) == "hel"
    assert tokenizer.vocab_size == 264
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS, (EOS,))
    assert tokenizer.render_chat(CHAT[:1]) == "<s>user: Hi 12</s><s>assistant: "


def test_tokens_around_a_text_where_the_file_wants_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_metadata(tmp_path, add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("a") == [BOS, 97, EOS]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]
    # Llama 3 has its first token unless the file says otherwise, as in llama.cpp
    assert load_tokenizer(with_metadata(tmp_path, pre="llama-bpe")).encode("a") == [BOS, 97]
    source = with_metadata(tmp_path, pre="llama-bpe", add_bos_token=False)
    assert load_tokenizer(source).encode("a") == [97]


def test_words_that_the_file_adds_are_matched_whole_and_shown(tmp_path: Path) -> None:
    tokens = list(_gguf_tokens())
    tokens[259], types = "<think>", [1] * 256 + [3, 3, 1, 4] + [5] * 4
    tokenizer = load_tokenizer(with_metadata(tmp_path, tokens=tokens, token_type=types))
    assert tokenizer.encode("a<think>b") == [97, 259, 98]
    assert tokenizer.decode([97, 259, EOS]) == "a<think>"


def _gguf_tokens() -> list[str]:
    from pagelab.models.gguf_file import GGUFFile

    tokens: list[str] = GGUFFile(tiny_gguf("llama")).metadata["tokenizer.ggml.tokens"]
    return tokens


def pieces(tmp_path: Path, pre: str, text: str) -> list[str]:
    """How a rule cuts a text before merging, as texts."""
    backend = load_tokenizer(with_metadata(tmp_path, pre=pre))._backend
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    decoder = tokenizers.decoders.ByteLevel()
    return [decoder.decode([piece]) for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "it's 123  x", "it|'s| 123| | x"),
        ("smollm", "it's 123  x", "it|'s| |1|2|3| | x"),
        ("llama-bpe", "it'S 12345\n\n x", "it|'S| |123|45|\n\n| x"),
        ("llama3", "f(x)=1", "f|(x|)=|1"),
        ("qwen2", "it's 123\n x e\u0301", "it|'s| |1|2|3|\n| x| é"),
    ],
)
def test_every_rule_cuts_texts_its_own_way(tmp_path: Path, pre: str, text: str, cut: str) -> None:
    assert pieces(tmp_path, pre, text) == cut.split("|")


def test_llama_3_takes_a_known_piece_whole(tmp_path: Path) -> None:
    tokens = list(_gguf_tokens())
    tokens[259] = "xyz"  # no merge makes it
    whole = load_tokenizer(with_metadata(tmp_path, pre="llama-bpe", tokens=tokens))
    assert whole.encode("xyz", add_special_tokens=False) == [259]
    apart = load_tokenizer(with_metadata(tmp_path, pre="smollm", tokens=tokens))
    assert apart.encode("xyz") == [*b"xyz"]


def test_without_a_rule_s_name_the_architecture_decides(tmp_path: Path) -> None:
    assert load_tokenizer(with_metadata(tmp_path, "gpt2", pre="default")).encode("a") == [97]
    qwen = load_tokenizer(with_metadata(tmp_path, "qwen2", pre=None))
    assert qwen.encode("e\u0301") == [0xC3, 0xA9]  # NFC
    with pytest.raises(UnsupportedModelError, match="'default'"):
        load_tokenizer(with_metadata(tmp_path, "llama", pre=None))


@pytest.mark.parametrize(
    ("metadata", "error", "named"),
    [
        ({"pre": "falcon"}, UnsupportedModelError, "tokenizer.ggml.pre is 'falcon'"),
        ({"model": "bert"}, UnsupportedModelError, "tokenizer.ggml.model is 'bert'"),
        ({"model": "none"}, ModelNotFoundError, "give token ids"),
        ({"model": None}, ModelNotFoundError, "give token ids"),
        ({"tokens": None}, CorruptModelError, "tokenizer.ggml.tokens is no list"),
        ({"merges": [1, 2]}, CorruptModelError, "tokenizer.ggml.merges is no list"),
        ({"merges": ["zz yy"]}, CorruptModelError, "do not fit"),
        ({"bos_token_id": 999}, CorruptModelError, "bos_token_id is 999"),
    ],
)
def test_tokenizers_that_cannot_be(
    tmp_path: Path, metadata: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=re.escape(named)):
        load_tokenizer(with_metadata(tmp_path, **metadata))


def test_sentencepiece_goes_through_transformers(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "h", "i", "hi", "▁hi"]
    scores = [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0, -2.0]
    types = [2, 3, 3] + [6] * 256 + [1] * 5
    source = with_metadata(
        tmp_path,
        model="llama",
        pre=None,
        tokens=tokens,
        scores=scores,
        token_type=types,
        merges=None,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = load_tokenizer(source)
    assert tokenizer.encode("hi") == [1, 263]
    assert tokenizer.encode("hi é", add_special_tokens=False)[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([1, 263, 259, 3 + 0xC3, 3 + 0xA9]) == "hi é"


# the default model's, against transformers' reading of the same file


@pytest.mark.default_model
def test_the_default_model_s_tokens_are_transformers_but_for_digits(
    default_model: ModelSource,
) -> None:
    ours = load_tokenizer(default_model)
    path = default_model.path
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.render_chat(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    # SmolLM2's own tokenizer.json splits all that is numeric; transformers' reading of `pre:
    # smollm` leaves that out, which shows where a space could merge with such a character
    space, squared = ours.encode(" "), ours.encode("²")
    assert ours.encode(" ²") == [*space, *squared]
    assert theirs(" ²")["input_ids"] != [*space, *squared]


@pytest.mark.default_model
def test_streams_of_random_tokens_add_up(default_model: ModelSource) -> None:
    tokenizer = load_tokenizer(default_model)
    chance = random.Random(0)
    for _ in range(50):
        ids = [chance.randrange(tokenizer.vocab_size) for _ in range(60)]
        stream = tokenizer.decode_stream()
        parts = [stream.step(token) or "" for token in ids] + [stream.finish()]
        assert "".join(parts) == tokenizer.decode(ids)


def test_long_texts_are_the_same_and_let_other_threads_work() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    text = "what is long, äöü 你好, takes long. " * 8_000
    ids = tokenizer.encode(text)
    assert ids == tokenizer._backend.encode(text).ids
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids) == text
    with pytest.raises(RequestError, match="Unicode"):
        tokenizer.encode("x" * 10_000 + "\ud800")

    for work in (lambda: tokenizer.encode(text), lambda: tokenizer.decode(ids)):
        thread = threading.Thread(target=work)
        looks = 0
        thread.start()
        while thread.is_alive():
            time.sleep(0.001)
            looks += 1
        assert looks > 5  # 1 where the lock is held all the time

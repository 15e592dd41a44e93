"""Traces: every format, malformed files, arrivals, lengths that do not fit, shared prefixes."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import statistics
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelab.errors import ConfigError
from pagelab.workloads import (
    RequestShape,
    ShapeOptions,
    Workload,
    load_workload,
    mixed,
    open_shapes,
    random_ids,
    request_of,
    split_specs,
    tokenize,
)

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,0,0,0,Conversation log\n"
    '118,"GPT-4, new",417,276,693,Conversation log\n'
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 4000, "input_length": 1100, "output_length": 6, "hash_ids": [0, 2, 3]}\n\n'
)
PLAIN = "arrival_s,input_tokens,output_tokens\n0,10,1\n0.5,20,2\n2,30,3\n"
CHATS = [
    {"conversations": [
        {"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e f g h i"}
    ]},
    {"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "x"}]},
    {"conversations": []},
]  # fmt: skip


def write(folder: Path, text: str, name: str = "trace.csv") -> str:
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


def lengths(spec: str, **options: object) -> list[tuple[int, int]]:
    stream = open_shapes(spec, options=ShapeOptions(**options))  # type: ignore[arg-type]
    return [(shape.input_tokens, shape.output_tokens) for shape in stream]


def arrivals(spec: str, seed: int = 0, **options: object) -> list[float]:
    stream = open_shapes(spec, seed=seed, options=ShapeOptions(**options))  # type: ignore[arg-type]
    return [shape.arrival_s for shape in stream]


# Formats


def test_azure_dates_become_seconds_after_the_first_request(tmp_path: Path) -> None:
    first, second = open_shapes(write(tmp_path, AZURE))
    assert first == RequestShape(374, 44, 0.0)
    assert second[:2] == (396, 109)
    assert second.arrival_s == pytest.approx(4.314579, abs=2e-6)


def test_azure_2024_dates_with_a_zone_are_read(tmp_path: Path) -> None:
    text = AZURE.replace("6805900", "680590+00:00").replace("9951690", "995169+00:00")
    assert arrivals(write(tmp_path, text)) == [0.0, pytest.approx(4.314579, abs=2e-6)]


def test_failed_requests_of_burstgpt_are_left_out_and_counted(tmp_path: Path) -> None:
    stream = open_shapes(write(tmp_path, BURST))
    assert list(stream) == [RequestShape(472, 18, 0.0), RequestShape(417, 276, 113.0)]
    assert (stream.counts.read, stream.counts.left_out, stream.counts.bad) == (2, 1, 0)


def test_mooncake_milliseconds_and_hashes_are_read(tmp_path: Path) -> None:
    assert list(open_shapes(write(tmp_path, MOONCAKE, "m.jsonl"))) == [
        RequestShape(600, 5, 0.0, (0, 1)),
        RequestShape(1100, 6, 3.0, (0, 2, 3)),
    ]


def test_plain_json_lines_know_what_the_client_asked_for(tmp_path: Path) -> None:
    line = '{"arrival_s":7,"input_tokens":3,"output_tokens":4,"hash_ids":[9],"max_tokens":64}'
    assert list(open_shapes(write(tmp_path, line, "p.jsonl"))) == [
        RequestShape(3, 4, 0.0, (9,), 64)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "arrival_s,input_tokens,output_tokens\n,10,1\n,20,2\n",
        "input_tokens,output_tokens\n10,1\n20,2\n",
        "num_prefill_tokens,num_decode_tokens,pd_ratio\n10,1,10.0\n20,2,10.0\n",
        "\ufeffInput_Tokens, output_tokens\r\n10.0,1\r\n\r\n20,2\r\n\r\n",
        '"output_tokens","input_tokens"\n"1","10"\n"2","20"',
    ],
)
def test_a_csv_without_arrivals_is_all_at_the_start(tmp_path: Path, text: str) -> None:
    stream = open_shapes(write(tmp_path, text))
    assert not stream.has_arrivals
    assert list(stream) == [RequestShape(10, 1), RequestShape(20, 2)]


def test_a_gzip_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "packed.csv.gz"
    path.write_bytes(gzip.compress(PLAIN.encode()))
    stream = open_shapes(str(path))
    assert (stream.name, [s.input_tokens for s in stream]) == ("packed", [10, 20, 30])


@pytest.mark.parametrize("lines", [False, True])
def test_conversations_give_their_first_turn_and_keep_its_text(tmp_path: Path, lines: bool) -> None:
    text = "\n".join(map(json.dumps, CHATS)) if lines else json.dumps(CHATS, indent=1)
    spec = write(tmp_path, text, "chats.json")
    workload = load_workload(spec)
    (request,) = workload.requests
    assert (request.prompt_text, request.prompt_tokens, request.max_tokens) == ("a b c", None, 8)
    assert "estimated" in workload.title
    assert workload.counts is not None
    assert workload.counts.left_out == 2
    exact = load_workload(spec, encode=lambda text: list(text.encode()))
    assert (exact.requests[0].prompt_tokens, exact.requests[0].max_tokens) == (5, 11)
    assert "estimated" not in exact.title


# Malformed


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1,10", "2 values, but the header names 3"),
        ("1,0,5", "input_tokens is 0"),
        ("1,-3,5", "input_tokens is -3"),
        ("1,10,nan", "output_tokens is nan"),
        ("1,10,2.5", "output_tokens is 2.5"),
        ("1,10,", "output_tokens is empty"),
        ("1,10,99999999999999999999999", "output_tokens is"),
        ("1,1_0,5", "input_tokens is '1_0'"),
        ("inf,10,5", "arrival_s is inf"),
        ("-1,10,5", "arrival_s is -1"),
        (",10,5", "arrival_s is empty"),
        ('1,"10,5', "unexpected end of data"),
        ("1,\udcff,5", "input_tokens is"),
    ],
)
def test_a_malformed_line_is_named_and_left_out_only_on_demand(
    tmp_path: Path, row: str, words: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(PLAIN.replace("0.5,20,2", row).encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=f"trace.csv, line 3: .*{words}.*--skip-bad"):
        list(open_shapes(str(path)))
    stream = open_shapes(str(path), options=ShapeOptions(skip_bad=True))
    assert list(stream) == [RequestShape(10, 1, 0.0), RequestShape(30, 3, 2.0)]
    assert stream.counts.bad == 1
    assert words in str(stream.counts.first_bad)
    assert words in stream.counts.sentence()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        '{"timestamp": 1}',
        '{"timestamp": true, "input_length": 5, "output_length": 5}',
        '{"timestamp": NaN, "input_length": 5, "output_length": 5}',
        '{"timestamp": 1, "input_length": "x", "output_length": 5}',
        '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [1, 2]}',
        '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [-1]}',
        "[" * 100_000,
    ],
)
def test_a_malformed_json_line_is_named(tmp_path: Path, line: str) -> None:
    spec = write(tmp_path, f"{MOONCAKE}{line}\n", "m.jsonl")
    with pytest.raises(ConfigError, match=r"m.jsonl, line 4: .*--skip-bad"):
        list(open_shapes(spec))
    assert lengths(spec, skip_bad=True) == [(600, 5), (1100, 6)]


@pytest.mark.parametrize("line", ["{", '{"timestamp": 0, "input_length": 0, "output_length": 5}'])
def test_a_malformed_first_line_does_not_hide_the_format(tmp_path: Path, line: str) -> None:
    spec = write(tmp_path, f"\n{line}\n{MOONCAKE}", "m.jsonl")
    with pytest.raises(ConfigError, match=r"m.jsonl, line 2: .*--skip-bad"):
        list(open_shapes(spec))
    assert lengths(spec, skip_bad=True) == [(600, 5), (1100, 6)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a;b;c\n1;2;3\n", "line 1: not the beginning of a trace"),
        ("0,10,1\n", "A CSV begins with a header"),
        ("input_tokens,output_tokens\n", "has no requests"),
        ('[{"conversations": ', "line 1: not JSON"),
        ("[]", "holds no JSON object"),
        ("[1]", "entry 1: 1 is not a JSON object"),
        ("x" * 1_100_000, "longer than"),
    ],
)
def test_a_file_that_is_no_trace_says_so(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(open_shapes(write(tmp_path, text)))


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        open_shapes(f"{tmp_path}/")
    with pytest.raises(ConfigError, match="no file"):
        open_shapes(str(tmp_path / "absent.csv"))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ConfigError, match="not a regular file"):
        open_shapes(str(tmp_path / "pipe.csv"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(PLAIN.encode())[:-12])
    with pytest.raises(ConfigError, match="cannot read"):
        list(open_shapes(str(tmp_path / "cut.csv.gz")))
    with pytest.raises(ConfigError, match=r"no workload 'mxied'.*uniform:.*trace file"):
        open_shapes("mxied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    spec = write(tmp_path, PLAIN)
    Path(spec).chmod(0)
    with pytest.raises(ConfigError, match=r"cannot read .*Permission"):
        open_shapes(spec)


# Arrivals


@given(order=st.permutations(range(40)))
def test_nearly_sorted_arrivals_come_sorted(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    rows = "".join(f"{second},{second + 1},1\n" for second in order)
    spec = write(tmp_path_factory.mktemp("t"), f"arrival_s,input_tokens,output_tokens\n{rows}")
    assert [(s.arrival_s, s.input_tokens) for s in open_shapes(spec)] == [
        (second, second + 1) for second in range(40)
    ]


def test_a_request_far_from_its_place_is_a_bad_line(tmp_path: Path) -> None:
    rows = "".join(f"{second},1,1\n" for second in [*range(1, 301), 0])
    spec = write(tmp_path, f"arrival_s,input_tokens,output_tokens\n{rows}")
    with pytest.raises(ConfigError, match=r"line 302: arrives 44 s before .*sort the file"):
        list(open_shapes(spec))
    assert len(arrivals(spec, skip_bad=True)) == 300


def test_a_trace_that_begins_again_shifts_its_times_and_its_hashes(tmp_path: Path) -> None:
    stream = open_shapes(write(tmp_path, MOONCAKE, "m.jsonl"), options=ShapeOptions(num_requests=5))
    assert [(s.arrival_s, s.hash_ids) for s in stream] == [
        (0.0, (0, 1)),
        (3.0, (0, 2, 3)),
        (6.0, (4, 5)),
        (9.0, (4, 6, 7)),
        (12.0, (8, 9)),
    ]
    assert (stream.counts.read, stream.counts.passes) == (5, 3)
    assert list(stream) == list(stream)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (None, [0.0, 0.5, 2.0]),
        ("trace", [0.0, 0.5, 2.0]),
        ("trace:2", [0.0, 0.25, 1.0]),
        ("burst", [0.0, 0.0, 0.0]),
    ],
)
def test_a_trace_keeps_scales_or_loses_its_arrivals(
    tmp_path: Path, rate: str | None, expected: list[float]
) -> None:
    assert arrivals(write(tmp_path, PLAIN), rate=rate) == expected


@pytest.mark.parametrize(
    ("rate", "variation"),
    [("4", 1.0), ("poisson:4", 1.0), ("gamma:4,cv=2", 2.0), ("gamma:4,cv=0.5", 0.5)],
)
def test_drawn_gaps_have_their_mean_and_variation(rate: str, variation: float) -> None:
    times = arrivals("alpaca-like:n=20000", rate=rate)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.05)
    assert times[:9] == arrivals("alpaca-like:n=9", rate=rate)
    assert times[:9] != arrivals("alpaca-like:n=9", seed=1, rate=rate)


@pytest.mark.parametrize(
    "rate", ["", "x", "0", "-1", "nan", "inf", "trace:", "gamma:4,cv=0", "burst:2"]
)
def test_an_impossible_rate_lists_what_there_is(rate: str) -> None:
    with pytest.raises(ConfigError, match="--rate takes burst"):
        ShapeOptions(rate=rate)


def test_own_arrivals_are_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="alpaca-like has no arrivals of its own"):
        open_shapes("alpaca-like", options=ShapeOptions(rate="trace"))


# Too long


@given(
    tokens=st.integers(1, 5000),
    output=st.integers(1, 5000),
    limit=st.integers(2, 3000),
    asked=st.none() | st.integers(1, 5000),
)
def test_clipped_requests_fit_and_lose_no_more_than_they_must(
    tokens: int, output: int, limit: int, asked: int | None
) -> None:
    options = ShapeOptions(max_model_len=limit, too_long="clip", asked_tokens=asked)
    stream = open_shapes(f"uniform:in={tokens},out={output},n=1", options=options)
    (shape,) = stream
    total = shape.input_tokens + shape.output_tokens
    assert total == min(limit, tokens + output)
    assert shape.input_tokens >= 1
    assert shape.output_tokens == min(output, limit - 1)
    assert stream.counts.clipped == (tokens + output > limit)
    if shape.max_tokens is not None:
        assert shape.output_tokens < shape.max_tokens <= limit - shape.input_tokens
    elif asked is not None:
        assert shape.output_tokens >= min(asked, limit - shape.input_tokens)


def test_too_long_requests_are_an_error_dropped_or_clipped(tmp_path: Path) -> None:
    spec = write(tmp_path, MOONCAKE, "m.jsonl")
    with pytest.raises(ConfigError, match=r"request 2 of m .*--max-model-len 700.*--too-long"):
        lengths(spec, max_model_len=700)
    assert lengths(spec, max_model_len=700, too_long="drop") == [(600, 5)]
    workload = load_workload(spec, options=ShapeOptions(max_model_len=700, too_long="clip"))
    assert [(r.prompt_tokens, r.hash_ids) for r in workload.requests] == [
        (600, (0, 1)),
        (694, (0, 2)),
    ]
    assert workload.counts is not None
    assert workload.counts.sentence() == "1 too long and cut"


def test_dropped_requests_do_not_count_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    stream = open_shapes(
        write(tmp_path, PLAIN),
        options=ShapeOptions(num_requests=4, max_model_len=22, too_long="drop"),
    )
    assert [s.input_tokens for s in stream] == [10, 20, 10, 20]
    assert stream.counts.dropped == 1
    with pytest.raises(ConfigError, match="all 64 requests of sharegpt-like are longer"):
        lengths("sharegpt-like", max_model_len=2, too_long="drop")


# Generators


@pytest.mark.parametrize(
    ("spec", "mean_in", "mean_out", "variation"),
    [
        ("sharegpt-like:n=40000", 161.31, 337.99, 0.87),
        ("alpaca-like:n=40000", 19.31, 58.45, 1.12),
    ],
)
def test_generated_lengths_have_the_means_of_the_paper(
    spec: str, mean_in: float, mean_out: float, variation: float
) -> None:
    pairs = lengths(spec)
    inputs, outputs = zip(*pairs, strict=True)
    assert max(i + o for i, o in pairs) <= 2048
    assert statistics.mean(inputs) == pytest.approx(mean_in, rel=0.03)
    assert statistics.mean(outputs) == pytest.approx(mean_out, rel=0.03)
    assert statistics.pstdev(outputs) / statistics.mean(outputs) == pytest.approx(
        variation, rel=0.05
    )


def test_generators_begin_alike_whatever_their_number() -> None:
    assert lengths("sharegpt-like:n=5") == lengths("sharegpt-like")[:5]
    assert lengths("sharegpt-like", num_requests=100)[:64] == lengths("sharegpt-like")
    assert lengths("sharegpt-like")[:3] == [(134, 18), (134, 165), (210, 132)]  # on every Python


def test_uniform_stays_in_its_ranges() -> None:
    pairs = lengths("uniform:in=16..18,out=5,n=200")
    assert {i for i, _ in pairs} == {16, 17, 18}
    assert {o for _, o in pairs} == {5}
    assert len(pairs) == 200


@pytest.mark.parametrize(
    "spec",
    ["uniform", "uniform:in=4", "uniform:in=9..4,out=1", "uniform:in=0,out=1", "uniform:x=1",
     "uniform:in=1,in=2,out=1", "sharegpt-like:n=0", "sharegpt-like:n=1..2", "alpaca-like:"],
)  # fmt: skip
def test_a_generator_refuses_odd_options(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec.partition(":")[0]):
        open_shapes(spec)


def test_commas_of_options_do_not_split_a_list_of_workloads() -> None:
    assert split_specs("seed, uniform:in=1..2,out=3,n=4,alpaca-like:n=9,a=b.csv,n=c.csv") == (
        "seed",
        "uniform:in=1..2,out=3,n=4",
        "alpaca-like:n=9",
        "a=b.csv",
        "n=c.csv",
    )


def test_a_million_requests_need_bounded_memory(tmp_path: Path) -> None:
    rows = "".join(f"{i},{100 + i},5\n" for i in range(500))
    spec = write(tmp_path, f"arrival_s,input_tokens,output_tokens\n{rows}")
    stream = iter(open_shapes(spec, options=ShapeOptions(num_requests=1_000_000)))
    next(stream)
    tracemalloc.start()
    for _ in itertools.islice(stream, 20_000):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# Token ids


def make(shape: RequestShape, index: int, vocab_size: int = 50257) -> tuple[int, ...]:
    return request_of(shape, index, name="w", vocab_size=vocab_size, seed=3).token_ids


@given(length=st.integers(1, 3000), vocab_size=st.sampled_from([1, 2, 128, 50257]))
def test_prompts_have_their_length_and_ids_below_the_vocabulary(
    length: int, vocab_size: int
) -> None:
    ids = make(RequestShape(length, 1), 7, vocab_size)
    assert len(ids) == length
    assert 0 <= min(ids) <= max(ids) < vocab_size
    assert ids == make(RequestShape(length, 1), 7, vocab_size)


def test_prompts_longer_than_the_pool_have_their_length() -> None:
    assert len(make(RequestShape(200_000, 1), 0)) == 200_000


def test_prompts_share_exactly_the_prefix_that_their_hashes_share() -> None:
    one = make(RequestShape(1300, 1, hash_ids=(5, 6, 7)), 0)
    two = make(RequestShape(1400, 1, hash_ids=(5, 6, 8)), 1)
    same = make(RequestShape(1500, 1, hash_ids=(5, 6, 7)), 2)
    assert one[:1024] == two[:1024]
    assert one[1024:1027] != two[1024:1027]
    assert one == same[:1300]
    short = make(RequestShape(1300, 1, hash_ids=(5,)), 3)  # the rest is its own
    assert short[:512] == one[:512]
    assert short[512:515] != one[512:515]


def test_prompts_without_hashes_differ_from_their_first_tokens_on() -> None:
    assert len({make(RequestShape(16, 1), i)[:3] for i in range(100_000)}) == 100_000
    ids = request_of(RequestShape(9, 1), 0, name="w", vocab_size=500, seed=4).token_ids
    assert ids != make(RequestShape(9, 1), 0, 500)


def test_the_engine_and_the_simulator_get_the_same_ids(tmp_path: Path) -> None:
    spec = write(tmp_path, MOONCAKE, "m.jsonl")
    workload = random_ids(load_workload(spec), 1000, 5)
    made = [
        request_of(shape, i, name="m", vocab_size=1000, seed=5)
        for i, shape in enumerate(open_shapes(spec))
    ]
    assert list(workload.requests) == made
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


def test_a_tokenizer_fills_lengths_with_prose_and_shares_prefixes(tmp_path: Path) -> None:
    spec = write(tmp_path, MOONCAKE, "m.jsonl")
    workload = tokenize(
        load_workload(spec), lambda text: list(text.encode()), lambda ids: bytes(ids).decode()
    )
    one, two = workload.requests
    assert (len(one.token_ids), len(two.token_ids)) == (600, 1100)
    assert one.token_ids[:512] == two.token_ids[:512]
    assert one.token_ids[512:600] != two.token_ids[512:600]
    assert one.prompt_text is not None
    assert " the " in one.prompt_text


# Named workloads with options


def test_options_apply_to_named_workloads_too() -> None:
    workload = load_workload("mixed", 1, ShapeOptions(num_requests=30, rate="2", asked_tokens=99))
    assert [r.prompt_text for r in workload.requests[:24]] == [
        r.prompt_text for r in mixed(1).requests
    ]
    assert len({r.prompt_text for r in workload.requests}) == 30
    assert workload.requests[5].arrival_s > 0
    assert {r.asked_tokens for r in workload.requests} == {99}


def test_seed_is_another_name_of_the_four_prompts() -> None:
    assert load_workload("seed") == load_workload("prompts")
    requests = load_workload("seed", options=ShapeOptions(num_requests=5)).requests
    assert [r.prompt_tokens for r in requests] == [None] * 5  # whole texts
    assert requests[4].prompt_text == requests[0].prompt_text
    assert math.isclose(sum(r.max_tokens for r in requests), 250)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_requests": 0}, "--requests"),
        ({"max_model_len": 1}, "--max-model-len"),
        ({"asked_tokens": 0}, "--asked-tokens"),
        ({"too_long": "cut"}, "--too-long takes drop, clip or error"),
    ],
)
def test_impossible_options_name_themselves(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ShapeOptions(**options)  # type: ignore[arg-type]

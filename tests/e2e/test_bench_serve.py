"""`pagelab bench serve` against our own server over a toy engine, and against bad ones."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pagelab.bench.serve_client import Endpoint, HttpError, stream_events
from pagelab.bench.serve_figures import figures, meets
from pagelab.bench.serve_load import LoadOptions, LoadRequest, Served, run_load
from pagelab.cli import main
from pagelab.errors import ConfigError
from pagelab.results import Objectives
from pagelab.server.settings import Limits, ServerSettings
from tests.support.tiny_models import tiny_model
from tests.support.toy_server import running

NONE: Objectives = {"ttft_s": None, "tpot_s": None, "e2e_s": None}


def served(due: float, chunks: list[float], tokens: int | None = None) -> Served:
    return Served(due, due, chunks, chunks[-1], 10, tokens or len(chunks))


def test_figures_are_those_of_their_formulas() -> None:
    a, b = served(0.0, [1.0, 1.5, 2.0]), served(1.0, [1.2, 2.2])
    found = figures([a, b], 4.0, {"ttft_s": 0.5, "tpot_s": None, "e2e_s": None})
    assert found["ttft_mean_s"]["value"] == pytest.approx(0.6)
    assert found["itl_mean_s"]["value"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert found["tpot_mean_s"]["value"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["e2e_p50_s"]["value"] == pytest.approx(1.6)
    assert found["output_tokens_per_s"]["value"] == pytest.approx(5 / 4)
    assert found["goodput_per_s"]["value"] == pytest.approx(1 / 4)
    for interval in found.values():
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_an_interval_narrows_with_more_requests() -> None:
    def width(count: int) -> float:
        many = [served(0.0, [1.0 + 0.5 * math.sin(i)]) for i in range(count)]
        found = figures(many, 1.0, NONE)["ttft_mean_s"]
        return found["high"] - found["low"]

    assert width(400) < width(25) / 2


def test_failed_requests_count_for_nothing_but_failures() -> None:
    failed = Served(0.0, error="broken")
    found = figures([failed, served(0.0, [1.0])], 1.0, NONE)
    assert found["requests_per_s"]["value"] == 1
    assert "goodput_per_s" not in found
    assert not meets(served(0.0, [1.0]), {"ttft_s": 0.5, "tpot_s": None, "e2e_s": None})


def bench(url: str, *options: str) -> Result:
    return CliRunner().invoke(
        main,
        ["bench", "serve", "--url", url, "--tokenizer", str(tiny_model("llama")), "--workload",
         "uniform:in=8..40,out=4..12,n=30", *options],
    )  # fmt: skip


@pytest.mark.parametrize("how", [["--rate", "200"], ["--concurrency", "4"], ["--send-ids"]])
def test_it_measures_a_server_and_writes_a_record(tmp_path: Path, how: list[str]) -> None:
    offline = tmp_path / "offline.json"
    offline.write_text(json.dumps({"summary": {"output_tokens_per_s": {"median": 1e6}}}))
    path, page = tmp_path / "record.json", tmp_path / "new" / "page.html"
    files = ["--json", str(path), "--html", str(page), "--offline", str(offline)]
    with running(step_s=0.001) as server:
        done = bench(server.url, *how, *files)
        assert done.exit_code == 0, done.output
        server.until(server.idle)
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["num_requests"] == len(record["requests"]) == 30
    assert record["num_failed"] == 0
    assert record["server"]["model"] == "toy"
    assert all(4 <= one["output_tokens"] <= 12 for one in record["requests"])
    assert 0 < record["offline"]["ratio"] < 1
    assert record["figures"]["ttft_p99_s"]["value"] > 0
    assert "TTFT" in done.output
    assert "% of it" in done.output
    text = page.read_text(encoding="utf-8")
    assert "The server answered all 30 requests" in text
    assert f"<dd>{server.url}</dd>" in text
    if how[0] == "--rate":
        dues = [one["due_s"] for one in record["requests"]]
        assert dues == sorted(dues)
        assert dues[-1] > 0


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def load(url: str, concurrency: int | None) -> list[Served]:
        requests = [LoadRequest("abc", 20, 0.01 * i) for i in range(10)]
        options = LoadOptions("toy", extra={"ignore_eos": True})
        return await run_load(Endpoint.parse(url), requests, options, concurrency=concurrency)

    with running(step_s=0.01) as server:
        opened = asyncio.run(load(server.url, None))
        assert max(one.sent_s for one in opened) < min(one.end_s for one in opened)
        closed = asyncio.run(load(server.url, 1))
        for before, after in itertools.pairwise(closed):
            assert after.sent_s >= before.end_s - 1e-3


def test_refusals_are_failures_that_the_record_names(tmp_path: Path) -> None:
    settings = ServerSettings(limits=Limits(max_waiting=1))
    with running(settings, step_s=0.02, max_num_seqs=1) as server:
        path = tmp_path / "record.json"
        done = bench(server.url, "--rate", "burst", "--warmup", "0", "--json", str(path))
    assert done.exit_code == 1
    record = json.loads(path.read_text())
    assert record["num_failed"] > 0
    assert "429" in record["errors"][0]


def test_nobody_there_and_odd_answers_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    done = bench(f"http://127.0.0.1:{free}")
    assert done.exit_code == 1
    assert "--url" in done.output
    with pytest.raises(ConfigError):
        Endpoint.parse("ftp://x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": []}\n\n", "broke off"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nbad", "status 500: bad"),
        (b"nonsense\r\n\r\n", "no HTTP answer"),
        (b"", "connection broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\ndata:", "connection broke"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"error\": {\"message\": \"no\"}}\n\n", "^no$"),
    ],
)  # fmt: skip
def test_a_broken_server_is_an_error_and_no_hang(answer: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()

        async def ask() -> None:
            endpoint = Endpoint.parse(f"127.0.0.1:{listener.getsockname()[1]}")
            async for _ in stream_events(endpoint, "/v1/completions", {}):
                pass

        with pytest.raises(HttpError, match=message):
            asyncio.run(asyncio.wait_for(ask(), 10))
        thread.join()


def test_answers_without_usage_are_counted_in_chunks_and_told() -> None:
    """As llama-cpp-python's server gives them."""
    chunk = b'data: {"choices": [{"text": "x"}]}\n\n'
    bodies = [b'{"data": [{"id": "m"}]}'] + [3 * chunk + b"data: [DONE]\n\n"] * 4
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for body in bodies:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = bench(url, "--requests", "4", "--warmup", "0", "--concurrency", "1")
        thread.join(timeout=20)
    assert done.exit_code == 0, done.output
    assert "0 tokens in, 12 out" in done.output
    assert "4 answers came without usage" in done.output
    assert "all tokens/s" not in done.output

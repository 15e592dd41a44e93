"""The server at its edges: keys, limits, clients that vanish, death of the engine, signals."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pagelab.server.settings import Limits, ServerSettings
from tests.support.tiny_models import tiny_model
from tests.support.toy_process import POISON, POISON_ALL, VOCAB, toy_tokenizer
from tests.support.toy_runner import generate
from tests.support.toy_server import RunningServer, running


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(step_s=0.002) as server:
        yield server


DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana-dashboard.json"

Answer = tuple[int, dict[str, str], Any]


def call(
    server: RunningServer,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """(status, headers, JSON or text)."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(
            method, path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        text = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        if "json" in found.get("content-type", ""):
            return response.status, found, json.loads(text)
        return response.status, found, text


def complete(server: RunningServer, prompt: Any, max_tokens: int = 4, **options: Any) -> Answer:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return call(server, "POST", "/v1/completions", body | options)


def begin(server: RunningServer, prompt: Any, max_tokens: int, **options: Any) -> socket.socket:
    """Send a request and do not wait for its answer."""
    body = json.dumps(
        {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | options
    ).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    return connection


def test_small_endpoints(server: RunningServer) -> None:
    assert call(server, "GET", "/health")[:1] == (200,)
    assert call(server, "GET", "/ready")[2] == {"status": "ready"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", call(server, "GET", "/version")[2]["version"])
    status, _, found = call(server, "POST", "/tokenize", {"prompt": "héllo"})
    assert (status, found["tokens"]) == (200, list("héllo".encode()))
    text = call(server, "POST", "/detokenize", {"tokens": found["tokens"]})[2]["prompt"]
    assert text == "héllo"
    chat = call(server, "POST", "/tokenize", {"messages": [{"role": "user", "content": "a"}]})[2]
    assert chat["tokens"] == toy_tokenizer().encode("<s>user: a</s><s>assistant: ")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("DELETE", "/v1/models", None, 405),
        ("POST", "/v1/completions", b"\xff\xfe{", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b'{"prompt": "a"', 400),
        ("POST", "/v1/completions", b'"prompt"', 400),
        ("POST", "/v1/completions", {"prompt": "a", "temperature": float("nan")}, 400),
        ("POST", "/v1/completions", {"prompt": "\ud800"}, 400),
        ("POST", "/v1/completions", {"prompt": [5, VOCAB]}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "model": "other"}, 404),
        ("POST", "/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "guided_regex": "a+"}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "response_format": {"type": "xml"}}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "stream_options": {}}, 400),
        ("POST", "/v1/chat/completions", {"messages": []}, 400),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user"}]}, 400),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "x", "content": "a"}]}, 400),
        ("GET", "/map/blocks/99999", None, 404),
    ],
)
def test_bad_requests_get_an_error_object(
    server: RunningServer, method: str, path: str, body: Any, status: int
) -> None:
    found, _, answer = call(server, method, path, body)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]


def test_tools_need_a_template_that_knows_them(server: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    status, _, answer = call(server, "POST", "/v1/chat/completions", body)
    assert status == 400
    assert "tools" in answer["error"]["message"]
    body |= {"tool_choice": "none", "max_tokens": 1}
    assert call(server, "POST", "/v1/chat/completions", body)[0] == 200


def test_a_key_is_needed_where_one_is_set() -> None:
    with running(ServerSettings(api_keys=("secret", "other"))) as server:
        for given in (None, "Bearer secre", "secret", "Basic secret", "Bearer sécret"):
            headers: dict[str, str] = {} if given is None else {"Authorization": given}
            status, found, answer = call(server, "GET", "/v1/models", headers=headers)
            assert status == 401
            assert answer["error"]["code"] == "invalid_api_key"
            assert found["www-authenticate"] == "Bearer"
        for key in ("secret", "other"):
            assert (
                call(server, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0]
                == 200
            )
        for path in ("/map/events", "/map/blocks/0", "/tokenize", "/detokenize"):
            assert call(server, "GET", path)[0] == 401
        for path in ("/", "/health", "/ready", "/version", "/metrics"):
            assert call(server, "GET", path)[0] == 200


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length() -> None:
    limits = Limits(max_body_bytes=1000)
    with running(ServerSettings(limits=limits)) as server:
        assert complete(server, "x" * 1000)[0] == 413
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 3
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert complete(server, "x")[0] == 200


def test_prompt_length_and_time_have_limits() -> None:
    limits = Limits(max_prompt_tokens=10, timeout_s=0.3)
    with running(ServerSettings(limits=limits), step_s=0.02) as server:
        status, _, answer = complete(server, "x" * 11)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        status, _, answer = complete(server, "x", 400)
        assert (status, answer["error"]["type"]) == (408, "timeout_error")
        _, _, text = complete(server, "x", 400, stream=True)
        assert "timeout_error" in text.split("\n\n")[-2]
        server.until(server.idle)


def test_a_full_queue_says_when_to_come_back() -> None:
    settings = ServerSettings(limits=Limits(max_waiting=2))
    with running(settings, step_s=0.05, max_num_seqs=1) as server:
        waiting = [begin(server, f"a{i}", 400) for i in range(3)]
        server.until(lambda: server.llm.num_waiting == 2)
        status, headers, answer = complete(server, "b")
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        for connection in waiting:
            connection.close()
        server.until(server.idle)
        assert complete(server, "b")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(stream: bool) -> None:
    with running(step_s=0.02) as server:
        connection = begin(server, "abc", 400, stream=stream)
        server.until(lambda: server.llm.stats is not None and server.llm.stats.num_running == 1)
        time.sleep(0.1)
        stats = server.llm.stats
        assert stats is not None
        step = stats.step
        connection.close()
        server.until(server.idle)
        assert server.llm.stats is not None
        # the one in the works, two more, and what the closing takes on loopback
        assert server.llm.stats.step <= step + 4
        assert server.llm.num_requests == 0


def test_a_reader_that_stops_reading_holds_nobody_up(server: RunningServer) -> None:
    slow = begin(server, "abc", 500, stream=True, logprobs=None)
    expected = toy_tokenizer().decode(generate(b"xyz", 20, 0, VOCAB))
    for _ in range(5):
        assert complete(server, "xyz", 20)[2]["choices"][0]["text"] == expected
    server.until(server.idle)  # its blocks are free, although nothing was read
    text = b""
    while b"[DONE]" not in text:
        text += slow.recv(65536)
    slow.close()


def test_a_failing_step_is_an_error_of_its_requests_alone(server: RunningServer) -> None:
    for poison in (POISON, POISON_ALL):
        status, _, answer = complete(server, [poison, 1, 2])
        assert (status, answer["error"]["type"]) == (500, "server_error")
        _, _, text = complete(server, [poison, 1, 2], stream=True)
        assert "server_error" in text
    assert complete(server, "abc")[0] == 200


def test_kill_9_of_the_engine_is_an_error_then_a_new_engine() -> None:
    with running(step_s=0.01) as server:
        streaming = begin(server, "abc", 400, stream=True)
        waiting = begin(server, "abc", 400)
        server.until(lambda: server.llm.stats is not None and server.llm.stats.num_running == 2)
        os.kill(server.llm.info.pid, signal.SIGKILL)
        text = b""
        while data := waiting.recv(65536):
            text += data
            if b"}}" in text:
                break
        assert text.startswith(b"HTTP/1.1 500")
        text = b""
        while b"server_error" not in text:
            data = streaming.recv(65536)
            assert data, text
            text += data
        streaming.close()
        waiting.close()
        status, headers, _ = complete(server, "abc")
        if status != 200:  # it is being started
            assert status == 503
            assert "retry-after" in headers
        assert call(server, "GET", "/health")[0] == 200
        server.until(lambda: server.llm.state == "ready")
        assert complete(server, "abc")[0] == 200
        assert "pagelab_engine_restarts_total 1.0" in call(server, "GET", "/metrics")[2]


def test_metrics_count_what_happened() -> None:
    with running() as server:
        for _ in range(3):
            complete(server, "abcdefgh", 5)
        complete(server, "x" * 600)
        text = call(server, "GET", "/metrics")[2]
    values = {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines())
        if not name.startswith("#")
    }
    assert values['pagelab_requests_ended_total{end="length"}'] == 3
    assert values['pagelab_requests_ended_total{end="refused"}'] == 1
    assert values['pagelab_tokens_total{kind="output"}'] == 15
    assert values["pagelab_ttft_seconds_count"] == 3
    assert values["pagelab_itl_seconds_count"] == 12
    slots = [value for name, value in values.items() if name.startswith("pagelab_kv_slots{")]
    assert sum(slots) == 256 * 4
    assert values["pagelab_prefix_cache_hit_tokens_total"] > 0


def serving(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pagelab", "serve", "--model", str(tiny_model("llama")),
         "--kv-memory", "4MiB", "--device", "cpu", "--threads", "1", "--port", "0", *options],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate(timeout=20)


def port_of(child: subprocess.Popen[str]) -> int:
    assert child.stderr is not None
    for line in child.stderr:
        if (found := re.search(r"serving .*:(\d+)/v1", line)) is not None:
            return int(found[1])
    raise AssertionError("it never served")


def test_sigterm_lets_running_requests_finish_and_exits_with_0() -> None:
    child = serving()
    try:
        port = port_of(child)
        server = _At(port)
        running_one = begin(server, "abc", 300, stream=True)
        assert running_one.recv(9) == b"HTTP/1.1 "
        child.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        text = b""
        while data := running_one.recv(65536):
            text += data
        running_one.close()
        assert b"[DONE]" in text
        assert child.wait(timeout=20) == 0
    finally:
        end(child)


def test_sigterm_refuses_new_requests_and_ends_the_others_at_the_deadline() -> None:
    child = serving("--drain-timeout", "1.5", "--max-num-batched-tokens", "1")
    try:
        server = _At(port_of(child))
        # prompts at one token a step take longer than the deadline
        slow = [begin(server, [*range(200), i], 300, stream=True) for i in range(40)]
        for connection in slow:
            assert connection.recv(9) == b"HTTP/1.1 "
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, headers, answer = complete(server, "abc")
        assert status == 503, answer
        assert "retry-after" in headers
        assert call(server, "GET", "/ready")[0] == 503
        assert child.wait(timeout=20) == 0
        for connection in slow:
            connection.close()
    finally:
        end(child)


def test_a_model_that_is_not_there_is_one_line_and_exit_code_1() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pagelab", "serve", "--model", "./nothing-here", "--port", "0"],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing-here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_names_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [sys.executable, "-m", "pagelab", "serve", "--port", str(taken.getsockname()[1])],
            capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    assert done.returncode == 1
    assert "--port" in done.stderr


class _At(RunningServer):
    """Somebody else's server, by its port."""

    def __init__(self, port: int) -> None:
        self.port = port


def test_the_dashboard_asks_for_metrics_that_there_are(server: RunningServer) -> None:
    complete(server, "abc")
    text = call(server, "GET", "/metrics")[2]
    known = set(re.findall(r"^(pagelab_\w+)", text, re.MULTILINE))
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"pagelab_\w+", target["expr"])
    ]
    assert len(asked) > 20
    assert set(asked) <= known

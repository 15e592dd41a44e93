"""Traces of a real server: what a span says, whose child it is, and collectors that are bad."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pagelab.cli import main
from pagelab.errors import ConfigError
from pagelab.server.otlp import otlp_tracing, traces_url
from pagelab.server.settings import Limits, ServerSettings
from pagelab.server.tracing import Tracing
from tests.support.toy_process import POISON
from tests.support.toy_server import RunningServer, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
URL = "http://127.0.0.1:4318"
PROMPT = "xyz"  # of letters that the hexadecimal numbers of a span cannot spell by chance


@contextmanager
def traced(**options: Any) -> Iterator[tuple[RunningServer, InMemorySpanExporter]]:
    """A toy server, and the spans that it has made."""
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with running(tracing=Tracing(provider), **options) as server:
        yield server, spans


def post(server: RunningServer, path: str, body: Any, **headers: str) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request(
            "POST", path, json.dumps(body), {"Content-Type": "application/json", **headers}
        )
        response = connection.getresponse()
        response.read()
        return response.status


def complete(server: RunningServer, **options: Any) -> int:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | options
    return post(server, "/v1/completions", body)


def request_spans(server: RunningServer, spans: InMemorySpanExporter, count: int = 1) -> Any:
    """The spans of so many requests; the last ends a moment after its answer has come."""

    def found() -> list[ReadableSpan]:
        return [s for s in spans.get_finished_spans() if "gen_ai.operation.name" in of(s)]

    server.until(lambda: len(found()) >= count)
    assert len(found()) == count
    return found()[0] if count == 1 else found()


def of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def children(spans: InMemorySpanExporter, parent: Any) -> list[Any]:
    return [
        span
        for span in spans.get_finished_spans()
        if span.parent is not None and span.parent.span_id == parent.context.span_id
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_its_figures_and_phases(stream: bool) -> None:
    with traced(step_s=0.01) as (server, spans):
        assert complete(server, stream=stream, n=2, seed=7, top_p=0.5) == 200
        span = request_spans(server, spans)
        assert span.name == "text_completion toy"
        found = of(span)
        for name, value in {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "toy",
            "gen_ai.response.model": "toy",
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.seed": 7,
            "gen_ai.request.top_p": 0.5,
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 8,
            "gen_ai.response.finish_reasons": ("length", "length"),
            "http.response.status_code": 200,
            "pagelab.preemptions": 0,
        }.items():
            assert found[name] == value, name
        assert 0 < found["pagelab.queue_seconds"] < found["pagelab.ttft_seconds"]
        assert "error.type" not in found
        queue, prefill, decode = children(spans, span)
        assert [s.name for s in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
        # phases follow each other without a gap, within the request (of another clock: 1 ms)
        assert span.start_time - 1e6 <= queue.start_time <= queue.end_time == prefill.start_time
        assert prefill.end_time == decode.start_time <= decode.end_time <= span.end_time + 1e6
        assert decode.end_time - decode.start_time >= 0.02e9  # three more steps of 10 ms
        (event,) = span.events
        assert (event.name, event.timestamp) == ("first token", prefill.end_time)
        first_after = (prefill.end_time - queue.start_time) / 1e9
        assert found["pagelab.ttft_seconds"] == pytest.approx(first_after, abs=1e-5)
        everything = " ".join(s.to_json() for s in spans.get_finished_spans())
        assert PROMPT not in everything  # no text is told


def test_a_callers_span_is_the_parent_and_a_bad_header_is_none() -> None:
    with traced() as (server, spans):
        header = f"00-{TRACE}-{PARENT}-01"
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert post(server, "/v1/chat/completions", body, traceparent=header) == 200
        span = request_spans(server, spans)
        assert span.name == "chat toy"
        assert (span.context.trace_id, span.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
        spans.clear()
        # the caller does not sample: nothing is kept
        assert post(server, "/v1/chat/completions", body, traceparent=header[:-1] + "0") == 200
        responses = {"input": "hi", "max_output_tokens": 2}
        assert post(server, "/v1/responses", responses, traceparent="00-nonsense") == 200
        span = request_spans(server, spans)
        assert span.parent is None
        assert of(span)["url.path"] == "/v1/responses"


def test_refused_failed_and_lost_requests_say_why() -> None:
    with traced(step_s=0.005) as (server, spans):
        assert complete(server, nonsense=1) == 400
        assert complete(server, prompt=[POISON]) == 500
        assert complete(server, prompt=[POISON], stream=True) == 200
        refused, failed, streamed = request_spans(server, spans, 3)
        assert of(refused)["error.type"] == "400"
        assert refused.status.status_code is StatusCode.UNSET  # the client's mistake
        assert of(failed)["error.type"] == "500"
        assert failed.status.status_code is StatusCode.ERROR
        assert of(streamed)["error.type"] == "error"
        assert streamed.status.status_code is StatusCode.ERROR
        spans.clear()
        options = {"max_tokens": 400, "stream": True}
        thread = threading.Thread(target=complete, args=(server,), kwargs=options)
        thread.start()
        server.until(lambda: server.llm.num_requests == 1 and server.llm.num_waiting == 0)
        os.kill(server.llm.info.pid, signal.SIGKILL)
        thread.join(timeout=20)
        lost = request_spans(server, spans)
        assert (of(lost)["http.response.status_code"], of(lost)["error.type"]) == (200, "lost")
        server.until(lambda: server.llm.num_restarts == 1)


def test_a_client_that_leaves_ends_its_span_as_cancelled() -> None:
    with traced(step_s=0.01) as (server, spans):
        body = json.dumps({"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True})
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            while b"data:" not in connection.recv(65536):
                pass
        span = request_spans(server, spans)
        assert of(span)["gen_ai.response.finish_reasons"] == ("cancelled",)
        assert 0 < of(span)["gen_ai.usage.output_tokens"] < 400


def test_preemptions_are_told() -> None:
    with traced(num_blocks=16, step_s=0.001) as (server, spans):
        assert complete(server, prompt=["abcd", "efgh", "ijkl"], max_tokens=30) == 200
        span = request_spans(server, spans)
        assert of(span)["pagelab.preemptions"] > 0
        assert of(span)["pagelab.recomputed_tokens"] > 0
        phases = children(spans, span)
        assert len(phases) == 9
        assert {of(phase)["pagelab.prompt"] for phase in phases} == {0, 1, 2}


class _Collector(HTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[tuple[str, bytes]] = []


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Collector)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.path, data))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_collector_gets_the_spans_by_the_servers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with _Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        url = traces_url(f"http://127.0.0.1:{collector.server_port}/", {})
        assert url is not None
        with running(tracing=otlp_tracing(url)) as server:
            assert complete(server) == 200
        collector.shutdown()
        thread.join(timeout=10)
        ((path, data),) = collector.bodies
    assert path == "/v1/traces"
    (sent,) = ExportTraceServiceRequest.FromString(data).resource_spans
    assert {a.key: a.value.string_value for a in sent.resource.attributes}["service.name"] == "ours"
    names = [span.name for scope in sent.scope_spans for span in scope.spans]
    assert sorted(names) == ["decode", "prefill", "queue", "text_completion toy"]


def test_an_unreachable_collector_slows_and_fails_nothing() -> None:
    """One that takes connections and never answers, with a queue that is soon full."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
        patch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        tracing = otlp_tracing(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        with running(tracing=tracing) as server:
            started = time.monotonic()
            assert [complete(server) for _ in range(40)] == [200] * 40
            assert time.monotonic() - started < 5  # its answer would time out after 10 s, each
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 8


def test_the_option_comes_before_the_environment_and_bad_addresses_are_refused() -> None:
    base, own = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    assert traces_url(None, {}) is None
    assert traces_url(None, {base: URL}) == f"{URL}/v1/traces"
    assert traces_url(None, {base: URL, own: "http://x/in"}) == "http://x/in"
    assert traces_url("http://y:1/v1/traces", {own: "http://x/in"}) == "http://y:1/v1/traces"
    assert traces_url(URL, {"OTEL_SDK_DISABLED": "true"}) is None
    assert traces_url(None, {base: URL, "OTEL_TRACES_EXPORTER": "none"}) is None
    for bad in ("collector:4318", "ftp://x", "http://", "http://x:port"):
        with pytest.raises(ConfigError, match="--otlp-endpoint"):
            traces_url(bad, {})
    with pytest.raises(ConfigError, match="gRPC"):
        traces_url(None, {base: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    done = CliRunner().invoke(main, ["serve", "--port", "0", "--otlp-endpoint", URL])
    assert done.exit_code == 1
    assert "pip install 'pagelab[otel]'" in done.output
    assert "Traceback" not in done.output


def test_a_full_queue_is_a_span_with_429() -> None:
    limits = Limits(max_waiting=1)
    with traced(settings=ServerSettings(limits=limits), step_s=0.1, max_num_seqs=1) as (
        server,
        spans,
    ):
        threads = [threading.Thread(target=complete, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        statuses = [of(s)["http.response.status_code"] for s in request_spans(server, spans, 4)]
        assert 429 in statuses

"""Traces: one OpenTelemetry span a request, by the GenAI semantic conventions; `pagelab[otel]`.

::

    caller's span ─ traceparent ─▶ chat NAME       arrival … last byte of the answer
                                   ├ queue         arrival … first step         (one of each a
                                   ├ prefill       first step … first token      prompt, from the
                                   └ decode        first token … end             engine's clock)

Attributes that the conventions do not have are called `pagelab.…`, times in seconds. No text of a
prompt or an answer is in a span. Spans are given to the processor when a request has ended, which
puts them into a queue; a thread of the SDK sends them, so a collector that is slow or gone costs
spans and never a request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagelab import __version__
from pagelab.engine.request_stream import RequestStream
from pagelab.types import RequestMetrics, SamplingParams

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
}
"""Paths that are traced, and the conventions' names of what they do."""

CLOSE_S = 3.0
"""How long the last spans may take at the end of the server."""


class Tracing:
    """Makes spans.

    Args:
        provider: where spans go. It is shut down with the server; the SDK's global one is left
            alone.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pagelab", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, operation: str, path: str, headers: dict[str, str]) -> RequestTrace:
        """A request's span, a child of the caller's where the headers name one (W3C)."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            operation,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "pagelab",
                "http.request.method": "POST",
                "url.path": path,
            },
        )
        return RequestTrace(self._tracer, span, operation)

    async def close(self) -> None:
        """Send what is left, for `CLOSE_S` seconds at most.

        In a thread that nobody waits for at exit: the SDK waits up to 30 s for a collector.
        """
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        deadline = time.monotonic() + CLOSE_S
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


class RequestTrace:
    """One request's span: told what was asked, then which streams answer, then the end."""

    def __init__(self, tracer: Tracer, span: Span, operation: str) -> None:
        self._tracer = tracer
        self._span = span
        self._operation = operation
        self._streams: Sequence[RequestStream] = ()
        self._started = time.perf_counter()
        # the engine's times are of perf_counter, spans are in nanoseconds since 1970
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def asked(self, model: str, params: SamplingParams) -> None:
        """What is asked of which model."""
        self._span.update_name(f"{self._operation} {model}")
        given: dict[str, Any] = {
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k or None,  # 0: no such filter
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.choice.count": params.n if params.n != 1 else None,
            "gen_ai.request.presence_penalty": params.presence_penalty or None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        }
        self._set(given)

    def began(self, streams: Sequence[RequestStream]) -> None:
        """The engine has taken all of its prompts."""
        self._streams = streams

    def end(self, status: int | None, error: BaseException | None = None) -> None:
        """The answer has been sent, or nobody is there any more.

        Args:
            status: of the HTTP answer; None: there was none.
            error: what the endpoint raised, where it raised something unforeseen.
        """
        if self._span.is_recording():
            self._set({"http.response.status_code": status})
            if self._streams:
                self._tell_streams()
            self._tell_error(status, error)
        self._span.end()

    def _tell_streams(self) -> None:
        streams = self._streams
        reasons = [str(reason) for stream in streams for reason in stream.finish_reasons]
        known = [stream.metrics for stream in streams if stream.metrics is not None]
        self._set(
            {
                "gen_ai.usage.input_tokens": sum(len(s.prompt_token_ids) for s in streams),
                "gen_ai.usage.output_tokens": sum(s.num_output_tokens for s in streams),
                "gen_ai.response.finish_reasons": reasons,
            }
        )
        for number, stream in enumerate(streams):
            if stream.metrics is not None:
                self._add_children(number, stream.metrics)
        if len(known) < len(streams):
            return  # left or lost before its end: the engine did not say
        queued = [m.first_scheduled_time - m.arrival_time for m in known if m.first_scheduled_time]
        firsts = [m.first_token_time for m in known if m.first_token_time is not None]
        self._set(
            {
                "gen_ai.usage.cache_read.input_tokens": sum(m.num_cached_tokens for m in known),
                "pagelab.queue_seconds": min(queued, default=None),
                "pagelab.preemptions": sum(m.num_preemptions for m in known),
                "pagelab.recomputed_tokens": sum(m.num_recomputed_tokens for m in known),
            }
        )
        if firsts:
            arrival = min(m.arrival_time for m in known)
            self._set({"pagelab.ttft_seconds": min(firsts) - arrival})
            self._span.add_event("first token", timestamp=self._ns(min(firsts)))

    def _add_children(self, prompt: int, metrics: RequestMetrics) -> None:
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(self._span)
        times = (
            metrics.arrival_time,
            metrics.first_scheduled_time,
            metrics.first_token_time,
            metrics.finish_time,
        )
        for name, start, end in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            if start is None or end is None:
                break
            span = self._tracer.start_span(name, parent, start_time=self._ns(start))
            if len(self._streams) > 1:
                span.set_attribute("pagelab.prompt", prompt)
            span.end(self._ns(end))

    def _tell_error(self, status: int | None, error: BaseException | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        ends = {"error" for s in self._streams if "error" in s.finish_reasons}
        ends |= {"lost" for s in self._streams if s.outcome == "lost"}
        if error is not None:
            kind: str | None = type(error).__name__
        elif status is not None and status >= 400:
            kind = str(status)
        else:
            kind = min(ends, default=None)  # in a stream that had begun with status 200
        if kind is None:
            return
        self._span.set_attribute("error.type", kind)
        if error is not None or ends or (status or 0) >= 500:  # what a client did wrong is no error
            self._span.set_status(Status(StatusCode.ERROR, kind))

    def _set(self, given: dict[str, Any]) -> None:
        self._span.set_attributes({key: v for key, v in given.items() if v is not None})

    def _ns(self, moment: float) -> int:
        return round(moment * 1e9) + self._epoch_ns


class Traced:
    """ASGI: a span around each request to a path of `OPERATIONS`, refused ones included."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        operation = OPERATIONS.get(scope.get("path", ""))
        if scope["type"] != "http" or operation is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        trace = self._tracing.begin(operation, scope["path"], headers)
        scope.setdefault("state", {})["trace"] = trace
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        failure: BaseException | None = None
        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            failure = error
            raise
        finally:
            trace.end(status, failure)


def trace_of(request: Request) -> RequestTrace | None:
    """The request's span; None where nothing is traced."""
    return getattr(request.state, "trace", None)

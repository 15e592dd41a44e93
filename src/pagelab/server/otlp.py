"""Where traces are sent: OTLP over HTTP, by an option or OpenTelemetry's environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from pagelab import __version__
from pagelab.errors import ConfigError
from pagelab.server.tracing import Tracing

_PATH = "/v1/traces"


def traces_url(option: str | None, environ: Mapping[str, str]) -> str | None:
    """Where a collector takes traces; None: nothing is traced.

    Args:
        option: `--otlp-endpoint`, a collector's address (`http://127.0.0.1:4318`); comes first.
        environ: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is used as it is, OTEL_EXPORTER_OTLP_ENDPOINT
            as the option; OTEL_SDK_DISABLED and OTEL_TRACES_EXPORTER=none turn traces off.

    Raises:
        ConfigError: it is no http address, or the environment asks for gRPC.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if option is not None:
        return _checked("--otlp-endpoint", option, base=True)
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    for name, base in (
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", False),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", True),
    ):
        if found := environ.get(name, "").strip():
            protocol = environ.get(
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
            )
            if protocol == "grpc":
                raise ConfigError(
                    f"{name} with gRPC: traces are sent by http/protobuf only; give the "
                    "collector's HTTP address with --otlp-endpoint (its port is mostly 4318), or "
                    "set OTEL_SDK_DISABLED=true"
                )
            return _checked(name, found, base=base)
    return None


def otlp_tracing(url: str) -> Tracing:
    """Send spans to a collector, from a thread of the SDK; headers, sampler, queue and the
    service's name are those of OpenTelemetry's environment variables.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"traces to {url} need OpenTelemetry ({error}): pip install 'pagelab[otel]', or set "
            "OTEL_SDK_DISABLED=true"
        ) from error
    ours = Resource.create({"service.name": "pagelab", "service.version": __version__})
    # not at exit: our own shutdown is bounded
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return Tracing(provider)


def _checked(name: str, url: str, *, base: bool) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{name} {url!r} is no http address, as http://127.0.0.1:4318")
    if not base or parts.path.rstrip("/").endswith(_PATH):
        return url
    return url.rstrip("/") + _PATH

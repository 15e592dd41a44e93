"""`pagelab serve`."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import click

from pagelab.cli.options import ENGINE_NAMES, engine_options, model_options, size
from pagelab.errors import ConfigError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@click.command()
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="PAGELAB_API_KEY",
    metavar="KEY",
    help="Let in only clients with this key (repeatable; better in the environment variable "
    "PAGELAB_API_KEY, which a list of processes does not show).",
)
@click.option("--served-name", metavar="NAME", help="What clients call the model.")
@engine_options
@click.option(
    "--allocator", default="paged", show_default=True, help="One of the five, or module:Class."
)
@click.option(
    "--max-waiting", default=2048, show_default=True, help="Requests that may wait; then 429."
)
@click.option(
    "--max-sequences", default=128, show_default=True, help="Prompts times n of one request."
)
@click.option("--max-prompt-tokens", type=int, help="Of one prompt.  [default: the model's own]")
@click.option(
    "--max-body-bytes", default="4MiB", show_default=True, callback=size, help="Of one request."
)
@click.option(
    "--request-timeout", default=600.0, show_default=True, help="Seconds for one request."
)
@click.option(
    "--drain-timeout",
    default=30.0,
    show_default=True,
    help="Seconds that running requests get after SIGTERM.",
)
@click.option("--page-map/--no-page-map", default=True, show_default=True, help="Serve / .")
@click.option(
    "--show-text", is_flag=True, help="Let the page map show the texts of prompts and answers."
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send OpenTelemetry traces to this collector, as http://127.0.0.1:4318 (pagelab[otel]).  "
    "[default: OTEL_EXPORTER_OTLP_ENDPOINT]",
)
def serve(**options: Any) -> None:
    """Serve a model to OpenAI's clients, with a live map of its KV blocks at /."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}: pip install 'pagelab[server]'")
    from pagelab.engine.async_llm import AsyncLLM
    from pagelab.server.otlp import traces_url
    from pagelab.server.run import run_server
    from pagelab.server.settings import Limits, ServerSettings

    settings = ServerSettings(
        **{name: options[name] for name in ("host", "port", "api_keys", "served_name")},
        drain_s=options["drain_timeout"],
        page_map=options["page_map"],
        show_text=options["show_text"],
        traces_url=traces_url(options["otlp_endpoint"], os.environ),
        limits=Limits(
            **{
                name: options[name]
                for name in ("max_body_bytes", "max_prompt_tokens", "max_sequences", "max_waiting")
            },
            timeout_s=options["request_timeout"],
        ),
    )
    engine = {name: options[name] for name in ENGINE_NAMES if options[name] is not None}
    llm = AsyncLLM(
        options["model"],
        max_waiting=options["max_waiting"],
        allocator=options["allocator"],
        **engine,
    )
    run_server(llm, settings, say=lambda text: click.echo(text, err=True))

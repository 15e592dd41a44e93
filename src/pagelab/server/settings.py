"""How a server runs: where it listens, who may come in, how much one request may ask."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagelab.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for, and how many may ask.

    Attributes:
        max_body_bytes: of a request's body.
        max_prompt_tokens: of one prompt; None: what the model's length allows.
        max_sequences: prompts times `n` of one request.
        max_waiting: requests without a token yet; more are refused with 429.
        timeout_s: from a request's arrival to its end; what is not finished is cut off.
    """

    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_sequences: int = 128
    max_waiting: int = 2048
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least 1, not {getattr(self, name)}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(
                f"--max-prompt-tokens must be at least 1, not {self.max_prompt_tokens}"
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"--request-timeout must be above 0, not {self.timeout_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One server.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        api_keys: any of these lets a client in; none: everybody is let in.
        served_name: what `/v1/models` lists; None: the model's own name.
        drain_s: how long running requests may go on after SIGTERM.
        page_map: whether `/` is there.
        show_text: whether the page map may show the texts of prompts and answers.
        traces_url: where a collector takes OpenTelemetry's traces; None: nothing is traced.
        limits: see `Limits`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_name: str | None = None
    drain_s: float = 30.0
    page_map: bool = True
    show_text: bool = False
    traces_url: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, not {self.port}")
        if any(not key for key in self.api_keys):
            raise ConfigError("--api-key must not be empty")
        if self.drain_s < 0:
            raise ConfigError(f"--drain-timeout must be at least 0, not {self.drain_s}")

"""Who comes in, and with how large a body: before anything else reads the request."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagelab.server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
"""Paths that need no key: none of them shows a prompt or an answer."""


class Access:
    """Refuses requests without a key (401) and with too large a body (413).

    A body is counted while it is read, whatever its `Content-Length` says.
    """

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)
        self._most = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN_PATHS and not self._knows(headers):
            error = ApiError(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._most:
            await self._too_large().response()(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._most:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a key is right; takes as long for a wrong one, and for any of several."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most} bytes (--max-body-bytes)",
            code="body_too_large",
        )

"""`/`: the live page map, one self-contained page, and what it asks for."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import HTMLResponse
from starlette.responses import Response

from pagelab.server.documents import errors
from pagelab.server.errors import ApiError
from pagelab.server.page_map import MOST_CLIENTS
from pagelab.server.service import Service
from pagelab.server.sse import EventStream
from pagelab.telemetry import describe_environment

router = APIRouter()

# the page may talk to this server and to nobody else
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> Response:
    """The page."""
    return HTMLResponse(page_text(), headers={"Content-Security-Policy": _POLICY})


@router.get("/map/events", include_in_schema=False)
async def map_events(request: Request) -> Response:
    """The pool, the requests and the figures, a few times a second."""
    service: Service = request.app.state.service
    if service.page_map.num_clients >= MOST_CLIENTS:
        raise ApiError(429, f"{MOST_CLIENTS} pages look already", headers={"Retry-After": "10"})
    return EventStream(service.page_map.events())


@router.get("/map/blocks/{block_id}", responses=errors(400, 401, 404, 500, 503))
async def map_block(
    block_id: Annotated[int, Path(ge=0, lt=1 << 40)], request: Request
) -> dict[str, Any]:
    """One block: who holds it, its hash, its tokens; their text where that may be shown."""
    service: Service = request.app.state.service
    facts = await service.llm.describe_block(block_id)
    if facts is None:
        raise ApiError(404, f"there is no block {block_id}", code="block_not_found")
    found: dict[str, Any] = {
        "block": facts.block_id,
        "refs": facts.ref_count,
        "written": facts.written,
        "hash": facts.hash,
        "holders": [list(holder) for holder in facts.holders],
        "position": facts.position,
        "text": None,
    }
    if service.settings.show_text and service.llm.has_tokenizer:
        found["text"] = service.llm.tokenizer.decode(facts.token_ids, skip_special_tokens=False)
    return found


@router.get("/map/recording", responses=errors(401, 404, 500, 503))
async def map_recording(request: Request) -> Response:
    """The last minutes as a results file for `pagelab report`."""
    service: Service = request.app.state.service
    environment = await asyncio.to_thread(describe_environment)
    found = service.page_map.recording.results(service.llm.info, environment)
    if found is None:
        raise ApiError(404, "nothing was recorded yet: the page map records while it is open")
    text = await asyncio.to_thread(json.dumps, found)
    name = "pagelab-recording.json"
    return Response(
        text,
        media_type="application/json",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


@cache
def page_text() -> str:
    """The page's HTML with its style and script in it."""
    folder = files("pagelab.server") / "page"
    text = (folder / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/*{name}*/", (folder / name).read_text(encoding="utf-8"))
    return text

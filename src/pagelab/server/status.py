"""`/health`, `/ready`, `/version` and `/metrics`: open to everybody."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from pagelab import __version__
from pagelab.engine.launch import EngineState
from pagelab.server.documents import Status, Version, errors
from pagelab.server.metrics import CONTENT_TYPE
from pagelab.server.service import Service

router = APIRouter()


@router.get("/health", responses={503: {"model": Status}})
async def health(request: Request) -> Response:
    """Whether this process lives; it may be loading. 503: it is ending."""
    service: Service = request.app.state.service
    closed = service.llm.state is EngineState.CLOSED
    return JSONResponse({"status": str(service.llm.state)}, 503 if closed else 200)


@router.get("/ready", responses={503: {"model": Status}})
async def ready(request: Request) -> Response:
    """Whether requests are served now."""
    state = request.app.state.service.llm.state
    return JSONResponse({"status": str(state)}, 200 if state is EngineState.READY else 503)


@router.get("/version")
async def version() -> Version:
    """Of PageLab."""
    return Version(version=__version__)


@router.get("/metrics", response_class=Response, responses=errors(500))
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

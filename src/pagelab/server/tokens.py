"""`/v1/models`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from pagelab.server.chat import template_messages
from pagelab.server.documents import (
    SMALL_RESPONSES,
    DetokenizedText,
    ModelCard,
    ModelList,
    Tokens,
)
from pagelab.server.schemas import DetokenizeRequest, TokenizeRequest
from pagelab.server.service import Service

router = APIRouter()


@router.get("/v1/models", responses=SMALL_RESPONSES)
async def list_models(request: Request) -> ModelList:
    """The one model of this server."""
    return ModelList(data=[_card(request.app.state.service)])


@router.get("/v1/models/{name:path}", responses=SMALL_RESPONSES)
async def get_model(name: str, request: Request) -> ModelCard:
    """The same, by its name."""
    service: Service = request.app.state.service
    card = _card(service)
    service.check_model(name)
    return card


@router.post("/tokenize", responses=SMALL_RESPONSES)
async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
    """Token ids of a text, or of a conversation through the chat template."""
    service: Service = request.app.state.service
    service.check_ready()
    service.check_model(body.model)
    llm = service.llm
    if body.messages is not None:
        text = llm.tokenizer.render_chat(
            template_messages(body.messages), body.add_generation_prompt
        )
        ids = await llm.encode(text, add_special_tokens=False)
    else:
        ids = await llm.encode(body.prompt or "", body.add_special_tokens)
    return Tokens(tokens=ids, count=len(ids), max_model_len=llm.info.max_model_len)


@router.post("/detokenize", responses=SMALL_RESPONSES)
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizedText:
    """The text of token ids."""
    service: Service = request.app.state.service
    service.check_ready()
    service.check_model(body.model)
    text = await service.llm.decode(body.tokens, body.skip_special_tokens)
    return DetokenizedText(prompt=text)


def _card(service: Service) -> ModelCard:
    info = service.llm.info
    return ModelCard(
        id=service.model_name, created=service.created, max_model_len=info.max_model_len
    )

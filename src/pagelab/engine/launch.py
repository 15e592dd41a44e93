"""How an engine process is made, what state it is in, and who may watch it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from pagelab.engine.messages import BlockNews, EngineInfo, StepStats
from pagelab.engine.options import EngineOptions
from pagelab.engine.request_stream import RequestStream
from pagelab.errors import ModelError

if TYPE_CHECKING:
    from pagelab.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    """What an engine can do now."""

    LOADING = "loading"  # also after its process died
    READY = "ready"
    DRAINING = "draining"  # takes no new requests
    CLOSED = "closed"


class Observer(Protocol):
    """Told what the engine does; must return at once."""

    def stepped(self, stats: StepStats) -> None:
        """A step's figures."""
        ...

    def ended(self, stream: RequestStream) -> None:
        """A request has ended, however."""
        ...

    def blocks_changed(self, news: BlockNews) -> None:
        """The page map's news, while it is watched."""
        ...

    def started(self, info: EngineInfo) -> None:
        """An engine process is ready, the first one or one after a death."""
        ...


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine process is made, and how its tokens become text.

    Attributes:
        factory: `module:function`; called with `options` in the engine's process, it gives
            (EngineCore, EngineInfo, Constrain or None), as `engine.worker_process.load_llm`.
        options: its keywords; must be picklable.
        load_tokenizer: called in a thread; None where the model has no tokenizer.
    """

    factory: str
    options: Mapping[str, Any]
    load_tokenizer: Callable[[], Tokenizer | None]


def launch_of(model: str | None, options: EngineOptions) -> Launch:
    """The engine that `LLM` makes."""

    def load() -> Tokenizer | None:
        from pagelab.models.fetch import resolve
        from pagelab.models.registry import load_tokenizer
        from pagelab.models.shape_source import resolve_shape

        find = resolve_shape if options.get("random_weights") else resolve
        try:
            return load_tokenizer(find(model))
        except ModelError as error:
            logger.warning("texts cannot be served: %s", error)
            return None

    keywords = {"model": model, "progress": False, **options}
    return Launch("pagelab.engine.worker_process:load_llm", keywords, load)

"""Grammars are compiled in a thread, beside the step loop: a large schema takes long."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from pagelab.engine.messages import AddRequest
from pagelab.errors import PageLabError, RequestError
from pagelab.scheduling.constraint import Constraint
from pagelab.types import SamplingParams

logger = logging.getLogger(__name__)

Constrain = Callable[[SamplingParams], Constraint | None]
"""Makes what `params.guided` asks for; called in another thread than the engine's."""


class Compiled(NamedTuple):
    """A guided request and its constraint, or why there is none."""

    message: AddRequest
    found: Constraint | PageLabError


class ConstraintMaker:
    """Makes constraints beside the step loop: a large schema takes longer than a step."""

    def __init__(self, constrain: Constrain | None, inbox: queue.SimpleQueue[Any]) -> None:
        self._constrain = constrain
        self._inbox = inbox
        self._queue: queue.SimpleQueue[AddRequest] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def compile(self, message: AddRequest) -> None:
        """Have `Compiled` put into the inbox in a while."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._queue.put(message)

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            self._inbox.put(Compiled(message, self._found(message)))

    def _found(self, message: AddRequest) -> Constraint | PageLabError:
        try:
            found = None if self._constrain is None else self._constrain(message.params)
        except PageLabError as error:
            return error
        except Exception as error:  # of the grammar library, on a grammar that it did not expect
            logger.exception("a constraint could not be made")
            return RequestError(f"guided decoding failed: {error}")
        return found or RequestError("this engine has no guided decoding")

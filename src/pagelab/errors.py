"""Every error that PageLab raises on purpose.

    PageLabError
    ├── ConfigError              a setting that cannot work; names the option to change
    │   └── InsufficientMemoryError   the figures do not fit; names the option and the figure
    ├── RequestError             one request is wrong; others are not affected
    │   └── RequestTooLongError  longer than the model or the pool can ever hold
    ├── ModelError               a model cannot be used
    │   ├── ModelNotFoundError   no such folder, file or hub id, or it cannot be fetched
    │   ├── CorruptModelError    files are broken, incomplete or of the wrong shape
    │   └── UnsupportedModelError     an architecture, option or file type we do not have
    ├── StepError                a step of the engine failed; its requests end with an error
    ├── EngineError              the engine's process cannot serve
    │   ├── EngineDeadError      it ended; requests in flight are lost, later ones may work
    │   └── EngineUnavailableError    it is loading, draining or closed; retry or go elsewhere
    ├── OverloadedError          the queue is full; retry later
    └── ReportError              a result cannot be read or a report cannot be written

A message says what is wrong, with the figures, and which knob to turn. Bugs are `assert`s.
"""


class PageLabError(Exception):
    """Base of all errors that are meant for the user."""


class ConfigError(PageLabError, ValueError):
    """A setting that cannot work."""


class InsufficientMemoryError(ConfigError):
    """A budget is too small for what was asked of it."""


class RequestError(PageLabError, ValueError):
    """A request that cannot be served; raised when it is added, before anything is allocated."""


class RequestTooLongError(RequestError):
    """A request that could never fit into the model's length or into the KV pool."""


class ModelError(PageLabError):
    """A model that cannot be used."""


class ModelNotFoundError(ModelError):
    """A model that is not there and cannot be fetched."""


class CorruptModelError(ModelError):
    """Model files that are broken, incomplete or do not match their own description."""


class UnsupportedModelError(ModelError):
    """An architecture, an option of one, or a file format that PageLab does not have."""


class StepError(PageLabError, RuntimeError):
    """A step failed; the requests that were in it end with this error."""


class EngineError(PageLabError, RuntimeError):
    """The engine's process cannot serve a request."""


class EngineDeadError(EngineError):
    """The engine's process ended while it had this request."""


class EngineUnavailableError(EngineError):
    """The engine is loading, draining or closed."""


class OverloadedError(PageLabError, RuntimeError):
    """The queue is full: a request was not taken."""


class ReportError(PageLabError):
    """A results file that cannot be read, or a report that cannot be written."""
